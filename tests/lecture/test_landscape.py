"""torch_mlp/landscape.py, and the lecture's slide on it: the loss of a multilayer perceptron is not convex."""

import pytest
import torch

from torch_mlp import nn
from torch_mlp.descent import minibatch_sgd
from torch_mlp.landscape import filter_normalized_direction, height_above_chord, losses_between, losses_on_plane


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def xor(count=200):
    input = torch.randn(count, 2, generator=generator(1), dtype=torch.float64)
    return input, (input[:, 0] * input[:, 1] > 0).long()


def trained(hidden, seed):
    """Networks of different seeds differ in their first weights alone."""
    model = nn.MLP(2, hidden, 2, "tanh", dtype=torch.float64).init_gaussian_(0.5, generator(seed))
    input, target = xor()
    minibatch_sgd(model, input, target, batch_size=10, lr=0.3, max_passes=40, generator=generator())
    return model


def values(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_directions_have_the_norms_of_the_rows_of_the_weights():
    model = nn.MLP(20, [30, 10], 3, dtype=torch.float64)
    first, second = (filter_normalized_direction(model, generator(seed)) for seed in (1, 2))
    for parameter, step, other in zip(model.parameters(), first, second, strict=True):
        assert step.shape == parameter.shape
        if parameter.dim() == 1:
            assert not step.any()
        else:
            torch.testing.assert_close(step.norm(dim=1), parameter.norm(dim=1), rtol=1e-13, atol=0)
            # Random ones: neither the row itself nor each other.
            for left, right in ((step, parameter), (step, other)):
                cosines = torch.nn.functional.cosine_similarity(left, right)
                assert cosines.abs().max() < 0.95
    assert torch.equal(filter_normalized_direction(model, generator(1))[0], first[0])


def test_directions_of_convolutions_and_of_neurons_of_weight_zero():
    """A filter is all that belongs to one output; a neuron without weights has none to move by."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.Linear(6, 2))
    torch.nn.init.zeros_(model[1].weight[0])
    filters, _, weight, _ = filter_normalized_direction(model)
    torch.testing.assert_close(filters.flatten(1).norm(dim=1), model[0].weight.flatten(1).norm(dim=1))
    assert not weight[0].any()
    assert weight[1].any()


@pytest.mark.parametrize("bias", [True, False])
def test_the_plane(bias):
    """Each loss is that of a model with its parameters moved by hand; rows are y, columns x."""
    input, target = xor(50)
    model = nn.MLP(2, [5, 4], 2, "tanh", bias=bias, dtype=torch.float64)
    first, second = (filter_normalized_direction(model, generator(seed)) for seed in (1, 2))
    steps = torch.tensor([-0.5, 0.0, 1.5])
    before = values(model)
    losses = losses_on_plane(model, input, target, first, second, steps)
    assert losses.shape == (3, 3)
    assert losses.dtype == torch.float64
    assert losses[1, 1].item() == model.loss(input, target).item()
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.requires_grad
        assert parameter.grad is None
    for row, y in enumerate(steps.tolist()):
        for column, x in enumerate(steps.tolist()):
            moved = nn.MLP(2, [5, 4], 2, "tanh", bias=bias, dtype=torch.float64)
            for parameter, *parts in zip(moved.parameters(), before, first, second, strict=True):
                parameter.data = parts[0] + x * parts[1] + y * parts[2]
            assert losses[row, column].item() == pytest.approx(moved.loss(input, target).item(), rel=1e-14)


def test_the_line():
    """At its ends are the two models, to the last bit, and in the middle the mean of their parameters."""
    input, target = xor(50)
    first, last, middle = (nn.MLP(2, 5, 2, dtype=torch.float64) for _ in range(3))
    before = values(first), values(last)
    losses = losses_between(first, last, input, target, points=3)
    for parameter, begin, end in zip(middle.parameters(), *before, strict=True):
        parameter.data = (begin + end) / 2
    assert losses[0].item() == first.loss(input, target).item()
    assert losses[1].item() == pytest.approx(middle.loss(input, target).item(), rel=1e-14)
    assert losses[2].item() == last.loss(input, target).item()
    for model, kept in zip((first, last), before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), kept, strict=True))


def test_models_of_different_shapes():
    with pytest.raises(
        ValueError, match=r"losses_between: expected models with parameters of the same shapes, got \[\["
    ):
        losses_between(nn.MLP(2, 5, 2), nn.MLP(2, 6, 2), *xor(4))


def test_directions_of_other_shapes():
    """A row would be added to every row, and no one would notice."""
    model = nn.MLP(2, 5, 2)
    direction = filter_normalized_direction(model)
    for other in (direction[:-1], [direction[0][:1], *direction[1:]]):
        with pytest.raises(ValueError, match="losses_on_plane: expected directions of the shapes of the parameters"):
            losses_on_plane(model, *xor(4), direction, other, torch.zeros(1))


@pytest.mark.parametrize(
    ("losses", "height"),
    [([0.0, 1.0], 0.0), ([4.0, 1.0, 0.0, 1.0, 4.0], 0.0), ([0.0, 1.0, 2.0], 0.0), ([1.0, 3.0, 4.0, 2.0, 3.0], 2.0)],
)
def test_height_above_the_chord(losses, height):
    assert height_above_chord(torch.tensor(losses, dtype=torch.float64)) == pytest.approx(height, abs=1e-15)


def test_the_loss_of_a_multilayer_perceptron_is_not_convex():
    """Between two networks that both learned XOR lie some that did not: a midpoint above the mean of the ends."""
    input, target = xor()
    first, last = trained(8, seed=1), trained(8, seed=2)
    losses = losses_between(first, last, input, target)
    assert max(losses[0], losses[-1]) < 0.2
    assert losses[20] > (losses[0] + losses[-1]) / 2 + 0.1
    assert height_above_chord(losses) > 0.1


def test_hidden_units_in_another_order_are_another_minimum():
    """The same network, unit for unit, has the same loss elsewhere: so a minimum is never the only one."""
    input, target = xor()
    network = trained(8, seed=1)
    other = nn.MLP(2, 8, 2, "tanh", dtype=torch.float64)
    order = torch.arange(8).flip(0)
    weight, bias, last, last_bias = values(network)
    moved = (weight[order], bias[order], last[:, order], last_bias)
    for parameter, value in zip(other.parameters(), moved, strict=True):
        parameter.data = value
    losses = losses_between(network, other, input, target)
    assert losses[-1].item() == pytest.approx(losses[0].item(), rel=1e-13)
    assert height_above_chord(losses) > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_of_softmax_regression_is_convex(seed):
    """On lines between trained and between random weights, to the rounding of float64."""
    input, target = xor()
    far = [nn.MLP(2, [], 2, dtype=torch.float64).init_gaussian_(5.0, generator(seed + place)) for place in (10, 20)]
    for first, last in ((trained([], seed), trained([], seed + 1)), far):
        assert height_above_chord(losses_between(first, last, input, target)) < 1e-13
