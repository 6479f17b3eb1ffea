"""csrc/{cpu,cuda}/cross_entropy_probabilities and torch_mlp/ops/cross_entropy_probabilities.py."""

import pytest
import torch
from conftest import DTYPES, assert_no_less_accurate, assert_same_bits, clones
from torch.autograd import gradcheck, gradgradcheck

from torch_mlp.functional import cross_entropy

eager = torch.nn.functional.cross_entropy
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
smoothings = pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
weights = pytest.mark.parametrize("weighted", [False, True])


def make(device, dtype=torch.float64, shape=(7, 5), weighted=True):
    """input, target (of which one row has the sum 0, and the others not all 1) and weight."""
    input = (3 * torch.randn(shape, dtype=torch.float64)).to(device, dtype).requires_grad_()
    target = torch.rand(shape, dtype=torch.float64)
    target[:1] = 0
    weight = torch.rand(shape[1], dtype=torch.float64).to(device, dtype) if weighted else None
    return input, target.to(device, dtype).requires_grad_(), weight


def results(function, input, target, weight, grad_output, **options):
    """Loss and the gradients of input and target."""
    loss = function(input, target, weight, **options)
    return loss.detach(), *torch.autograd.grad(loss, (input, target), grad_output)


def upstream(loss_like):
    return torch.randn(loss_like.shape, dtype=torch.float64).to(loss_like)


@pytest.mark.parametrize("shape", [(3, 1), (64, 10), (9, 67), (2, 3000), (40, 17)], ids=str)
@weights
@smoothings
@reductions
@dtypes
def test_accuracy(device, dtype, reduction, label_smoothing, weighted, shape):
    tensors = make(device, dtype, shape, weighted)
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    grad_output = upstream(eager(*tensors, **options).detach())
    ours, theirs = (results(f, *tensors, grad_output, **options) for f in (cross_entropy, eager))
    truths = results(eager, *exact, grad_output.double(), **options)
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        if truth.dim():
            assert_no_less_accurate(our, their, truth)
        else:  # between two single numbers luck decides
            units = 128 if dtype == torch.float64 else 1  # in float64 the truth has errors of its own
            torch.testing.assert_close(our.double(), truth, rtol=units * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("classes", [10, 1100])
def test_more_rows_than_blocks(device, classes):
    """Of a grid, whose blocks then take more than one; with few classes, rows for several blocks."""
    *tensors, _ = make(device, torch.float32, (4100, classes))
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    grad_output = torch.tensor(0.7, device=device)
    ours = results(cross_entropy, *tensors, None, grad_output, reduction="sum")
    truths = results(eager, *exact, None, grad_output.double(), reduction="sum")
    for our, truth in zip(ours, truths, strict=True):
        torch.testing.assert_close(our.double(), truth, rtol=2e-6, atol=1e-7 * float(truth.abs().max()))


@weights
@smoothings
@reductions
def test_gradcheck(device, reduction, label_smoothing, weighted):
    input, target, weight = make(device, weighted=weighted)

    def loss(input, target):
        return cross_entropy(input, target, weight, reduction=reduction, label_smoothing=label_smoothing)

    assert gradcheck(loss, (input, target), nondet_tol=0.0)
    assert gradgradcheck(loss, (input, target), nondet_tol=0.0)


def test_weight_may_require_grad(device):
    input, target, weight = make(device)
    weight.requires_grad_()
    assert gradcheck(lambda weight: cross_entropy(input, target, weight, label_smoothing=0.2), weight)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 3), (2, 5, 3, 4), (0, 5), (2, 0), (2, 5, 0)], ids=str)
@reductions
def test_shapes(device, reduction, shape):
    input, target, _ = make(device, shape=shape, weighted=False)
    expected = eager(input, target, reduction=reduction)
    torch.testing.assert_close(cross_entropy(input, target, reduction=reduction), expected, equal_nan=True)
    if input.numel():
        grad_output = upstream(expected.detach())
        ours, theirs = (
            results(f, input, target, None, grad_output, reduction=reduction) for f in (cross_entropy, eager)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("pair", [(torch.float32, torch.float64), (torch.float32, torch.float16)], ids=str)
def test_dtypes_are_promoted(device, pair):
    input, target, _ = make(device, torch.float32)
    with torch.no_grad():
        input, target = input.to(pair[0]).requires_grad_(), target.to(pair[1]).requires_grad_()
    grad_output = torch.tensor(0.7, device=device, dtype=eager(input, target).dtype)
    ours, theirs = (results(f, input, target, None, grad_output) for f in (cross_entropy, eager))
    torch.testing.assert_close(ours, theirs)


def test_one_hot_is_the_class(device):
    input, _, weight = make(device)
    classes = torch.randint(5, (7,), device=device)
    target = torch.nn.functional.one_hot(classes, 5).double()
    for reduction in ("none", "sum"):
        ours, theirs = (
            cross_entropy(input, y, weight, reduction=reduction, label_smoothing=0.1) for y in (target, classes)
        )
        torch.testing.assert_close(ours, theirs)


def test_infinite_and_nan_logits(device):
    rows = [[0.0, -torch.inf, 1.0], [torch.inf, 0.0, 1.0], [torch.nan, 0.0, 1.0], [1e4, 2.0, 3.0]]
    input = torch.tensor(rows, device=device, requires_grad=True)
    target = torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.1, 0.0, 0.9]], device=device)
    ours, theirs = (f(input, target, reduction="none") for f in (cross_entropy, eager))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("logit", [0.7, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("probability", [0.4, torch.nan, torch.inf])
@dtypes
def test_one_class_alone(device, dtype, logit, probability):
    """It has no gradient, exactly, but NaN where torch's is."""
    input, target = (torch.tensor([[value]], device=device, dtype=dtype) for value in (logit, probability))
    grad_output = torch.tensor(0.7, device=device, dtype=dtype)
    tensors = input.requires_grad_(), target.requires_grad_(), None, grad_output
    ours, theirs = (results(f, *tensors, reduction="sum") for f in (cross_entropy, eager))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("how", ["transposed", "every other", "expanded"])
def test_layouts(device, how):
    values = torch.randn(6, 5, dtype=torch.float64, device=device)
    views = {
        "transposed": values.mT.contiguous().mT,
        "every other": torch.stack([values, torch.full_like(values, torch.nan)], -1)[..., 0],
        "expanded": values[:1].expand(6, 5),
    }
    input, target = views[how].requires_grad_(), views[how].detach().requires_grad_()
    grad_output = torch.randn(12, device=device, dtype=torch.float64)[::2]
    ours, theirs = (results(f, input, target, None, grad_output, reduction="none") for f in (cross_entropy, eager))
    torch.testing.assert_close(ours, theirs)


def test_each_gradient_alone_and_twice(device):
    input, target, _ = make(device)
    for one, other in ((input, target), (target, input)):
        other = other.detach()
        arguments = (one, other) if one is input else (other, one)
        loss = cross_entropy(*arguments)
        grad_output = torch.tensor(1.7, dtype=torch.float64, device=device)
        (first,) = torch.autograd.grad(loss, one, grad_output, retain_graph=True)
        (second,) = torch.autograd.grad(loss, one, -2 * grad_output)
        (expected,) = torch.autograd.grad(eager(*arguments), one, grad_output)
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(second, -2 * expected)


def test_nothing_is_clobbered(device):
    input, target, weight = make(device)
    grad_output = torch.randn(7, dtype=torch.float64, device=device)
    before = clones([input, target, weight, grad_output])
    results(cross_entropy, input, target, weight, grad_output, reduction="none", label_smoothing=0.1)
    assert_same_bits(before, [input, target, weight, grad_output])


def test_number_of_threads_does_not_change_the_bits():
    input, target, _ = make("cpu", torch.float32, (300, 1000), weighted=False)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(cross_entropy, input, target, None, torch.tensor(0.7)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert_same_bits(list(found[0]), list(other))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda x, t, w: ((x, t[:, :1], w), {}),
            "expected target to hold class indices, .* or probabilities in the shape",
        ),
        (lambda x, t, w: ((x, (t > 0.5).long(), w), {}), "expected class probabilities, since target has the shape"),
        (lambda x, t, w: ((x, t, w), {"ignore_index": 2}), "expected no ignore_index with class probabilities"),
        (lambda x, t, w: ((x, t, w[:3]), {}), r"expected weight of shape \(5,\), got \(3,\)"),
        (lambda x, t, w: ((x, t, w), {"label_smoothing": 1.5}), r"expected label_smoothing in \[0, 1\], got 1.5"),
    ],
)
def test_errors(device, change, sentence):
    arguments, options = change(*make(device))
    with pytest.raises(RuntimeError, match="cross_entropy: " + sentence):
        cross_entropy(*arguments, **options)
    with pytest.raises(RuntimeError):  # torch's is of the same class
        eager(*arguments, **options)


def test_ops_check_their_arguments(device):
    input, target, _ = (None if t is None else t.detach() for t in make(device, weighted=False))
    forward = torch.ops.torch_mlp.cross_entropy_probabilities
    backward = torch.ops.torch_mlp._cross_entropy_probabilities_backward
    for bad, sentence in (
        ((input, target[:2], "sum"), r"expected target of shape \(7, 5\), got \(2, 5\)"),
        ((input, target.float(), "sum"), "expected target of the dtype of input, Double, got Float"),
        ((input[0], target[0], "sum"), r"expected input of shape \(batch, num_classes\), got \(5,\)"),
    ):
        with pytest.raises(RuntimeError, match="cross_entropy_probabilities: " + sentence):
            forward(*bad)
    _, lse = forward(input, target, "sum")
    with pytest.raises(RuntimeError, match=r"expected grad_output of shape \(\), got \(7,\)"):
        backward(input[:, 0], None, input, target, lse, "sum", True, True)
    with pytest.raises(RuntimeError, match=r"expected lse of shape \(2, 7\), got \(2, 3\)"):
        backward(input[0, 0], None, input, target, lse[:, :3], "sum", True, True)
