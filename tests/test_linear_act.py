"""csrc/{cpu,cuda}/linear_act and torch_mlp/ops/linear_act.py."""

from itertools import product

import pytest
import torch
from conftest import DIFFERENTIABLE, DTYPES, EAGER, assert_no_less_accurate, assert_same_bits
from torch.autograd import gradcheck, gradgradcheck

from torch_mlp.functional import ACTIVATIONS, linear_act, linear_sigmoid

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
differentiable = pytest.mark.parametrize("activation", DIFFERENTIABLE)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def eager(input, weight, bias, activation):
    return EAGER[activation](torch.nn.functional.linear(input, weight, bias))


def make(device, dtype=torch.float64, lead=(7,), ins=5, outs=4, bias=True, requires_grad=True):
    """input, weight and, where wanted, bias."""
    shapes = [(*lead, ins), (outs, ins)] + [(outs,)] * bias
    tensors = [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def gradients(function, tensors, grad_output):
    return torch.autograd.grad(function(*tensors), tensors, grad_output)


def test_table_is_complete():
    assert set(ACTIVATIONS) == set(EAGER)


def gradients_with_graph(function, tensors, grad_output):
    return torch.autograd.grad(function(*tensors), tensors, grad_output, create_graph=True)


# (67, 300): tails of any vector width; (300, 4100): several cache blocks; (5000, 40): several blocks of the bias sum.
# All have enough elements that the errors do not compare by luck.
shapes = pytest.mark.parametrize(("batch", "outs"), [(1, 600), (600, 1), (67, 300), (300, 4100), (5000, 40)])


@shapes
@differentiable
@dtypes
def test_accuracy(device, dtype, activation, batch, outs):
    ins = 19
    input, weight, bias = make(device, dtype, (batch,), ins, outs)
    grad_output = torch.randn(batch, outs, dtype=torch.float64).to(device, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (input, weight, bias)]
    truth = eager(*exact, activation)
    assert_no_less_accurate(
        linear_act(input, weight, bias, activation), eager(input, weight, bias, activation), truth.detach()
    )

    def gradients_of_input_and_output(function, tensors, grad_output):
        # The bias as the weight of one more feature: of one output it is one number, whose error is a matter of luck.
        grad_input, grad_weight, grad_bias = gradients(lambda *t: function(*t, activation), tensors, grad_output)
        return grad_input, torch.cat((grad_weight, grad_bias[:, None]), 1)

    ours = gradients_of_input_and_output(linear_act, [input, weight, bias], grad_output)
    theirs = gradients_of_input_and_output(eager, [input, weight, bias], grad_output)
    exact_gradients = gradients_of_input_and_output(eager, exact, grad_output.double())
    for our, their, true in zip(ours, theirs, exact_gradients, strict=True):
        assert_no_less_accurate(our, their, true)


@pytest.mark.parametrize(("batch", "ins", "outs"), [(64, 96, 130), (1, 34, 200), (200, 600, 1), (100, 300, 600)])
@differentiable
def test_accuracy_of_bfloat16(device, activation, batch, ins, outs):
    """Of an even number of features, as the kernels want them, and of sums longer than theirs of one part."""
    tensors = make(device, torch.bfloat16, (batch,), ins, outs)
    with torch.no_grad():
        tensors[1] *= ins**-0.5
    grad_output = torch.randn(batch, outs, dtype=torch.float64).to(device, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def values(function, tensors):
        output = function(*tensors, activation)
        return output.detach(), *torch.autograd.grad(output, tensors, grad_output.to(output.dtype))

    ours, theirs, truths = values(linear_act, tensors), values(eager, tensors), values(eager, exact)
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        assert_no_less_accurate(our, their, truth)
    assert_same_bits(ours, values(linear_act, tensors))
    # Each gradient is the same whichever others are wanted.
    backward = torch.ops.torch_mlp._linear_act_backward
    for needs in product([False, True], repeat=3):
        grads = backward(grad_output, *tensors[:2], ours[0], activation, *needs)
        for grad, needed, our in zip(grads, needs, ours[1:], strict=True):
            assert torch.equal(grad, our) if needed else grad.numel() == 0


@pytest.mark.parametrize("bias", [True, False])
@shapes
@dtypes
def test_step_of_exact_sums(device, dtype, batch, outs, bias):
    """Of small integers, whose sums have no rounding errors in any dtype and are often 0, where step jumps."""
    shapes = [(batch, 19), (outs, 19)] + [(outs,)] * bias
    exact = [torch.randint(-2, 3, shape, dtype=torch.float64) for shape in shapes]
    z = torch.nn.functional.linear(*exact)
    assert (z == 0).any()
    output = linear_act(*(tensor.to(device, dtype) for tensor in exact), activation="step")
    assert torch.equal(output.cpu(), (z >= 0).to(dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (2, 3), (1, 2, 2)], ids=str)
@differentiable
def test_gradcheck_of_leading_dimensions(device, activation, lead, bias):
    tensors = make(device, lead=lead, bias=bias)
    assert gradcheck(lambda *t: linear_act(*t, activation=activation), tensors, nondet_tol=0.0)
    assert gradgradcheck(lambda *t: linear_act(*t, activation=activation), tensors, nondet_tol=0.0)


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3))[1:], ids=str)
@differentiable
def test_every_combination_of_requires_grad(device, activation, needs):
    tensors = make(device, requires_grad=False)
    for tensor, needed in zip(tensors, needs, strict=True):
        tensor.requires_grad_(needed)
    wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
    grad_output = torch.randn(7, 4, dtype=torch.float64, device=device)

    def first_and_second(function):
        output = function(*tensors, activation)
        first = torch.autograd.grad(output, wanted, grad_output, create_graph=True)
        mixed = sum((grad * torch.arange(1.0, grad.numel() + 1, device=device).view_as(grad)).sum() for grad in first)
        second = torch.autograd.grad(mixed, wanted, allow_unused=True) if mixed.requires_grad else [None] * len(wanted)
        # "Not a function of this input" is as good an answer as zero.
        return [
            *first,
            *(torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, second, strict=True)),
        ]

    for ours, theirs in zip(first_and_second(linear_act), first_and_second(eager), strict=True):
        torch.testing.assert_close(ours, theirs)


def strided(tensor, how):
    """The same values in another layout."""
    if how == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if how == "every other":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    return torch.cat([torch.full_like(tensor, torch.nan), tensor])[len(tensor) :]  # "offset"


@pytest.mark.parametrize("how", ["transposed", "every other", "offset"])
@pytest.mark.parametrize("lead", [(6,), (2, 3)], ids=str)
@activations
def test_layouts(device, activation, lead, how):
    tensors = make(device, lead=lead, requires_grad=False)
    grad_output = torch.randn(*lead, 4, dtype=torch.float64, device=device)
    views = [strided(tensor, how).requires_grad_() for tensor in tensors]
    torch.testing.assert_close(linear_act(*views, activation), eager(*tensors, activation))
    if activation not in DIFFERENTIABLE:
        return
    expected = gradients(lambda *t: eager(*t, activation), [t.requires_grad_() for t in tensors], grad_output)
    ours = gradients(lambda *t: linear_act(*t, activation), views, strided(grad_output, how))
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their)


@differentiable
def test_stride_zero(device, activation):
    """Expanded operands, and the expanded gradient that sum() sends back."""
    row, weight, bias = make(device, lead=(1,))
    tensors = [row.expand(7, 5), weight[:1].expand(4, 5), bias[:1].expand(4)]
    ours = gradients(lambda *t: linear_act(*t, activation).sum(), tensors, torch.tensor(3.0, device=device).double())
    theirs = gradients(lambda *t: eager(*t, activation).sum(), tensors, torch.tensor(3.0, device=device).double())
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize(("batch", "ins", "outs"), [(0, 5, 4), (7, 0, 4), (7, 5, 0), (0, 0, 0)])
@activations
def test_zero_sizes(device, activation, batch, ins, outs):
    tensors = make(device, lead=(batch,), ins=ins, outs=outs)
    output = linear_act(*tensors, activation)
    torch.testing.assert_close(output, eager(*tensors, activation))
    if activation not in DIFFERENTIABLE:
        return
    grad_output = torch.randn_like(output)
    ours = gradients(lambda *t: linear_act(*t, activation), tensors, grad_output)
    theirs = gradients(lambda *t: eager(*t, activation), tensors, grad_output)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@activations
@dtypes
def test_nan_and_infinity(device, dtype, activation):
    # From -88.7 on torch's float32 sigmoid is 0; ours has the subnormal numbers down to -103.
    values = [torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 0.0, -0.0, 88.8, -87.2]
    input = torch.tensor(values, device=device, dtype=dtype).unsqueeze(1).requires_grad_()
    weight = torch.ones(1, 1, device=device, dtype=dtype)
    torch.testing.assert_close(
        linear_act(input, weight, None, activation), eager(input, weight, None, activation), equal_nan=True
    )
    for grad_value in (1.5, torch.inf, torch.nan) if activation in DIFFERENTIABLE else ():
        grad_output = torch.full_like(input, grad_value)
        (ours,) = gradients(lambda i: linear_act(i, weight, None, activation), [input], grad_output)
        (theirs,) = gradients(lambda i: eager(i, weight, None, activation), [input], grad_output)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@activations
@dtypes
def test_table_at_nan_and_infinity(device, dtype, activation):
    """What stands for the kernels in transforms."""
    z = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0, -2.0, 0.0, -0.0], device=device, dtype=dtype)
    torch.testing.assert_close(ACTIVATIONS[activation].forward(z), EAGER[activation](z), equal_nan=True)


@differentiable
def test_thread_counts_give_the_same_bias_gradient(activation):
    """A sum in the order of arrival, or in blocks as many as threads, shows here."""
    input, weight, _ = make("cpu", torch.float32, (10_000,), 3, 33, requires_grad=False)
    output, grad_output = linear_act(input, weight, None, activation), torch.randn(10_000, 33)
    backward, before = torch.ops.torch_mlp._linear_act_backward, torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            sums.append(backward(grad_output, input, weight, output, activation, False, False, True)[2])
    finally:
        torch.set_num_threads(before)
    assert_same_bits([sums[0]] * 3, sums[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@differentiable
def test_16_bit_double_backward(device, activation, dtype):
    tensors = make(device, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    grad_output = torch.randn(7, 4, dtype=torch.float64).to(device, dtype)

    def second(function, tensors):
        first = gradients_with_graph(lambda *t: function(*t, activation), tensors, grad_output.to(tensors[0].dtype))
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), tensors, allow_unused=True)

    for ours, truth in zip(second(linear_act, tensors), second(eager, exact), strict=True):
        if truth is not None:
            torch.testing.assert_close(ours.double(), truth, rtol=0.1, atol=0.1 * truth.abs().max().item())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w, b: (x, w[:, :3], b), r"linear_act: expected weight of shape \(out_features, 5\), got \(4, 3\)"),
        (lambda x, w, b: (x, w[0], b), r"linear_act: expected weight of shape \(out_features, 5\), got \(5,\)"),
        (lambda x, w, b: (x, w, b[:3]), r"linear_act: expected bias of shape \(4,\), got \(3,\)"),
        (lambda x, w, b: (x, w, b[None]), r"linear_act: expected bias of shape \(4,\), got \(1, 4\)"),
        (lambda x, w, b: (x, w.float(), b), "linear_act: expected weight of the dtype of input, Double, got Float"),
        (lambda x, w, b: (x, w, b.half()), "linear_act: expected bias of the dtype of input, Double, got Half"),
        (lambda x, w, b: (x[0, 0], w, b), r"linear_act: expected input of shape \(\*, in_features\), got a scalar"),
        (
            lambda x, w, b: (x.long(), w.long(), b.long()),
            "linear_act: expected input of dtype Double, Float, BFloat16 or Half, got Long",
        ),
    ],
)
def test_errors(device, change, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        linear_act(*change(*make(device, requires_grad=False)))


def test_unknown_activation(device):
    tensors = make(device, requires_grad=False)
    sentence = "linear_act: expected activation to be one of identity, sigmoid, tanh, relu, step, got 'gelu'"
    with pytest.raises(ValueError, match=sentence):
        linear_act(*tensors, "gelu")
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.torch_mlp.linear_act(*tensors, "gelu")


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_two_devices(device):
    input, weight, bias = make(device, requires_grad=False)
    with pytest.raises(RuntimeError, match="linear_act: expected weight on the device of input, cuda:0, got cpu"):
        linear_act(input, weight.cpu(), bias)


def test_backward_op_checks_its_arguments(device):
    input, weight, _ = make(device, requires_grad=False)
    backward, output = torch.ops.torch_mlp._linear_act_backward, torch.rand(7, 4, dtype=torch.float64, device=device)
    sentence = r"_linear_act_backward: expected grad_output of shape \(7, 4\), got \(7, 3\)"
    with pytest.raises(RuntimeError, match=sentence):
        backward(output[:, :3], input, weight, output, "sigmoid", True, True, True)
    with pytest.raises(RuntimeError, match=r"_linear_act_backward: expected output of shape \(7, 4\), got \(6, 4\)"):
        backward(output, input, weight, output[:6], "sigmoid", True, True, True)


def test_too_large_for_memory_is_an_error():
    huge = torch.ones(1, 1).expand(2**40, 1)
    with pytest.raises(RuntimeError, match=r"alloc|memory"):
        linear_act(huge, torch.ones(2**20, 1))


def test_linear_sigmoid_is_linear_act_with_sigmoid(device):
    tensors = make(device)
    assert_same_bits([linear_sigmoid(*tensors).detach()], [linear_act(*tensors, "sigmoid")])
    assert_same_bits([linear_sigmoid(*tensors[:2]).detach()], [linear_act(*tensors[:2], activation="sigmoid")])
