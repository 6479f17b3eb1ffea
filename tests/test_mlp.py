"""csrc/mlp.cpp, torch_mlp/ops/mlp.py and the functions mlp and mlp_cross_entropy."""

import itertools

import pytest
import torch
from conftest import DIFFERENTIABLE, DTYPES, EAGER, assert_no_less_accurate, assert_same_bits

from torch_mlp import nn
from torch_mlp.functional import linear_act, mlp, mlp_cross_entropy

WIDTHS = (5, 6, 4, 3)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(device, dtype=torch.float64, widths=WIDTHS, batch=7, bias=True):
    """Input and parameters: weight, bias, weight, bias, ..."""
    tensors = [torch.randn(batch, widths[0], dtype=torch.float64)]
    for ins, outs in itertools.pairwise(widths):
        tensors += [torch.randn(outs, ins, dtype=torch.float64) / ins**0.5]
        tensors += [torch.randn(outs, dtype=torch.float64)] if bias else []
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def split(parameters, bias=True):
    return (parameters[::2], parameters[1::2]) if bias else (parameters, [None] * len(parameters))


def ours(activation, bias=True):
    return lambda input, *parameters: mlp(input, *split(parameters, bias), activation)


def eager(activation, bias=True):
    def function(input, *parameters):
        weights, biases = split(parameters, bias)
        for place, (weight, b) in enumerate(zip(weights, biases, strict=True)):
            input = torch.nn.functional.linear(input, weight, b)
            input = EAGER[activation](input) if place + 1 < len(weights) else input
        return input

    return function


def with_loss(activation, target, **options):
    return lambda input, *parameters: mlp_cross_entropy(input, *split(parameters), target, activation, **options)


def eager_with_loss(activation, target, **options):
    network = eager(activation)
    return lambda *tensors: torch.nn.functional.cross_entropy(network(*tensors), target, **options)


def check_against_float64(function, reference, tensors):
    """Value and gradients for an upstream gradient that is not 1."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    truth = reference(*exact)
    grad_output = torch.randn_like(truth)
    value, eager_value = function(*tensors), reference(*tensors)
    assert_no_less_accurate(value.detach(), eager_value.detach(), truth.detach())
    grads = [
        torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
        for output, inputs in ((value, tensors), (eager_value, tensors), (truth, exact))
    ]
    for ours_, theirs, true in zip(*grads, strict=True):
        assert_no_less_accurate(ours_, theirs, true)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(20, 30), (33, 70, 10), (20, 40, 30, 5)], ids=str)
@pytest.mark.parametrize("activation", DIFFERENTIABLE)
@dtypes
def test_accuracy(device, dtype, activation, widths, bias):
    tensors = make(device, dtype, widths, 130, bias)
    check_against_float64(ours(activation, bias), eager(activation, bias), tensors)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_accuracy_with_loss(device, dtype, reduction, label_smoothing, weighted):
    tensors = make(device, dtype, (33, 70, 10), 130)
    target = torch.randint(10, (130,), device=device)
    target[::9] = -100
    weight = torch.rand(10, dtype=torch.float64, device=device)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}

    def eager_loss(*inputs):
        class_weight = weight.to(inputs[0].dtype) if weighted else None
        return eager_with_loss("tanh", target, weight=class_weight, **options)(*inputs)

    our_weight = weight.to(dtype) if weighted else None
    check_against_float64(with_loss("tanh", target, weight=our_weight, **options), eager_loss, tensors)


def test_leading_dimensions(device):
    _, *parameters = make(device)
    batch = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    expected = eager("tanh")(batch, *parameters)
    torch.testing.assert_close(mlp(batch, *split(parameters), "tanh"), expected)
    torch.testing.assert_close(mlp(batch[0, 0], *split(parameters), "tanh"), expected[0, 0])
    assert mlp(batch[:0], *split(parameters), "tanh").shape == (0, 3, 3)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=str)
def test_every_combination_of_frozen_tensors(device, needs):
    tensors = make(device, widths=(5, 4, 3))
    for tensor, needed in zip(tensors, needs, strict=True):
        tensor.requires_grad_(needed)
    target = torch.randint(3, (7,), device=device)
    for function, reference in (
        (ours("sigmoid"), eager("sigmoid")),
        (with_loss("sigmoid", target), eager_with_loss("sigmoid", target)),
    ):
        grads = []
        for network in (function, reference):
            output = network(*tensors)
            assert output.requires_grad == any(needs)
            if any(needs):
                (output.sum() * 1.7).backward()
            grads.append([tensor.grad for tensor in tensors])
            for tensor in tensors:
                tensor.grad = None
        for grad, expected in zip(*grads, strict=True):
            assert (grad is None) == (expected is None)
            if grad is not None:
                torch.testing.assert_close(grad, expected)


def test_as_layer_by_layer(device):
    """The same kernels as linear_act: the same bits."""
    input, *parameters = make(device, torch.float32, (40, 30, 20, 10), 65)
    weights, biases = split(parameters)
    hidden = input
    for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = linear_act(hidden, weight, bias, "identity" if place == 2 else "relu")
    output = mlp(input, weights, biases, "relu")
    assert torch.equal(output, hidden)
    grad_output = torch.randn_like(output)
    assert_same_bits(
        torch.autograd.grad(output, [input, *parameters], grad_output),
        torch.autograd.grad(hidden, [input, *parameters], grad_output),
    )


@dtypes
def test_xor_by_hand(device, dtype):
    """Or and not-and in the hidden layer, and of both in the next: no weight of it was learned."""
    input = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=device, dtype=dtype)
    weights = [[[1, 1], [-1, -1]], [[1, 1]], [[1]]]
    biases = [[-0.5, 1.5], [-1.5], [0]]
    weights, biases = ([torch.tensor(rows, device=device, dtype=dtype) for rows in of] for of in (weights, biases))
    assert mlp(input, weights, biases, "step").flatten().tolist() == [0, 1, 1, 0]


def test_gradients_behind_the_steps(device):
    """The last layer can be trained on what frozen steps give it: no gradient goes through them."""
    tensors = make(device, widths=(5, 6, 3))
    target = torch.randint(3, (7,), device=device)
    for tensor in tensors[:3]:
        tensor.requires_grad_(False)
    pairs = [(ours("step"), eager("step")), (with_loss("step", target), eager_with_loss("step", target))]
    for function, reference in pairs:
        output = function(*tensors)
        grad_output = torch.randn_like(output)
        found, expected = (torch.autograd.grad(f(*tensors), tensors[3:], grad_output) for f in (function, reference))
        torch.testing.assert_close(found, expected)


def test_loss_of_the_module(device):
    model = nn.MLP(5, [6, 4], 3).to(device)
    input, target = torch.randn(7, 5, device=device), torch.randint(3, (7,), device=device)
    loss = model.loss(input, target, label_smoothing=0.1)
    expected = torch.nn.functional.cross_entropy(model(input), target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss * 1.7, list(model.parameters())),
        torch.autograd.grad(expected * 1.7, list(model.parameters())),
    )


def test_layers_of_a_module_that_do_more_are_called():
    model = nn.MLP(5, [4], 3)
    input, target = torch.randn(7, 5), torch.randint(3, (7,))
    expected = model.loss(input, target)
    calls = []
    handle = next(model.children()).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model.loss(input, target), expected)
    model(input)
    assert len(calls) == 2
    handle.remove()
    model.add_module("0", torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh()))
    assert model(input).shape == (7, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (
            {"activation": "gelu"},
            ValueError,
            "expected activation to be one of identity, sigmoid, tanh, relu, step, got 'gelu'",
        ),
        ({"weights": []}, ValueError, "expected a weight and a bias, or None, for each layer, got 0 and 2"),
        ({"biases": [None]}, ValueError, "expected a weight and a bias, or None, for each layer, got 2 and 1"),
        ({"input": torch.randn(7, 4)}, RuntimeError, r"expected weight of shape \(out_features, 4\), got \(4, 5\)"),
        ({"biases": [None, torch.randn(4)]}, RuntimeError, r"expected bias of shape \(3,\), got \(4,\)"),
        (
            {"input": torch.randn(7, 5).double()},
            RuntimeError,
            "expected weight of the dtype of input, Double, got Float",
        ),
    ],
)
def test_errors(arguments, error, sentence):
    good = {"input": torch.randn(7, 5), "weights": [torch.randn(4, 5), torch.randn(3, 4)], "biases": [None, None]}
    with pytest.raises(error, match=sentence):
        mlp(**{**good, **arguments})
    with pytest.raises(error, match=sentence):
        mlp_cross_entropy(target=torch.zeros(7, dtype=torch.int64), **{**good, **arguments})


def test_errors_of_the_loss():
    input, *parameters = make("cpu", torch.float32)
    with pytest.raises(IndexError, match=r"expected target in \[0, 3\) or ignore_index -100, got 3 at position 2"):
        mlp_cross_entropy(input, *split(parameters), torch.tensor([0, 1, 3, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="mlp_cross_entropy: expected reduction to be one of none, mean, sum"):
        mlp_cross_entropy(input, *split(parameters), torch.zeros(7, dtype=torch.int64), reduction="max")
    with pytest.raises(RuntimeError, match="mlp_cross_entropy: expected target to hold class indices"):
        mlp_cross_entropy(input, *split(parameters), torch.rand(7))
    probabilities = torch.rand(7, 3)
    torch.testing.assert_close(
        mlp_cross_entropy(input, *split(parameters), probabilities),
        torch.nn.functional.cross_entropy(mlp(input, *split(parameters)), probabilities),
    )
