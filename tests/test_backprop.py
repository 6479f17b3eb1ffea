"""torch_mlp/backprop.py."""

import math

import pytest
import torch

from torch_mlp import backprop
from torch_mlp.nn import MLP


def network(*widths, activation="sigmoid", head="binary", **options):
    return MLP(widths[0], widths[1:-1], widths[-1], activation, dtype=torch.float64, head=head, **options)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("y", [0.0, 0.3, 1.0])
def test_a_network_by_hand(y):
    """Of two inputs, two sigmoid units and one output, in Python's floats."""
    model = network(2, 2, 1)
    w11, w12, w21, w22, b1, b2, v1, v2, c = 0.4, -0.7, 1.1, 0.2, 0.3, -0.5, 0.9, -1.4, 0.6
    state = {"0.weight": [[w11, w12], [w21, w22]], "0.bias": [b1, b2], "2.weight": [[v1, v2]], "2.bias": [c]}
    model.load_state_dict({name: torch.tensor(values, dtype=torch.float64) for name, values in state.items()})
    x1, x2 = 1.5, -2.0

    z1, z2 = w11 * x1 + w12 * x2 + b1, w21 * x1 + w22 * x2 + b2
    a1, a2 = sigmoid(z1), sigmoid(z2)
    z = v1 * a1 + v2 * a2 + c
    y_hat = sigmoid(z)
    loss = -y * math.log(y_hat) - (1 - y) * math.log(1 - y_hat)
    dz = y_hat - y
    da1, da2 = dz * v1, dz * v2
    dz1, dz2 = da1 * a1 * (1 - a1), da2 * a2 * (1 - a2)
    nodes = {
        "x_1": ("", x1, dz1 * w11 + dz2 * w21),
        "x_2": ("", x2, dz1 * w12 + dz2 * w22),
        "z^1_1": ("w^1_11 x_1 + w^1_12 x_2 + b^1_1", z1, dz1),
        "z^1_2": ("w^1_21 x_1 + w^1_22 x_2 + b^1_2", z2, dz2),
        "a^1_1": ("sigmoid(z^1_1)", a1, da1),
        "a^1_2": ("sigmoid(z^1_2)", a2, da2),
        "z^2_1": ("w^2_11 a^1_1 + w^2_12 a^1_2 + b^2_1", z, dz),
        "y_hat": ("sigmoid(z^2_1)", y_hat, dz / (y_hat * (1 - y_hat))),
        "loss": ("-y log(y_hat) - (1 - y) log(1 - y_hat)", loss, 1.0),
    }
    edges = {
        ("x_1", "z^1_1"): (w11, "w^1_11", dz1 * x1),
        ("x_2", "z^1_1"): (w12, "w^1_12", dz1 * x2),
        ("1", "z^1_1"): (b1, "b^1_1", dz1),
        ("x_1", "z^1_2"): (w21, "w^1_21", dz2 * x1),
        ("x_2", "z^1_2"): (w22, "w^1_22", dz2 * x2),
        ("1", "z^1_2"): (b2, "b^1_2", dz2),
        ("z^1_1", "a^1_1"): (a1 * (1 - a1), "", 0.0),
        ("z^1_2", "a^1_2"): (a2 * (1 - a2), "", 0.0),
        ("a^1_1", "z^2_1"): (v1, "w^2_11", dz * a1),
        ("a^1_2", "z^2_1"): (v2, "w^2_12", dz * a2),
        ("1", "z^2_1"): (c, "b^2_1", dz),
        ("z^2_1", "y_hat"): (y_hat * (1 - y_hat), "", 0.0),
        ("y_hat", "loss"): (dz / (y_hat * (1 - y_hat)), "", 0.0),
    }

    graph = backprop.trace(model, torch.tensor([x1, x2], dtype=torch.float64), y)
    assert [column.title for column in graph.columns] == [
        "input",
        "linear map",
        "sigmoid",
        "linear map",
        "sigmoid",
        f"cross-entropy, y = {y:g}",
    ]
    assert list(graph.nodes) == list(nodes)
    for name, formula, value, gradient in graph.nodes.values():
        assert formula == nodes[name][0]
        assert (value, gradient) == pytest.approx(nodes[name][1:], rel=1e-13)
    assert [(edge.source, edge.target) for edge in graph.edges] == list(edges)
    for source, target, derivative, weight, gradient in graph.edges:
        expected = edges[source, target]
        assert weight == expected[1]
        assert (derivative, gradient) == pytest.approx((expected[0], expected[2]), rel=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("widths", "activation", "head"),
    [((1, 1), "sigmoid", "binary"), ((3, 4, 2, 1), "tanh", "regression"), ((2, 11, 1), "relu", "binary")],
)
def test_any_network_as_its_own_loss_and_the_chain_rule(widths, activation, head, bias):
    model = network(*widths, activation=activation, head=head, bias=bias)
    input = torch.randn(widths[0], dtype=torch.float64)
    graph = backprop.trace(model, input, 1.0)
    nodes = graph.nodes

    leaf = input.clone().requires_grad_()
    loss = model.loss(leaf, torch.ones(1, dtype=torch.float64))
    grads = torch.autograd.grad(loss, [leaf, *model.parameters()])
    assert nodes["loss"].value == pytest.approx(loss.item(), rel=1e-13)
    assert [node.gradient for node in graph.columns[0].nodes] == pytest.approx(grads[0].tolist(), rel=1e-12)
    # A row of edges into each unit: its weights, then its bias.
    rows = [tensor.reshape(len(tensor), -1) for tensor in grads[1:]]
    layers = [torch.cat(rows[i : i + 1 + bias], dim=1) for i in range(0, len(rows), 1 + bias)]
    weighted = [edge for edge in graph.edges if edge.weight]
    expected = torch.cat([layer.flatten() for layer in layers]).tolist()
    assert [edge.gradient for edge in weighted] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert len({edge.weight for edge in weighted}) == len(weighted) == model.num_parameters()

    for node in nodes.values():
        leaving = [edge for edge in graph.edges if edge.source == node.name]
        by_hand = sum(edge.derivative * nodes[edge.target].gradient for edge in leaving) if leaving else 1.0
        assert node.gradient == pytest.approx(by_hand, rel=1e-12, abs=1e-15)


def test_the_model_stays_as_it_is():
    model = network(2, 2, 1)
    model.loss(torch.ones(1, 2).double(), torch.ones(1)).backward()
    before = [(parameter.detach().clone(), parameter.grad.clone()) for parameter in model.parameters()]
    with torch.no_grad():
        backprop.trace(model, torch.ones(2).double(), 0.0)
    for parameter, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, grad)
        assert parameter.requires_grad


def test_errors():
    input = torch.ones(2, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="trace: expected a model with one output and head regression or binary, got 3"
    ):
        backprop.trace(network(2, 3, head="multiclass"), input, 1.0)
    with pytest.raises(ValueError, match="got 2 and binary"):
        backprop.trace(network(2, 2), input, 1.0)
    with pytest.raises(RuntimeError, match=r"trace: expected input of shape \(2,\), got \(1, 2\)"):
        backprop.trace(network(2, 1), input.unsqueeze(0), 1.0)
    with pytest.raises(ValueError, match=r"trace: expected target from 0 to 1, got 1\.5"):
        backprop.trace(network(2, 1), input, 1.5)
    with pytest.raises(RuntimeError, match="step, which is constant but for a jump"):
        backprop.trace(network(2, 2, 1, activation="step"), input, 1.0)
    saturated = network(2, 1)
    torch.nn.init.ones_(next(saturated.parameters()))
    with pytest.raises(
        ValueError, match="trace: expected y_hat between 0 and 1, got 1, of which the loss has no gradient"
    ):
        backprop.trace(saturated, 100 * input, 1.0)
