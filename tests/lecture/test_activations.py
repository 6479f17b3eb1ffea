"""The activations of the lecture: their formulas, their derivatives, and what makes a function element-wise."""

import math

import pytest
import torch
from conftest import DIFFERENTIABLE

from torch_mlp.functional import ACTIVATIONS, linear_act

# As they stand in the lecture, for one number.
FORMULAS = {
    "identity": lambda x: x,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": lambda x: (1 - math.exp(-2 * x)) / (1 + math.exp(-2 * x)),
    "relu": lambda x: max(0.0, x),
    "step": lambda x: 1.0 if x >= 0 else 0.0,
}
# Derivatives by the output a = act(x), so that the backward pass needs no x.
DERIVATIVES = {
    "identity": lambda a: 1.0,
    "sigmoid": lambda a: a * (1 - a),
    "tanh": lambda a: 1 - a**2,
    "relu": lambda a: 1.0 if a > 0 else 0.0,
}
POINTS = torch.arange(-6, 6.25, 0.25, dtype=torch.float64)  # 0 is one of them


def activate(activation, input):
    """The activation of each number, by the fused op: a layer of the weight 1."""
    return linear_act(input.unsqueeze(-1), torch.ones(1, 1, dtype=input.dtype), None, activation).squeeze(-1)


def of_each(formula, input):
    return torch.tensor([formula(x) for x in input.tolist()], dtype=torch.float64)


def slope(activation, input):
    """The derivative at each number, by the fused backward pass."""
    leaf = input.clone().requires_grad_()
    return torch.autograd.grad(activate(activation, leaf).sum(), leaf)[0]


def test_these_are_all_activations():
    assert set(FORMULAS) == set(ACTIVATIONS)
    assert set(DERIVATIVES) == set(DIFFERENTIABLE)


@pytest.mark.parametrize("activation", FORMULAS)
def test_formula(activation):
    expected = of_each(FORMULAS[activation], POINTS)
    torch.testing.assert_close(activate(activation, POINTS), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("activation", DERIVATIVES)
def test_derivative_through_the_output(activation):
    outputs = of_each(FORMULAS[activation], POINTS)
    torch.testing.assert_close(
        slope(activation, POINTS), of_each(DERIVATIVES[activation], outputs), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("activation", DERIVATIVES)
def test_derivative_is_the_limit_of_differences(activation):
    points, h = POINTS[POINTS != 0], 1e-5  # at 0, ReLU has a corner
    formula = FORMULAS[activation]
    differences = of_each(lambda x: (formula(x + h) - formula(x - h)) / (2 * h), points)
    torch.testing.assert_close(slope(activation, points), differences, rtol=1e-8, atol=1e-10)


def test_derivatives_are_largest_at_0():
    """1/4 for the sigmoid and 1 for tanh, and near 0 far from there: many in a row leave little of a gradient."""
    for activation, most in (("sigmoid", 0.25), ("tanh", 1.0)):
        slopes = slope(activation, POINTS)
        assert POINTS[slopes.argmax()] == 0
        assert slopes.max() == most
        assert slopes[[0, -1]].max() < 0.01 * most


def test_derivative_of_relu_at_0():
    """Where it has none, any number from 0 to 1 would do: it is 0, as in torch."""
    zeros = torch.tensor([0.0, -0.0], dtype=torch.float64)
    leaf = zeros.clone().requires_grad_()
    torch.relu(leaf).sum().backward()
    assert slope("relu", zeros).tolist() == leaf.grad.tolist() == [0, 0]


def test_step_has_no_gradient_and_says_why():
    leaf = POINTS.clone().requires_grad_()
    output = activate("step", leaf)
    with pytest.raises(RuntimeError, match=r"constant but for a jump at 0: .* so that gradient descent cannot use it"):
        output.sum().backward()
    assert leaf.grad is None


def test_derivative_of_step_is_0_but_at_its_jump():
    """The differences of the outputs over those of the inputs: 0 away from 0, and without a limit there."""
    away = POINTS[POINTS != 0]
    for h in (1e-2, 1e-4, 1e-6):
        assert torch.equal(activate("step", away + h), activate("step", away - h))
        below, above = activate("step", torch.tensor([-h, h], dtype=torch.float64)).tolist()
        assert (above - below) / (2 * h) == 1 / (2 * h)


def test_tanh_is_a_sigmoid_of_twice_the_width():
    """tanh(x) = 2 sigmoid(2 x) - 1, the 2 being the weight of the layer."""
    twice = linear_act(POINTS.unsqueeze(-1), torch.full((1, 1), 2.0, dtype=torch.float64), None, "sigmoid").squeeze(-1)
    torch.testing.assert_close(activate("tanh", POINTS), 2 * twice - 1, rtol=1e-13, atol=1e-15)


# --- the quiz: element-wise or not? ---

MATRIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.5, 0.0, 1.0]], dtype=torch.float64)
QUIZ = {
    **{activation: (lambda x, activation=activation: activate(activation, x), True) for activation in FORMULAS},
    "exp": (torch.exp, True),
    "square": (torch.square, True),
    "softmax": (lambda x: torch.softmax(x, 0), False),
    "x / ||x||": (lambda x: x / x.norm(), False),
    "x - mean": (lambda x: x - x.mean(), False),
    "cumulative sum": (lambda x: x.cumsum(0), False),
    "backwards": (lambda x: x.flip(0), False),
    "sorted": (lambda x: x.sort().values, False),
    "a whole layer": (lambda x: linear_act(x, MATRIX, None, "sigmoid"), False),
}
WITH_JACOBIAN = [name for name in QUIZ if name != "step"]
AT = torch.tensor([0.7, -0.4, 1.3], dtype=torch.float64)


def moves(function):
    """moves[i, j]: whether output i moves when input j alone does."""
    found = torch.zeros(len(AT), len(AT), dtype=torch.bool)
    for j in range(len(AT)):
        for value in (-2.0, -0.1, 0.2, 3.0):
            moved = AT.clone()
            moved[j] = value
            found[:, j] |= function(moved) != function(AT)
    return found


def is_diagonal(matrix):
    return torch.equal(matrix != 0, torch.eye(len(matrix), dtype=torch.bool))


@pytest.mark.parametrize("name", QUIZ)
def test_element_wise_by_moving_one_input(name):
    """Output i depends on input i and on no other."""
    function, is_element_wise = QUIZ[name]
    assert is_diagonal(moves(function)) == is_element_wise


@pytest.mark.parametrize("name", WITH_JACOBIAN)
def test_element_wise_by_the_jacobian(name):
    """Which is diagonal then: the backward pass multiplies by numbers, not by a matrix."""
    function, is_element_wise = QUIZ[name]
    at = AT.abs() if name == "relu" else AT  # where its slope is not 0
    assert is_diagonal(torch.autograd.functional.jacobian(function, at)) == is_element_wise
