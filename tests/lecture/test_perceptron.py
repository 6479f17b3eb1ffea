"""The perceptron, as the lecture has it: step(w.x + b), the learning rule, what it can learn and what it cannot."""

import pytest
import torch

from torch_mlp.nn import Perceptron
from torch_mlp.nn.perceptron import NotSeparableWarning

CORNERS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
# the labels, and weights and a bias that separate them
GATES = {
    "AND": ([0, 0, 0, 1], (1.0, 1.0, -1.5)),
    "OR": ([0, 1, 1, 1], (1.0, 1.0, -0.5)),
    "NAND": ([1, 1, 1, 0], (-1.0, -1.0, 1.5)),
}
XOR = torch.tensor([0, 1, 1, 0])
gates = pytest.mark.parametrize("gate", GATES)
seeds = pytest.mark.parametrize("seed", range(5))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def accuracy(model, input, target):
    return (model.predict(input) == target).double().mean().item()


def most_mistakes(input, target, separator):
    """(R / gamma)^2, of samples with a feature that is always 1 and the distances to a line through the origin."""
    samples = torch.cat([input, torch.ones(len(input), 1)], 1).double()
    separator = torch.as_tensor(separator, dtype=torch.float64)
    distances = (2 * target - 1) * (samples @ separator) / separator.norm()
    assert distances.min() > 0
    return (samples.norm(dim=1).max() / distances.min()).square().item()


def test_output_is_the_step_of_a_weighted_sum():
    """1 where w.x + b >= 0, on the line too, else 0."""
    model = Perceptron(2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -1.0]]))
        model.bias.fill_(-1.0)
    input = torch.tensor([[1.0, 0.5], [1.0, 1.0], [1.0, 1.5], [0.0, 0.0]])
    assert model(input).tolist() == [[1.0], [1.0], [0.0], [0.0]]
    assert model.predict(input).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(("label", "weight", "bias"), [(0, [-0.75, 1.0], -0.5), (1, [0.0, 0.0], 0.0)])
def test_learning_rule(label, weight, bias):
    """w += lr (y - y_hat) x: weights of 0 say 1, so that a sample of class 0 is a mistake, and one of class 1 none."""
    model = Perceptron(2)
    model.fit(torch.tensor([[1.5, -2.0]]), torch.tensor([label]), lr=0.5)
    assert model.weight.tolist() == [weight]
    assert model.bias.tolist() == [bias]


@gates
@seeds
def test_learns_the_gates_within_the_bound(gate, seed):
    labels, separator = GATES[gate]
    model, target = Perceptron(2), torch.tensor(labels)
    mistakes = model.fit(CORNERS, target, generator=seeded(seed))
    assert mistakes[-1] == 0
    assert accuracy(model, CORNERS, target) == 1
    assert 0 < sum(mistakes) <= most_mistakes(CORNERS, target, separator)


@seeds
def test_convergence_theorem(seed):
    """On data that a line separates, no more than (R / gamma)^2 mistakes in all (Novikoff, 1962)."""
    generator = seeded(seed)
    separator, input = torch.randn(6, generator=generator), torch.randn(300, 5, generator=generator)
    scores = input @ separator[:5] + separator[5]
    input, target = input[scores.abs() > 0.3], (scores > 0).long()[scores.abs() > 0.3]
    model = Perceptron(5)
    mistakes = model.fit(input, target, max_epochs=1000, generator=generator)
    assert mistakes[-1] == 0
    assert accuracy(model, input, target) == 1
    assert 0 < sum(mistakes) <= most_mistakes(input, target, separator)


@seeds
def test_cannot_learn_xor(seed):
    model = Perceptron(2)
    with pytest.warns(NotSeparableWarning, match=r"of 4 samples still mistaken .* as none does those of XOR"):
        mistakes = model.fit(CORNERS, XOR, max_epochs=50, generator=seeded(seed))
    assert len(mistakes) == 50
    assert min(mistakes) > 0
    assert accuracy(model, CORNERS, XOR) <= 0.75


def test_learning_rate_is_a_matter_of_scale():
    """From parameters of 0: the mistakes are the same, and the line too."""
    target = torch.tensor(GATES["AND"][0])
    one, other = Perceptron(2), Perceptron(2)
    mistakes = [model.fit(CORNERS, target, lr=lr, generator=seeded(3)) for model, lr in ((one, 1.0), (other, 0.25))]
    assert mistakes[0] == mistakes[1]
    assert torch.equal(0.25 * one.weight, other.weight)
    assert torch.equal(0.25 * one.bias, other.bias)


def test_labels_of_0_and_of_minus_1_are_the_same():
    target = torch.tensor(GATES["OR"][0])
    models = [Perceptron(2), Perceptron(2)]
    mistakes = [
        model.fit(CORNERS, labels, generator=seeded(4))
        for model, labels in zip(models, (target, 2 * target - 1), strict=True)
    ]
    assert mistakes[0] == mistakes[1]
    assert torch.equal(models[0].weight, models[1].weight)
