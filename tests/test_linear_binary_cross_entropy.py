"""linear_binary_cross_entropy, of torch_mlp/ops/binary_cross_entropy.py."""

import itertools
import math

import pytest
import torch
from conftest import DTYPES, assert_no_less_accurate, assert_same_bits, clones
from torch.autograd import gradcheck, gradgradcheck

from torch_mlp.functional import linear_binary_cross_entropy

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PENALTY = {"reduction": "sum", "weight_decay": 1.3}
reduced = pytest.mark.parametrize(
    "how",
    [
        *({"reduction": reduction} for reduction in ("none", "mean", "sum")),
        {"reduction": "mean", "weight_decay": 0.2},
        PENALTY,
    ],
    ids=str,
)
# one output, whose dimension target may leave out, and several
heads = pytest.mark.parametrize(("outs", "flat"), [(1, True), (1, False), (4, False)])


def make(device, dtype=torch.float64, outs=4, flat=False, rows=(7,), ins=5):
    """input, linear_weight, linear_bias, target; options."""
    shape = rows if flat else (*rows, outs)
    sizes = [(*rows, ins), (outs, ins), (outs,)]
    tensors = [torch.randn(size, dtype=torch.float64) for size in sizes]
    tensors.append(torch.rand(shape, dtype=torch.float64))
    options = {"weight": torch.rand(shape, dtype=torch.float64), "pos_weight": torch.rand(shape[-1:]).double() + 0.5}
    tensors = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
    return tensors, {name: option.to(device, dtype) for name, option in options.items()}


def ours(**options):
    def loss(input, linear_weight, linear_bias, target):
        return linear_binary_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **options)

    return loss


def eager(weight_decay=0.0, **options):
    def loss(input, linear_weight, linear_bias, target):
        logits = torch.nn.functional.linear(input, linear_weight, linear_bias).reshape(target.shape)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, **options)
        return loss + weight_decay / 2 * linear_weight.square().sum()

    return loss


def values(function, tensors, grad_output):
    """Loss and the gradients of all tensors that require one."""
    loss = function(*tensors)
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad_output.to(loss.dtype))


def upstream(reduction, target):
    return torch.randn(target.shape if reduction == "none" else (), dtype=torch.float64).to(target)


@pytest.mark.parametrize("rows", [(), (130,), (2, 3, 9)], ids=str)
@heads
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@reduced
@dtypes
def test_accuracy(device, dtype, how, weighted, bias, outs, flat, rows):
    tensors, options = make(device, dtype, outs, flat, rows, ins=33)
    if flat and not rows:
        options["pos_weight"] = options["pos_weight"].reshape(-1)[:1].reshape(())
    options = options if weighted else {}
    tensors[2] = tensors[2] if bias else None
    grad_output = upstream(how["reduction"], tensors[3])
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    exact_options = {name: option.double() for name, option in options.items()}
    found, theirs = (values(f(**how, **options), tensors, grad_output) for f in (ours, eager))
    truth = values(eager(**how, **exact_options), exact, grad_output)
    for our, their, true in zip(found, theirs, truth, strict=True):
        # Of fewer errors, or those that fewer targets have and pass on, the mean square is one of luck.
        if min(our.numel(), tensors[3].numel()) > 30:
            assert_no_less_accurate(our, their, true)
        else:
            scale = 1 + true.abs().max()
            assert (our.double() - true).abs().max() <= 16 * torch.finfo(dtype).eps * scale


def test_it_is_one_node(device):
    tensors, options = make(device)
    loss = ours(**options, **PENALTY)(*tensors)
    names = [type(node).__name__ for node, _ in loss.grad_fn.next_functions if node is not None]
    assert names == ["AccumulateGrad"] * 4


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
@reduced
def test_every_combination_of_frozen_tensors(device, how, needs):
    tensors, options = make(device)
    for tensor, needed in zip(tensors, needs, strict=True):
        tensor.requires_grad_(needed)
    grads = []
    for function in (ours, eager):
        loss = function(**how, **options)(*tensors)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward(torch.full_like(loss, -1.7))
        grads.append([tensor.grad for tensor in tensors])
        for tensor in tensors:
            tensor.grad = None
    assert [grad is not None for grad in grads[0]] == list(needs)
    for our, their in zip(*grads, strict=True):
        if our is not None:
            torch.testing.assert_close(our, their)


@heads
@reduced
def test_gradcheck(device, how, outs, flat):
    tensors, options = make(device, outs=outs, flat=flat, rows=(3,), ins=2)
    loss = ours(**how, **options)
    assert gradcheck(loss, tensors)
    assert gradgradcheck(loss, tensors)
    for frozen in range(4):
        some = [tensor.detach().requires_grad_(place != frozen) for place, tensor in enumerate(tensors)]
        assert gradgradcheck(loss, some)


@heads
def test_gradient_penalty(device, outs, flat):
    """The second backward pass through the node brings gradients of the loss and of the logits at once."""
    tensors, options = make(device, outs=outs, flat=flat)
    found = []
    for function in (ours(**options, **PENALTY), eager(**options, **PENALTY)):
        loss = function(*tensors)
        (by_input,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
        found.append(torch.autograd.grad(0.3 * loss + by_input.square().sum(), tensors))
    torch.testing.assert_close(*found)


@reduced
def test_second_backward_and_nothing_clobbered(device, how):
    tensors, options = make(device, torch.float32)
    grad_output = upstream(how["reduction"], tensors[3])
    everything = [*tensors, *options.values(), grad_output]
    before = clones(everything)
    loss = ours(**how, **options)(*tensors)
    first = torch.autograd.grad(loss, tensors, grad_output, retain_graph=True)
    second = torch.autograd.grad(loss, tensors, grad_output)
    assert_same_bits(list(first), list(second))
    assert_same_bits(before, everything)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@heads
def test_functional_transforms(device, outs, flat):
    tensors, options = make(device, outs=outs, flat=flat, rows=(3,), ins=2)
    tensors = [tensor.detach() for tensor in tensors]
    function, reference = ours(**options, **PENALTY), eager(**options, **PENALTY)
    everything = tuple(range(4))
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        expected = transform(reference, everything)(*tensors)
        torch.testing.assert_close(transform(function, everything)(*tensors), expected)
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    jvps = [torch.func.jvp(f, tuple(tensors), tangents) for f in (function, reference)]
    torch.testing.assert_close(*jvps)
    dims = (0, None, None, 0)
    rows = [torch.func.vmap(f(**PENALTY), dims)(*tensors) for f in (ours, eager)]
    torch.testing.assert_close(*rows)


@reduced
def test_vmap_over_a_backward_pass(device, how):
    tensors, options = make(device)
    grad_outputs = torch.stack([upstream(how["reduction"], tensors[3]) for _ in range(3)])

    def of_each(function):
        loss = function(**how, **options)(*tensors)
        return torch.func.vmap(lambda v: torch.autograd.grad(loss, tensors, v, retain_graph=True))(grad_outputs)

    torch.testing.assert_close(of_each(ours), of_each(eager))


@heads
@reduced
def test_compile_fullgraph(device, how, outs, flat):
    tensors, options = make(device, torch.float32, outs, flat)
    options.update(how)
    compiled = torch.compile(ours(**options), fullgraph=True)
    grad_output = upstream(how["reduction"], tensors[3])
    torch.testing.assert_close(values(compiled, tensors, grad_output), values(eager(**options), tensors, grad_output))


def test_compile_with_any_batch_size(device):
    compilations = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ours(), fullgraph=True, dynamic=True, backend=compilations)
    for batch in (3, 8, 65):
        tensors, _ = make(device, torch.float32, rows=(batch,))
        grad_output = upstream("mean", tensors[3])
        torch.testing.assert_close(values(compiled, tensors, grad_output), values(eager(), tensors, grad_output))
    assert compilations.frame_count == 1


def test_autocast(device):
    """The linear map in bfloat16, the loss in float32."""
    tensors, options = make(device, torch.float32)
    results = []
    for function in (ours, eager):
        with torch.autocast(device, torch.bfloat16):
            loss = function(**options, **PENALTY)(*tensors)
        results.append((loss.detach(), *torch.autograd.grad(loss, tensors, torch.tensor(-1.7).to(loss))))
    assert results[0][0].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_targets_and_weights_of_another_dtype(device):
    tensors, options = make(device, torch.float32)
    tensors[3] = tensors[3].detach().double().requires_grad_()
    options["pos_weight"] = torch.tensor([1, 2, 1, 3], device=device)
    grad_output = upstream("sum", tensors[3])
    found, expected = (values(f(**options, **PENALTY), tensors, grad_output) for f in (ours, eager))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_of_small_and_large_weights_in_float16(device):
    """Whose squares are 0 and infinite in this dtype, and so would be the products of its gradient."""
    input, target = torch.zeros(3, 50, device=device).half(), torch.zeros(3, 1, device=device).half()
    for size, weight_decay, upstream in ((1e-4, 1e7, 0.5), (1e3, 1e-8, 6e4)):
        weight = torch.full((1, 50), size, device=device).half().requires_grad_()
        loss = linear_binary_cross_entropy(input, weight, target, weight_decay=weight_decay)
        torch.testing.assert_close(loss.item(), math.log(2) + weight_decay / 2 * 50 * size**2, rtol=2e-3, atol=0.0)
        loss.backward(torch.tensor(upstream).to(loss))
        expected = torch.full((1, 50), upstream * weight_decay * size).to(weight)
        torch.testing.assert_close(weight.grad, expected, rtol=2e-3, atol=0.0)


def test_weight_decay_of_no_samples(device):
    """Nothing is left of the sum but the penalty."""
    tensors, _ = make(device, rows=(0,))
    loss, _, by_weight, *_ = values(ours(**PENALTY), tensors, torch.tensor(-1.7))
    torch.testing.assert_close(loss, 0.65 * tensors[1].detach().square().sum())
    torch.testing.assert_close(by_weight, -1.7 * 1.3 * tensors[1].detach(), check_dtype=False)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"target": torch.rand(7)}, ValueError, r"expected target of shape \(7, 4\), got \(7,\)"),
        ({"target": torch.rand(6, 4)}, ValueError, r"expected target of shape \(7, 4\), got \(6, 4\)"),
        (
            {"linear_weight": torch.rand(1, 5), "target": torch.rand(6)},
            ValueError,
            r"expected target of shape \(7, 1\), got \(6,\)",
        ),
        ({"target": torch.rand(7, 4) > 0.5}, NotImplementedError, "expected target of a floating-point dtype"),
        ({"target": torch.ones(7, 4).long()}, RuntimeError, "expected target of the dtype of input, Float, got Long"),
        (
            {"linear_weight": torch.rand(5)},
            RuntimeError,
            r"expected linear_weight of shape \(out_features, in_features\), got \(5,\)",
        ),
        (
            {"linear_weight": torch.rand(4, 6)},
            RuntimeError,
            r"expected weight of shape \(out_features, 5\), got \(4, 6\)",
        ),
        ({"linear_bias": torch.rand(3)}, RuntimeError, r"expected bias of shape \(4,\), got \(3,\)"),
        ({"weight": torch.rand(3)}, RuntimeError, r"expected weight that broadcasts to .* \(7, 4\), got \(3,\)"),
        ({"pos_weight": torch.rand(4).requires_grad_()}, RuntimeError, "expected pos_weight not to require grad"),
        ({"weight_decay": -0.1}, ValueError, "expected weight_decay to be finite and at least 0, got -0.1"),
        ({"weight_decay": math.inf}, ValueError, "expected weight_decay to be finite and at least 0, got inf"),
        ({"weight_decay": math.nan}, ValueError, "expected weight_decay to be finite and at least 0, got nan"),
        (
            {"weight_decay": 0.1, "reduction": "none"},
            ValueError,
            "expected reduction mean or sum with weight_decay, .*, got none",
        ),
        ({"reduction": "avg"}, ValueError, "expected reduction to be one of none, mean, sum, got 'avg'"),
    ],
)
def test_errors(change, error, sentence):
    good = {"input": torch.randn(7, 5), "linear_weight": torch.randn(4, 5), "target": torch.rand(7, 4)}
    assert linear_binary_cross_entropy(**good).shape == ()
    with pytest.raises(error, match=sentence):
        linear_binary_cross_entropy(**{**good, **change})
