"""Back-propagation by hand: every intermediate of the chain rule, written out, beside what the fused ops save and give.

What is written by hand is arithmetic on Python's floats. The gradient that comes in for the loss is not 1, as it is not
in the middle of a larger computation.
"""

import math
from itertools import pairwise, product

import pytest
import torch

from torch_mlp import functional
from torch_mlp.nn import MLP

UPSTREAM = 2.5  # d(what the loss is part of) / d(loss)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


# a and da/dz of z, each on its own, so that none of the ops' formulas of the output is taken for granted.
BY_HAND = {
    "identity": (lambda z: z, lambda z: 1.0),
    "sigmoid": (sigmoid, lambda z: math.exp(-z) / (1 + math.exp(-z)) ** 2),
    "tanh": (math.tanh, lambda z: 1 / math.cosh(z) ** 2),
    "relu": (lambda z: max(z, 0.0), lambda z: float(z > 0)),
}


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def assert_values(tensor, *expected):
    assert tensor.dtype == torch.float64
    assert tensor.flatten().tolist() == pytest.approx(expected, rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_one_neuron_with_binary_cross_entropy(y):
    """y_hat = sigmoid(w x + b): dl/dz = y_hat - y, dl/dw = (y_hat - y) x, dl/db = y_hat - y."""
    x, w, b = 0.7, -1.3, 0.4
    z = w * x + b
    y_hat = sigmoid(z)
    loss = -(y * math.log(y_hat) + (1 - y) * math.log(1 - y_hat))
    dl_dyhat = -y / y_hat + (1 - y) / (1 - y_hat)
    dyhat_dz = y_hat * (1 - y_hat)
    dz_dw, dz_db, dz_dx = x, 1.0, w
    dl_dz = dl_dyhat * dyhat_dz
    assert dl_dz == pytest.approx(y_hat - y, rel=1e-14)

    # Factor by factor: the neuron is one op, torch's loss of its output the next one.
    input, weight, bias, target = leaf([x]), leaf([w]), leaf(b), torch.tensor([[y]], dtype=torch.float64)
    output = functional.linear_act(input, weight, bias, "sigmoid")
    output.retain_grad()
    for saved, value in zip(output.grad_fn.saved_tensors, (x, w, y_hat), strict=True):
        assert_values(saved, value)
    torch.nn.functional.binary_cross_entropy(output, target).backward(torch.tensor(UPSTREAM))
    assert_values(output.grad, UPSTREAM * dl_dyhat)
    assert_values(bias.grad, UPSTREAM * dl_dyhat * dyhat_dz * dz_db)
    assert_values(weight.grad, UPSTREAM * dl_dyhat * dyhat_dz * dz_dw)
    assert_values(input.grad, UPSTREAM * dl_dyhat * dyhat_dz * dz_dx)

    # At once: neuron and loss are one op, which goes from the loss to z without y_hat.
    input, weight, bias = leaf([x]), leaf([w]), leaf(b)
    fused = functional.linear_binary_cross_entropy(input, weight, target, linear_bias=bias)
    assert_values(fused, loss)
    for saved, value in zip(fused.grad_fn.saved_tensors[:4], (x, w, z, y), strict=True):
        assert_values(saved, value)
    fused.backward(torch.tensor(UPSTREAM))
    assert_values(bias.grad, UPSTREAM * (y_hat - y))
    assert_values(weight.grad, UPSTREAM * (y_hat - y) * x)
    assert_values(input.grad, UPSTREAM * (y_hat - y) * w)


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_two_layers(y):
    """a = sigmoid(w1 x), y_hat = sigmoid(w2 a): dl/dw2 = (y_hat - y) a, dl/dw1 = (y_hat - y) w2 a (1 - a) x."""
    x, w1, w2 = -0.8, 1.9, -0.6
    a = sigmoid(w1 * x)
    z = w2 * a
    y_hat = sigmoid(z)
    dl_dz = y_hat - y
    dz_da, dz_dw2 = w2, a
    da_dz1, dz1_dw1, dz1_dx = a * (1 - a), x, w1
    dl_da = dl_dz * dz_da
    dl_dz1 = dl_da * da_dz1
    expected = {
        "w2": dl_dz * dz_dw2,
        "a": dl_da,
        "w1": dl_dz1 * dz1_dw1,
        "x": dl_dz1 * dz1_dx,
    }

    # Layer by layer.
    input, first, second, target = leaf([x]), leaf([w1]), leaf([w2]), torch.tensor([[y]], dtype=torch.float64)
    hidden = functional.linear_act(input, first)
    hidden.retain_grad()
    loss = functional.linear_binary_cross_entropy(hidden, second, target)
    for saved, value in zip(hidden.grad_fn.saved_tensors, (x, w1, a), strict=True):
        assert_values(saved, value)
    for saved, value in zip(loss.grad_fn.saved_tensors[:4], (a, w2, z, y), strict=True):
        assert_values(saved, value)
    loss.backward(torch.tensor(UPSTREAM))
    for name, tensor in {"w2": second, "a": hidden, "w1": first, "x": input}.items():
        assert_values(tensor.grad, UPSTREAM * expected[name])

    # The network as one op, and as a model.
    input, first, second = leaf([x]), leaf([w1]), leaf([w2])
    logits = functional.mlp(input, [first, second], [None, None])
    for saved, value in zip(logits.grad_fn.saved_tensors, (x, w1, w2, a, z), strict=True):
        assert_values(saved, value)
    loss = functional.binary_cross_entropy_with_logits(logits, target)
    grads = torch.autograd.grad(loss, [logits, second, first, input], torch.tensor(UPSTREAM))
    for grad, value in zip(grads, (dl_dz, expected["w2"], expected["w1"], expected["x"]), strict=True):
        assert_values(grad, UPSTREAM * value)

    model = MLP(1, [1], 1, bias=False, dtype=torch.float64, head="binary")
    model.load_state_dict({"0.weight": first.detach(), "2.weight": second.detach()})
    model.loss(input, target).backward(torch.tensor(UPSTREAM))
    for parameter, name in zip(model.parameters(), ("w1", "w2"), strict=True):
        assert_values(parameter.grad, UPSTREAM * expected[name])


@pytest.mark.parametrize("activation", BY_HAND)
def test_several_neurons_sum_over_paths(activation):
    """dl/dx is the sum, over all paths from x to the loss, of the product of the derivatives along the path."""
    widths = (2, 3, 2, 2)
    generator = torch.Generator().manual_seed(3)
    x, grad_output = (torch.randn(2, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = [
        torch.randn(outs, ins, generator=generator, dtype=torch.float64, requires_grad=True)
        for ins, outs in pairwise(widths)
    ]
    w = [weight.tolist() for weight in weights]
    value, derivative = BY_HAND[activation]

    a, da_dz = [x.tolist()], []
    for layer, rows in enumerate(w):
        z = [sum(wi * ai for wi, ai in zip(row, a[-1], strict=True)) for row in rows]
        is_last = layer == len(w) - 1
        a.append([zj if is_last else value(zj) for zj in z])
        da_dz.append([1.0 if is_last else derivative(zj) for zj in z])

    def sum_over_paths(start, unit):
        """dl/da of one neuron: a path takes one neuron of every layer above."""
        total = 0.0
        for path in product([unit], *map(range, widths[start + 1 :])):
            along = grad_output[path[-1]].item()
            for layer, (below, above) in enumerate(pairwise(path), start):
                along *= da_dz[layer][above] * w[layer][above][below]
            total += along
        return total

    dl_da = [[sum_over_paths(layer, unit) for unit in range(width)] for layer, width in enumerate(widths)]
    dl_dw = [
        [dl_da[layer + 1][j] * da_dz[layer][j] * a[layer][i] for j in range(outs) for i in range(ins)]
        for layer, (ins, outs) in enumerate(pairwise(widths))
    ]

    input = x.requires_grad_()
    layer_by_layer = input
    for weight, name in zip(weights, (activation, activation, "identity"), strict=True):
        layer_by_layer = functional.linear_act(layer_by_layer, weight, None, name)
    for output in (layer_by_layer, functional.mlp(input, weights, [None] * 3, activation)):
        assert_values(output, *a[-1])
        grad_input, *grad_weights = torch.autograd.grad(output, [input, *weights], grad_output)
        assert_values(grad_input, *dl_da[0])
        for grad, expected in zip(grad_weights, dl_dw, strict=True):
            assert_values(grad, *expected)


@pytest.mark.parametrize("y", [0, 1, 2])
def test_softmax_with_cross_entropy(y):
    """p = softmax(z), l = -log p_y: dl/dz = p - onehot(y), and dl/dW = (p - onehot(y)) x^T."""
    x, w = [0.5, -1.5], [[1.2, 0.3], [-0.7, 0.8], [0.1, -0.9]]
    z = [sum(wi * xi for wi, xi in zip(row, x, strict=True)) for row in w]
    total = sum(math.exp(zk) for zk in z)
    p = [math.exp(zk) / total for zk in z]
    dl_dp = [-1 / p[k] if k == y else 0.0 for k in range(3)]
    dp_dz = [[p[k] * ((k == j) - p[j]) for j in range(3)] for k in range(3)]
    dl_dz = [sum(dl_dp[k] * dp_dz[k][j] for k in range(3)) for j in range(3)]
    assert dl_dz == pytest.approx([p[k] - (k == y) for k in range(3)], rel=1e-14)
    dl_dw = [dl_dz[k] * xi for k in range(3) for xi in x]
    dl_dx = [sum(dl_dz[k] * w[k][i] for k in range(3)) for i in range(2)]

    target = torch.tensor([y])
    input, weight = leaf(x), leaf(*w)
    logits = functional.linear_act(input, weight, None, "identity")
    logits.retain_grad()
    loss = functional.cross_entropy(logits, target)
    assert_values(loss, -math.log(p[y]))
    maximum, total_above = loss.grad_fn.saved_tensors[3]  # of which the backward pass makes p
    assert_values(maximum, max(z))
    assert_values(total_above, total / math.exp(max(z)))
    loss.backward(torch.tensor(UPSTREAM))
    assert_values(logits.grad, *(UPSTREAM * grad for grad in dl_dz))
    assert_values(weight.grad, *(UPSTREAM * grad for grad in dl_dw))
    assert_values(input.grad, *(UPSTREAM * grad for grad in dl_dx))

    for fused in (
        functional.linear_cross_entropy(input, weight, target),
        functional.mlp_cross_entropy(input, [weight], [None], target),
    ):
        assert_values(fused, -math.log(p[y]))
        grad_weight, grad_input = torch.autograd.grad(fused, [weight, input], torch.tensor(UPSTREAM))
        assert_values(grad_weight, *(UPSTREAM * grad for grad in dl_dw))
        assert_values(grad_input, *(UPSTREAM * grad for grad in dl_dx))


def test_identity_with_squared_loss():
    """y_hat = w x + b, l = (y_hat - y)^2: dl/dz = 2 (y_hat - y), for the derivative of the identity is 1."""
    x, w, b, y = 1.5, 0.8, -0.3, 2.0
    y_hat = w * x + b
    dl_dyhat = 2 * (y_hat - y)
    dyhat_dz, dz_dw, dz_db, dz_dx = 1.0, x, 1.0, w
    dl_dz = dl_dyhat * dyhat_dz

    input, weight, bias, target = leaf([x]), leaf([w]), leaf(b), leaf([y])
    output = functional.linear_act(input, weight, bias, "identity")
    output.retain_grad()
    loss = (output - target).square()
    assert_values(loss, (y_hat - y) ** 2)
    for saved, value in zip(output.grad_fn.saved_tensors, (x, w, y_hat), strict=True):
        assert_values(saved, value)
    loss.backward(torch.tensor([[UPSTREAM]]))
    assert_values(output.grad, UPSTREAM * dl_dyhat)
    assert_values(bias.grad, UPSTREAM * dl_dz * dz_db)
    assert_values(weight.grad, UPSTREAM * dl_dz * dz_dw)
    assert_values(input.grad, UPSTREAM * dl_dz * dz_dx)

    model = MLP(1, [], 1, dtype=torch.float64, head="regression")
    model.load_state_dict({"0.weight": weight, "0.bias": bias})
    loss = model.loss(input, target)
    assert_values(loss, (y_hat - y) ** 2)
    loss.backward(torch.tensor(UPSTREAM))
    for parameter, value in zip(model.parameters(), (dl_dz * dz_dw, dl_dz * dz_db), strict=True):
        assert_values(parameter.grad, UPSTREAM * value)


def neuron(x, w, b):
    return functional.linear_act(x, w, b, "sigmoid").square().sum()


def neuron_and_loss(x, w, b):
    return functional.linear_binary_cross_entropy(x, w, torch.tensor([[0.0, 1.0, 1.0]] * 2).double(), linear_bias=b)


def softmax_and_loss(x, w, b):
    return functional.linear_cross_entropy(x, w, torch.tensor([2, 0]), linear_bias=b)


def network(x, w, b):
    return functional.mlp(x, [w, w.mT], [b, None], "tanh").square().sum()


def network_and_loss(x, w, b):
    return functional.mlp_cross_entropy(x, [w, w.mT], [b, None], torch.tensor([0, 1]))


@pytest.mark.parametrize("function", [neuron, neuron_and_loss, softmax_and_loss, network, network_and_loss])
def test_finite_differences_agree(function):
    """(l(w + h) - l(w - h)) / 2h for each weight, bias and input: exact but for a multiple of h^2."""
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2), (3, 2), (3,))]
    grads = torch.autograd.grad(function(*tensors), tensors, torch.tensor(UPSTREAM))
    h = 1e-5
    with torch.no_grad():
        for tensor, grad in zip(tensors, grads, strict=True):
            for place in product(*map(range, tensor.shape)):
                middle = tensor[place].item()
                losses = []
                for step in (h, -h):
                    tensor[place] = middle + step
                    losses.append(function(*tensors).item())
                tensor[place] = middle
                assert grad[place].item() == pytest.approx(UPSTREAM * (losses[0] - losses[1]) / (2 * h), abs=1e-8)
