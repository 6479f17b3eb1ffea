"""Layers, networks of layers and their heads, by hand in float64; and what a network without activations cannot do."""

import math
from itertools import pairwise

import pytest
import torch

from torch_mlp.nn import MLP, LinearSigmoid, summary

XOR_INPUT = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
XOR_TARGET = torch.tensor([0, 1, 1, 0])


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def softmax(z):
    return torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)


def weights_of(model):
    """W1, b1, W2, b2, ..."""
    return [parameter.detach() for parameter in model.parameters()]


def test_a_layer_is_its_neurons():
    """h_i = sigmoid(sum_j W_ij x_j + b_i), a neuron at a time in Python's floats."""
    layer = LinearSigmoid(3, 4, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    for sample, outputs in zip(x.tolist(), layer(x).tolist(), strict=True):
        for row, b, output in zip(weight, bias, outputs, strict=True):
            z = sum(w * x_j for w, x_j in zip(row, sample, strict=True)) + b
            assert output == pytest.approx(1 / (1 + math.exp(-z)), rel=1e-14)


def test_one_hidden_layer():
    model = MLP(3, 4, 2, dtype=torch.float64)
    w1, b1, w2, b2 = weights_of(model)
    x = torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(model(x), w2 @ sigmoid(w1 @ x + b1) + b2)


def test_three_hidden_layers():
    model = MLP(3, [4, 6, 5], 2, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3, w4, b4 = weights_of(model)
    x = torch.randn(3, dtype=torch.float64)
    h1 = sigmoid(w1 @ x + b1)
    h2 = sigmoid(w2 @ h1 + b2)
    h3 = sigmoid(w3 @ h2 + b3)
    torch.testing.assert_close(model(x), w4 @ h3 + b4)


def head_by_hand(head, outs):
    """A model with this head, its output before the head by hand, and some input."""
    model = MLP(3, 4, outs, dtype=torch.float64, head=head)
    w1, b1, w2, b2 = weights_of(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    return model, sigmoid(x @ w1.T + b1) @ w2.T + b2, x


def test_the_regression_head_is_the_identity():
    """y_hat = z, with the squared error, a mean over all outputs."""
    model, z, x = head_by_hand("regression", 2)
    y = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(model.predict(x), z)
    torch.testing.assert_close(model.loss(x, y).detach(), (z - y).square().sum() / 10)


def test_the_binary_head_is_the_sigmoid():
    """p(y = 1 | x) = sigmoid(z), with -(y log p + (1 - y) log(1 - p)), and y_hat = 1 from p = 1/2 on."""
    model, z, x = head_by_hand("binary", 1)
    y = torch.tensor([0, 1, 1, 0, 1])
    p = sigmoid(z[:, 0])
    torch.testing.assert_close(model.predict_proba(x), p)
    torch.testing.assert_close(model.loss(x, y).detach(), -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean())
    assert model.predict(x).tolist() == [int(value >= 0.5) for value in p]


def test_the_multiclass_head_is_the_softmax():
    """p(y = k | x) = exp(z_k) / sum_j exp(z_j), with -log p_y, and y_hat the most probable class."""
    model, z, x = head_by_hand("multiclass", 3)
    y = torch.tensor([0, 2, 1, 1, 0])
    p = softmax(z)
    torch.testing.assert_close(model.predict_proba(x), p)
    torch.testing.assert_close(model.loss(x, y).detach(), -torch.log(p[torch.arange(5), y]).mean())
    assert model.predict(x).tolist() == [max(range(3), key=row.__getitem__) for row in p.tolist()]


def test_probabilities_of_classes_sum_to_1():
    model = MLP(3, 4, 10, "tanh", dtype=torch.float64).init_gaussian_(3.0)
    p = model.predict_proba(torch.randn(100, 3, dtype=torch.float64))
    assert (p > 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(100, dtype=torch.float64), rtol=1e-14, atol=0)


def test_without_an_activation_the_network_is_one_linear_map():
    """W3 (W2 (W1 x + b1) + b2) + b3 = W x + b, with W = W3 W2 W1 and b = W3 (W2 b1 + b2) + b3."""
    deep = MLP(3, [40, 20], 2, "identity", dtype=torch.float64)
    w1, b1, w2, b2, w3, b3 = weights_of(deep)
    shallow = MLP(3, [], 2, dtype=torch.float64)
    shallow.load_state_dict({"0.weight": w3 @ w2 @ w1, "0.bias": w3 @ (w2 @ b1 + b2) + b3})
    x = torch.randn(100, 3, dtype=torch.float64)
    torch.testing.assert_close(deep(x), shallow(x))
    bent = MLP(3, [40, 20], 2, "sigmoid", dtype=torch.float64)
    bent.load_state_dict(deep.state_dict())
    assert (bent(x) - shallow(x)).abs().max() > 0.1


def train_on_xor(model, steps=500):
    """Loss and accuracy before every step of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2 if model.head == "regression" else 1.0, momentum=0.9)
    target = XOR_TARGET if model.head == "multiclass" else XOR_TARGET.double()
    losses, accuracies = [], []
    for _ in range(steps):
        loss = model.loss(XOR_INPUT, target)
        predicted = (model.predict(XOR_INPUT) >= 0.5).long() if model.head == "regression" else model.predict(XOR_INPUT)
        losses.append(loss.item())
        accuracies.append((predicted == XOR_TARGET).double().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, accuracies


# What a coin costs: y_hat = 1/2 has the squared error 1/4, p = 1/2 the cross-entropy log 2.
heads = pytest.mark.parametrize(
    ("head", "outs", "coin"), [("regression", 1, 1 / 4), ("binary", 1, math.log(2)), ("multiclass", 2, math.log(2))]
)
seeds = pytest.mark.parametrize("seed", range(4))


@seeds
@heads
def test_a_linear_network_of_any_depth_cannot_learn_xor(head, outs, coin, seed):
    """No line has more than three of the four points on their right sides, and none is better than a coin."""
    torch.manual_seed(seed)
    losses, accuracies = train_on_xor(MLP(2, [8, 8], outs, "identity", dtype=torch.float64, head=head))
    assert max(accuracies) <= 0.75
    assert min(losses) >= coin - 1e-9
    assert losses[-1] == pytest.approx(coin, abs=1e-3)  # it has learned all there is


@seeds
@heads
def test_with_a_sigmoid_it_can(head, outs, coin, seed):
    """From most initial weights; from some it ends in a local minimum, with two of the four points right."""
    torch.manual_seed(seed)
    losses, accuracies = train_on_xor(MLP(2, 8, outs, dtype=torch.float64, head=head).init_gaussian_(2.0), steps=1500)
    assert accuracies[-1] == 1
    assert losses[-1] < 0.1 * coin


def test_one_hidden_layer_comes_as_near_to_a_function_as_it_has_neurons():
    """A stair of n steep sigmoids, each as high as sin rises there: ten times the neurons, a tenth of the error."""
    x = torch.linspace(-3, 3, 2001, dtype=torch.float64).unsqueeze(-1)
    errors = []
    for n in (10, 100, 1000):
        edges = torch.linspace(-3, 3, n + 1, dtype=torch.float64)
        steepness = 100 * n
        model = MLP(1, n, 1, dtype=torch.float64, head="regression")
        model.load_state_dict(
            {
                "0.weight": torch.full((n, 1), steepness, dtype=torch.float64),
                "0.bias": -steepness * (edges[:-1] + edges[1:]) / 2,
                "2.weight": torch.sin(edges).diff().unsqueeze(0),
                "2.bias": torch.sin(edges[:1]),
            }
        )
        errors.append((model.predict(x) - torch.sin(x.squeeze(-1))).abs().max().item())
        assert errors[-1] < 6 / n / 2 + 1e-3 / n  # half a step's width: sin is nowhere steeper than 1
    assert errors[1] < 0.15 * errors[0]
    assert errors[2] < 0.15 * errors[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(2, 1024, 512, 3), (784, 10), (784, 256, 10)], ids=str)
def test_number_of_parameters(widths, bias):
    """The sum of (n_in + 1) n_out over the layers, or n_in n_out without biases."""
    model = MLP(widths[0], widths[1:-1], widths[-1], bias=bias)
    expected = sum((ins + bias) * outs for ins, outs in pairwise(widths))
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters()) == expected
    assert summary(model).split()[-1] == f"{expected:,}"


def test_the_quiz_of_the_lecture():
    """2-1024-512-3: 3 * 1024 + 1025 * 512 + 513 * 3."""
    assert summary(MLP(2, [1024, 512], 3)).endswith(" 529,411")
