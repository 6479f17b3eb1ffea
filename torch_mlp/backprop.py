"""The computation graph of a small network for one sample: what back-propagation by hand writes down.

A node is a number that is computed, an edge says of which others. Forward, each node follows from those before it.
Backward, the chain rule sums over the edges that leave a node:

    d loss / d node = sum over its edges of (d target / d node) * (d loss / d target)
    d loss / d weight = (d loss / d target) * source        for the edge from source to target with this weight

(Bishop, Pattern Recognition and Machine Learning, 2006, section 5.3.) The numbers are those of the fused ops, in one
forward and one backward pass, and not of these formulas, so that the one can be checked by the other.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_mlp import functional
from torch_mlp.nn import MLP

ONE = "1"  # the source of a bias: the weight of an input that is always 1


class Node(NamedTuple):
    """A number that is computed, and the gradient of the loss by it."""

    name: str  # such as z^1_2, the second unit of the first layer
    formula: str  # of its value; empty for an input
    value: float
    gradient: float  # d loss / d node


class Edge(NamedTuple):
    """One node's dependence on another."""

    source: str
    target: str
    derivative: float  # d target / d source: in a linear map the weight
    weight: str = ""  # the name of the weight, where there is one
    gradient: float = 0.0  # d loss / d weight


class Column(NamedTuple):
    """Nodes that are computed at once."""

    title: str
    nodes: list[Node]


class Graph(NamedTuple):
    """All of a computation, from the inputs to the loss."""

    columns: list[Column]
    edges: list[Edge]

    @property
    def nodes(self) -> dict[str, Node]:
        """Every node by its name."""
        return {node.name: node for column in self.columns for node in column.nodes}


class _Head(NamedTuple):
    """How a prediction follows from z, and a loss from the prediction."""

    activation: str
    title: str
    loss: Callable[[Tensor, Tensor], Tensor]
    formula: str


_HEADS = {
    "regression": _Head("identity", "squared error", torch.nn.functional.mse_loss, "(y_hat - y)^2"),
    "binary": _Head(
        "sigmoid",
        "cross-entropy",
        torch.nn.functional.binary_cross_entropy,
        "-y log(y_hat) - (1 - y) log(1 - y_hat)",
    ),
}


@torch.enable_grad()
def trace(model: MLP, input: Tensor, target: float) -> Graph:
    r"""Compute the loss of one sample forward and backward, and keep every number on the way.

    Each layer is one call of :func:`torch_mlp.functional.linear_act`, the last one with the sigmoid or identity of its
    head. The op never stores z; the gradient of z is that of the bias, as dz/db = 1. The loss is taken of y_hat, as it
    is by hand. (``model.loss`` goes to z at once, which also holds where y_hat is 0 or 1 to all digits.)

    Args:
        model: a network with one output, of the head "binary" or "regression". Its parameters are not changed and their
            ``grad`` is left as it is.
        input: one sample.
        target: y, for "binary" 0 or 1, or the probability of 1.

    Shape:
        - input: :math:`(in\_features)`, of the dtype and device of the model

    Returns:
        The graph, with columns x, z^1, a^1, z^2, a^2, ..., y_hat, loss.

    Raises:
        RuntimeError: if the shape of input does not fit, or an activation has no gradient.
        ValueError: if the model has another head or several outputs, the target of "binary" is no probability, or its
            y_hat is 0 or 1 to all digits.

    Example:
        >>> graph = trace(MLP(2, 2, 1, head="binary"), torch.tensor([1.0, 0.5]), 1.0)
        >>> [column.title for column in graph.columns]
        ['input', 'linear map', 'sigmoid', 'linear map', 'sigmoid', 'cross-entropy, y = 1']
        >>> list(graph.nodes)
        ['x_1', 'x_2', 'z^1_1', 'z^1_2', 'a^1_1', 'a^1_2', 'z^2_1', 'y_hat', 'loss']
        >>> z, y_hat = graph.nodes["z^2_1"], graph.nodes["y_hat"]
        >>> abs(z.gradient - (y_hat.value - 1.0)) < 1e-6
        True

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 5.3.
    """
    if model.head not in _HEADS or model.out_features != 1:
        raise ValueError(
            f"trace: expected a model with one output and head {' or '.join(_HEADS)}, got {model.out_features} and "
            f"{model.head}"
        )
    if input.shape != (model.in_features,):
        raise RuntimeError(f"trace: expected input of shape ({model.in_features},), got {tuple(input.shape)}")
    if model.head == "binary" and not 0 <= target <= 1:
        raise ValueError(f"trace: expected target from 0 to 1, got {target}")
    head = _HEADS[model.head]
    layers = [layer for layer in model.children() if isinstance(layer, torch.nn.Linear)]
    activations = [*[model.activation] * len(model.hidden_features), head.activation]

    weights = [layer.weight.detach().requires_grad_() for layer in layers]
    biases = [
        (weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()).requires_grad_()
        for layer, weight in zip(layers, weights, strict=True)
    ]
    outputs = [input.detach().clone().requires_grad_()]
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        outputs.append(functional.linear_act(outputs[-1], weight, bias, activation))
    y_hat = outputs[-1]
    if model.head == "binary" and y_hat.item() in (0, 1):
        raise ValueError(
            f"trace: expected y_hat between 0 and 1, got {y_hat.item():g}, of which the loss has no gradient"
        )
    loss = head.loss(y_hat, torch.full_like(y_hat, target))
    tensors = [*outputs, *weights, *biases]
    gradient = dict(zip(tensors, torch.autograd.grad(loss, tensors), strict=True))

    below = [f"x_{i}" for i in range(1, model.in_features + 1)]
    columns = [Column("input", _nodes(below, [""] * len(below), outputs[0], gradient[outputs[0]]))]
    edges: list[Edge] = []
    for place, layer in enumerate(layers):
        weight, bias, activation, output = weights[place], biases[place], activations[place], outputs[place + 1]
        z = [f"z^{place + 1}_{j}" for j in range(1, layer.out_features + 1)]
        a = ["y_hat"] if output is y_hat else [name.replace("z", "a") for name in z]
        sums = []
        for j, node in enumerate(z):
            rows = enumerate(zip(below, weight[j].tolist(), gradient[weight][j].tolist(), strict=True), 1)
            into = [Edge(start, node, w, f"w^{place + 1}_{_pair(j + 1, i)}", grad) for i, (start, w, grad) in rows]
            sums.append(" + ".join(f"{edge.weight} {edge.source}" for edge in into))
            if layer.bias is not None:
                into.append(Edge(ONE, node, bias[j].item(), node.replace("z", "b"), gradient[bias][j].item()))
                sums[-1] += f" + {into[-1].weight}"
            edges += into
        values = functional.linear_act(outputs[place], weight, bias, "identity")
        columns.append(Column("linear map", _nodes(z, sums, values, gradient[bias])))
        derivative = functional.ACTIVATIONS[activation].derivative
        assert derivative is not None  # autograd has refused the activation that has none
        edges += [Edge(*ends) for ends in zip(z, a, derivative(output).tolist(), strict=True)]
        columns.append(Column(activation, _nodes(a, [f"{activation}({name})" for name in z], output, gradient[output])))
        below = a
    edges.append(Edge("y_hat", "loss", gradient[y_hat].item()))
    columns.append(Column(f"{head.title}, y = {target:g}", [Node("loss", head.formula, loss.item(), 1.0)]))
    return Graph(columns, edges)


def _nodes(names: list[str], formulas: list[str], values: Tensor, gradients: Tensor) -> list[Node]:
    return [Node(*row) for row in zip(names, formulas, values.tolist(), gradients.tolist(), strict=True)]


def _pair(j: int, i: int) -> str:
    """The indices of the weight to unit j from unit i."""
    return f"{j}{i}" if max(j, i) < 10 else f"{j},{i}"
