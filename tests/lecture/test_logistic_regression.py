"""Logistic regression, as the lecture has it: p(y | x) = 1 / (1 + exp(-y w.x)), maximum likelihood, MAP."""

import math
from itertools import pairwise

import pytest
import torch
from sklearn.linear_model import LogisticRegression as Sklearn

from torch_mlp.nn import LogisticRegression


def make(samples=40, features=3, seed=1, **options):
    """A model with random weights, samples, and labels of -1 and +1 that no line separates."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(samples, features, dtype=torch.float64, generator=generator)
    noise = torch.randn(samples, dtype=torch.float64, generator=generator)
    model = LogisticRegression(features, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, input, torch.where(input.sum(1) + 2 * noise > 0, 1, -1)


def separable(samples=40):
    _, input, _ = make(samples)
    input = input[input.sum(1).abs() > 0.5]
    return input, torch.where(input.sum(1) > 0, 1, -1)


def score(model, input):
    """w.x, and b where there is one, by hand."""
    return input @ model.weight[0] + (0 if model.bias is None else model.bias)


def descend(model, input, target, lr, steps):
    """Plain gradient descent on the sum; the norm of the weights after each step."""
    norms = []
    for _ in range(steps):
        grads = torch.autograd.grad(model.loss(input, target, reduction="sum"), list(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter -= lr * grad
        norms.append(model.weight.norm().item())
    return norms


@pytest.mark.parametrize("bias", [True, False])
def test_probability_of_the_positive_class(bias):
    """p(+1 | x) = 1 / (1 + exp(-w.x))."""
    model, input, _ = make(bias=bias)
    torch.testing.assert_close(model.predict_proba(input), 1 / (1 + torch.exp(-score(model, input).detach())))


def test_probabilities_of_both_classes_sum_to_1():
    """p(-1 | x) = 1 / (1 + exp(w.x)) is p(+1 | x) of a model with the opposite weights."""
    model, input, _ = make()
    positive = model.predict_proba(input)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    torch.testing.assert_close(positive + model.predict_proba(input), torch.ones(40, dtype=torch.float64))


def test_the_classes_part_where_both_are_as_probable():
    """On the line w.x = 0."""
    model, input, _ = make()
    assert torch.equal(model.predict(input), (score(model, input) >= 0).long())
    assert torch.equal(model.predict(input), (model.predict_proba(input) >= 0.5).long())
    with torch.no_grad():
        on_the_line = -model.bias * model.weight / model.weight.square().sum()
    torch.testing.assert_close(model.predict_proba(on_the_line), torch.tensor([0.5], dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
def test_loss_is_the_negative_log_likelihood(bias):
    """Of the product of p(y | x) over the samples, which are few enough for it not to vanish."""
    model, input, target = make(bias=bias)
    likelihood = math.prod(
        1 / (1 + math.exp(-y * s)) for y, s in zip(target.tolist(), score(model, input).tolist(), strict=True)
    )
    loss = model.loss(input, target, reduction="sum").item()
    assert loss == pytest.approx(-math.log(likelihood), rel=1e-12)
    assert model.loss(input, target).item() == pytest.approx(loss / 40, rel=1e-12)


def test_loss_is_log_1_plus_exp():
    model, input, target = make()
    expected = torch.log(1 + torch.exp(-target * score(model, input)))
    torch.testing.assert_close(model.loss(input, target, reduction="none"), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_of_large_scores(dtype):
    """exp(1e4) is infinite, but log(1 + exp(1e4)) is 1e4, and log(1 + exp(-1e4)) is 0."""
    model = LogisticRegression(1, bias=False, dtype=dtype)
    input = torch.tensor([[1.0], [-1.0]], dtype=dtype)
    with torch.no_grad():
        model.weight.fill_(1e4)
    for target, value, gradient in (([1, -1], 0.0, 0.0), ([-1, 1], 2e4, 2.0)):
        loss = model.loss(input, torch.tensor(target), reduction="sum")
        assert loss.item() == value
        assert torch.autograd.grad(loss, model.weight)[0].item() == gradient


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels_of_0_and_of_minus_1_are_the_same(reduction):
    """y in {0, 1} with the binary cross-entropy, y in {-1, +1} with log(1 + exp(-y w.x))."""
    model, input, target = make(weight_decay=0.3)
    results = []
    for labels in (target, (target + 1) // 2):
        loss = model.loss(input, labels, reduction)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    for signed, zero_one in zip(*results, strict=True):
        assert torch.equal(signed, zero_one)


def test_map_adds_half_lambda_times_the_square_of_the_norm():
    """The negative logarithm of a Gaussian prior of the weights, up to a constant; the bias has none."""
    model, input, target = make()
    likelihood = model.loss(input, target, reduction="sum")
    model.weight_decay = 0.7
    expected = likelihood + 0.35 * (model.weight**2).sum()
    torch.testing.assert_close(model.loss(input, target, reduction="sum"), expected)
    prior = torch.distributions.Normal(0.0, 0.7**-0.5)
    at_0 = prior.log_prob(torch.zeros_like(model.weight)).sum()
    torch.testing.assert_close(expected, likelihood - prior.log_prob(model.weight).sum() + at_0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_gradient_by_hand(weight_decay):
    """sum of (p - y) x, y being 0 or 1, and lambda w; of the bias, sum of (p - y)."""
    model, input, target = make(weight_decay=weight_decay)
    error = model.predict_proba(input) - (target + 1) / 2
    upstream = -1.7
    by_weight, by_bias = torch.autograd.grad(
        upstream * model.loss(input, target, reduction="sum"), [model.weight, model.bias]
    )
    torch.testing.assert_close(by_weight[0], upstream * (error @ input + weight_decay * model.weight[0]))
    torch.testing.assert_close(by_bias, upstream * error.sum(0, keepdim=True))


def test_lambda_of_the_mean_is_that_of_the_sum_over_the_number_of_samples():
    model, input, target = make(weight_decay=0.8)
    of_sum = model.loss(input, target, reduction="sum")
    model.weight_decay = 0.8 / 40
    torch.testing.assert_close(model.loss(input, target), of_sum / 40)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_loss_is_convex(weight_decay):
    """The eigenvalues of its second derivative, the sum of p (1 - p) x x^T and lambda, are not negative."""
    model, input, target = make(bias=False, weight_decay=weight_decay)
    loss = model.loss(input, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, model.weight, create_graph=True)
    hessian = torch.cat([torch.autograd.grad(each, model.weight, retain_graph=True)[0] for each in grad[0]])
    p = model.predict_proba(input)
    expected = (input.T * (p * (1 - p))) @ input + weight_decay * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(hessian, expected)
    assert torch.linalg.eigvalsh(hessian).min() >= weight_decay


@pytest.mark.parametrize("weight_decay", [0.1, 2.0])
@pytest.mark.parametrize("method", ["LBFGS", "gradient descent"])
def test_minimum_is_that_of_scikit_learn(method, weight_decay):
    model, input, target = make(weight_decay=weight_decay)
    if method == "LBFGS":
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=200, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = model.loss(input, target, reduction="sum")
            loss.backward()
            return loss

        optimizer.step(closure)
    else:
        descend(model, input, target, lr=0.05, steps=500)
    theirs = Sklearn(C=1 / weight_decay, tol=1e-10, max_iter=1000).fit(input.numpy(), target.numpy())
    torch.testing.assert_close(model.weight.detach(), torch.from_numpy(theirs.coef_), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.bias.detach(), torch.from_numpy(theirs.intercept_), rtol=1e-4, atol=1e-4)
    expected = torch.from_numpy(theirs.predict_proba(input.numpy())[:, 1])
    torch.testing.assert_close(model.predict_proba(input), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_separable_classes_grow_without_end():
    """Once every sample is on its side, twice the weights are always better: there is no minimum."""
    input, target = separable()
    model = LogisticRegression(3, dtype=torch.float64)
    norms = descend(model, input, target, lr=0.1, steps=2000)
    assert torch.equal(model.predict(input), (target + 1) // 2)
    assert all(later > earlier for earlier, later in pairwise(norms[100:]))
    # As the logarithm of the steps: no less from the 500th to the 2000th than from the 125th to the 500th.
    assert norms[1999] - norms[499] > 0.8 * (norms[499] - norms[124]) > 0.5
    with torch.no_grad():
        before = model.loss(input, target).item()
        for parameter in model.parameters():
            parameter.mul_(2)
        assert model.loss(input, target).item() < before


@pytest.mark.parametrize("weight_decay", [0.01, 0.1, 1.0])
def test_weights_of_separable_classes_stay_bounded_with_map(weight_decay):
    """From weights of 0 the loss N log 2 only falls, and lambda / 2 ||w||^2 is a part of it."""
    input, target = separable()
    model = LogisticRegression(3, weight_decay=weight_decay, dtype=torch.float64)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    norms = descend(model, input, target, lr=0.1, steps=2000)
    assert max(norms) < math.sqrt(2 * len(input) * math.log(2) / weight_decay)
    if weight_decay >= 0.1:
        assert norms[-1] == pytest.approx(norms[-500], rel=1e-6)
