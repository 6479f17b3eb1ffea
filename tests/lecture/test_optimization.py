"""The lecture's slides on learning: gradient descent, SGD and minibatch SGD, and where they start from."""

import itertools

import pytest
import torch
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

from torch_mlp import data, nn, training
from torch_mlp.descent import gradient_descent, minibatch_sgd, sgd

METHODS = {"gradient descent": gradient_descent, "SGD": sgd, "minibatch SGD": minibatch_sgd}
WEIGHT_DECAY = 0.01


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussians(count=200):
    """Two overlapping classes in the plane, in float64."""
    draw = generator(1)
    target = torch.randint(2, (count,), generator=draw)
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    return centres[target] + torch.randn(count, 2, generator=draw, dtype=torch.float64), target


def xor(count=200):
    """The signs of two numbers agree or differ: no line separates the classes, a network with a hidden layer does."""
    input = torch.randn(count, 2, generator=generator(1), dtype=torch.float64)
    return input, (input[:, 0] * input[:, 1] > 0).long()


def digits(count=500):
    """Images of 8x8 pixels as rows of numbers, and their classes."""
    images = data.load("digits", "nowhere").first(count)
    return training.to_input(images.train_images, images, torch.float64), images.train_labels


def gradient(model, input, target):
    gradients = torch.autograd.grad(model.loss(input, target), list(model.parameters()))
    return torch.cat([values.flatten() for values in gradients])


class CountingMLP(nn.MLP):
    """A network that counts the steps it was trained for."""

    steps = 0

    def loss(self, input, target):
        self.steps += torch.is_grad_enabled()
        return super().loss(input, target)


@pytest.mark.parametrize(
    ("method", "options", "tolerance"),
    [
        ("gradient descent", {"lr": 1.0, "max_passes": 1000}, 1e-12),
        ("SGD", {"lr": 0.005, "max_passes": 50}, 1e-3),  # its steps do not get smaller: it stays near the optimum
        ("minibatch SGD", {"lr": 0.02, "max_passes": 50, "batch_size": 10}, 1e-3),
    ],
)
def test_logistic_regression_reaches_its_optimum(method, options, tolerance):
    """The loss is convex: all of them come to the one minimum, which scikit-learn's second-order method finds too."""
    input, target = gaussians()
    best = SklearnLogisticRegression(C=1 / (WEIGHT_DECAY * len(input)), tol=1e-12).fit(input, target)
    optimum = nn.LogisticRegression(2, weight_decay=WEIGHT_DECAY, dtype=torch.float64)
    optimum.load_state_dict({"weight": torch.tensor(best.coef_), "bias": torch.tensor(best.intercept_)})
    model = nn.LogisticRegression(2, weight_decay=WEIGHT_DECAY, dtype=torch.float64)
    if method != "gradient descent":
        options = {**options, "generator": generator()}
    records = METHODS[method](model, input, target, **options)
    least = optimum.loss(input, target).item()
    assert records[0].loss > least + 0.1
    assert least - 1e-12 < records[-1].loss < least + tolerance


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gradient descent", {"lr": 2.0, "max_passes": 500}),
        ("SGD", {"lr": 0.1, "max_passes": 20}),
        ("minibatch SGD", {"lr": 0.5, "max_passes": 80, "batch_size": 10}),
    ],
)
def test_a_multilayer_perceptron_learns_xor(method, options):
    input, target = xor()
    model = nn.MLP(2, 8, 2, "tanh", dtype=torch.float64)
    records = METHODS[method](model, input, target, **options)
    assert records[0].loss > 0.5
    assert records[-1].loss < 0.15
    assert (model.predict(input) == target).double().mean() > 0.95


@pytest.mark.parametrize("sampling", ["partition", "random"])
def test_both_ways_to_draw_minibatches_learn(sampling):
    """A random partition for each pass, or every minibatch at random."""
    input, target = digits()
    model = nn.MLP(64, 32, 10, dtype=torch.float64)
    records = minibatch_sgd(
        model, input, target, batch_size=20, lr=0.5, sampling=sampling, max_passes=20, generator=generator()
    )
    assert records[-1].loss < 0.1 * records[0].loss


def test_steps_in_a_pass_over_the_data():
    """Gradient descent makes 1, SGD N and minibatch SGD N / B."""
    input, target = xor(60)
    for steps, descend in {
        1: lambda model: gradient_descent(model, input, target, lr=0.1, max_passes=1),
        60: lambda model: sgd(model, input, target, lr=0.1, max_passes=1),
        12: lambda model: minibatch_sgd(model, input, target, batch_size=5, lr=0.1, max_passes=1),
    }.items():
        model = CountingMLP(2, 4, 2, dtype=torch.float64)
        assert descend(model)[-1].passes == 1
        assert model.steps == steps


def test_the_gradients_of_a_partition_average_to_the_full_gradient():
    """Which is why a minibatch, or one sample, may stand for all of them."""
    input, target = digits(60)
    model = nn.MLP(64, 16, 10, dtype=torch.float64)
    full = gradient(model, input, target)
    order = training.sample_order(60, "partition", generator())
    for batch_size in (1, 12):
        parts = [gradient(model, input[index], target[index]) for index in order.split(batch_size)]
        torch.testing.assert_close(torch.stack(parts).mean(0), full, rtol=0, atol=1e-14)
        assert not torch.allclose(parts[0], full, atol=1e-3)


def test_the_expected_gradient_of_a_random_minibatch_is_the_full_gradient():
    """The mean over every minibatch of 2 of 4 samples that there is, drawn with replacement."""
    input, target = digits(4)
    model = nn.MLP(64, 16, 10, dtype=torch.float64)
    draws = itertools.product(range(4), repeat=2)
    parts = [gradient(model, input[list(index)], target[list(index)]) for index in draws]
    torch.testing.assert_close(torch.stack(parts).mean(0), gradient(model, input, target), rtol=0, atol=1e-14)


def test_minibatch_sgd_takes_fewer_passes_than_gradient_descent():
    """To the same loss from the same weights, each with the best of the same learning rates."""
    input, target = digits(1000)
    start = nn.MLP(64, 32, 10, dtype=torch.float64).state_dict()

    def fewest_passes(batch_size):
        fewest = 60.0
        for lr in (0.5, 1.0, 2.0, 4.0):
            model = nn.MLP(64, 32, 10, dtype=torch.float64)
            model.load_state_dict(start)
            options = {"lr": lr, "max_passes": fewest, "generator": generator()}
            records = minibatch_sgd(model, input, target, batch_size=batch_size, **options)
            fewest = min([fewest, *(record.passes for record in records if record.loss < 0.3)])
        return fewest

    assert fewest_passes(20) < 0.2 * fewest_passes(len(input))
    assert fewest_passes(len(input)) < 60  # it does get there


def test_gradient_descent_goes_down_at_each_step_where_the_learning_rate_is_small_enough():
    """Below 2 / L, L being the greatest curvature; of logistic regression it is at most a quarter of that of x x^T."""
    input, target = gaussians()
    greatest = torch.linalg.eigvalsh(input.T @ input / len(input))[-1].item() / 4 + WEIGHT_DECAY
    model = nn.LogisticRegression(2, bias=False, weight_decay=WEIGHT_DECAY, dtype=torch.float64)
    records = gradient_descent(model, input, target, lr=1.9 / greatest, max_passes=100, tolerance=1e-12)
    assert records[-1].passes < 100
    assert all(after.loss <= before.loss for before, after in itertools.pairwise(records))


@pytest.mark.parametrize("method", METHODS)
def test_a_learning_rate_that_is_too_large_diverges_and_says_so(method):
    """From 2 / curvature on the weights overshoot further at each step; the curvature is at least the weight decay."""
    input, target = gaussians()
    model = nn.LogisticRegression(2, weight_decay=WEIGHT_DECAY, dtype=torch.float64)
    options = {"batch_size": 10} if method == "minibatch SGD" else {}
    with pytest.raises(FloatingPointError, match=r"the loss is (inf|nan) after \S+ passes over .* lower learning rate"):
        METHODS[method](model, input, target, lr=3 / WEIGHT_DECAY, max_passes=1000, **options)
    assert model.loss(input, target).isfinite()


@pytest.mark.parametrize("method", ["gradient descent", "minibatch SGD"])
def test_it_stops_when_it_has_converged_or_the_budget_is_used_up(method):
    """Converged: at the end of a pass the loss has changed by no more than the tolerance since one pass before."""
    input, target = gaussians()
    options = {"lr": 0.1, "tolerance": 1e-4, **({"batch_size": len(input) // 2} if method == "minibatch SGD" else {})}
    for max_passes, converges in ((1000, True), (5, False)):
        model = nn.LogisticRegression(2, weight_decay=WEIGHT_DECAY, dtype=torch.float64)
        torch.nn.init.constant_(model.weight, -1.0)  # far from the minimum
        records = METHODS[method](model, input, target, max_passes=max_passes, **options)
        changes = [abs(after.loss - before.loss) for before, after in itertools.pairwise(records)]
        assert (records[-1].passes < max_passes) == converges
        assert (changes[-1] <= 1e-4) == converges
        assert min(changes[:-1]) > 1e-4


def test_gaussian_initialisation():
    """Weights of mean 0 and the given standard deviation, biases 0."""
    model = nn.MLP(200, 300, 100).init_gaussian_(std=0.05, generator=generator())
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            count = parameter.numel()
            assert parameter.mean().item() == pytest.approx(0, abs=4 * 0.05 / count**0.5)
            assert parameter.std().item() == pytest.approx(0.05, rel=4 / (2 * count) ** 0.5)
            # As many as a Gaussian has beyond one and two standard deviations, where a uniform one has 42 % and none.
            for deviations, share in ((1, 0.3173), (2, 0.0455)):
                beyond = (parameter.abs() > deviations * 0.05).double().mean().item()
                assert beyond == pytest.approx(share, abs=4 * (share / count) ** 0.5)


def test_hidden_units_that_start_alike_stay_alike():
    """The symmetry that a random start breaks: units of equal weights have equal gradients, whatever the data."""
    input, target = xor()
    for start, kinds in (("zero", 1), ("gaussian", 8)):
        model = nn.MLP(2, 8, 2, dtype=torch.float64).init_gaussian_(std=0.5, generator=generator())
        if start == "zero":
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
        minibatch_sgd(model, input, target, batch_size=10, lr=0.5, max_passes=20, generator=generator())
        first, _, last, _ = model.parameters()
        units = torch.cat([first, last.T], dim=1)  # what goes into and out of each hidden unit
        assert last.any()  # it did learn something
        assert len(units.unique(dim=0)) == kinds
