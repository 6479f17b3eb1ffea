"""torch_mlp/nn/linear.py."""

import inspect

import pytest
import torch
from conftest import DIFFERENTIABLE, EAGER, assert_no_less_accurate

from torch_mlp.functional import ACTIVATIONS
from torch_mlp.nn import LinearAct, LinearSigmoid


def test_signature_begins_with_that_of_linear():
    def parameters(layer):
        return [(p.name, p.default) for p in inspect.signature(layer).parameters.values()]

    assert parameters(LinearSigmoid) == parameters(torch.nn.Linear)
    assert parameters(LinearAct) == [*parameters(torch.nn.Linear), ("activation", "sigmoid")]


@pytest.mark.parametrize("bias", [True, False])
def test_initialisation_and_state_dict_are_those_of_linear(bias):
    torch.manual_seed(3)
    ours = LinearSigmoid(5, 4, bias=bias)
    torch.manual_seed(3)
    stock = torch.nn.Linear(5, 4, bias=bias)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    stock.load_state_dict({name: value + 1 for name, value in ours.state_dict().items()})
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours.weight, stock.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_module_is_linear_and_activation(device, activation, bias, dtype):
    layer = LinearAct(5, 4, bias, device, dtype, activation)
    stock = torch.nn.Linear(5, 4, bias, device, dtype)
    stock.load_state_dict(layer.state_dict())
    exact = torch.nn.Linear(5, 4, bias, device, torch.float64)
    exact.load_state_dict(layer.state_dict())
    input = torch.randn(2, 3, 5, device=device, dtype=dtype)
    outputs = [layer(input), EAGER[activation](stock(input)), EAGER[activation](exact(input.double()))]
    torch.testing.assert_close(*outputs[:2])
    if activation not in DIFFERENTIABLE:
        return
    grad_output = torch.randn_like(input[..., :4])
    grads = [
        torch.autograd.grad(output, list(module.parameters()), grad_output.to(output.dtype))
        for output, module in zip(outputs, (layer, stock, exact), strict=True)
    ]
    for our, their, truth in zip(*grads, strict=True):
        assert_no_less_accurate(our, their, truth)


def test_state_dicts_move_both_ways_with_a_stock_sequential():
    ours = torch.nn.Sequential(LinearSigmoid(5, 4), LinearAct(4, 3, activation="identity"))
    stock = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    input = torch.randn(6, 5)
    torch.testing.assert_close(ours(input), stock[1](torch.sigmoid(stock[0](input))))


def test_repr():
    assert repr(LinearSigmoid(2, 3, bias=False)) == "LinearSigmoid(in_features=2, out_features=3, bias=False)"
    assert repr(LinearAct(2, 3)) == "LinearAct(in_features=2, out_features=3, bias=True, activation=sigmoid)"


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"LinearAct: expected activation to be one of identity, .*, got 'gelu'"):
        LinearAct(2, 3, activation="gelu")
