"""torch_mlp/descent.py."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from torch_mlp import descent, nn
from torch_mlp.descent import Record, gradient_descent, minibatch_sgd, sgd


class Mean(torch.nn.Module):
    """Half the mean squared distance of the samples to one number, and a diary of the minibatches it was given."""

    def __init__(self, start=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.batches = []

    def loss(self, input, target):
        assert torch.equal(input, target)
        if torch.is_grad_enabled():
            self.batches.append(input.tolist())
        return 0.5 * (self.weight - input).square().mean()


def samples(count):
    return torch.arange(count, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(count, features=3, classes=4, seed=1):
    """Noisy classes in float64, which no straight line separates."""
    draw = generator(seed)
    target = torch.randint(classes, (count,), generator=draw)
    centres = torch.randn(classes, features, generator=draw, dtype=torch.float64)
    return centres[target] + torch.randn(count, features, generator=draw, dtype=torch.float64), target


def descend_by_hand(model, input, target, batches, lr):
    """The weights after these minibatches, of a network with one sigmoid layer, in numpy and by the chain rule."""
    input, onehot = input.numpy(), np.eye(model.out_features)[target.numpy()]
    w1, b1, w2, b2 = (parameter.detach().numpy().copy() for parameter in model.parameters())
    for index in batches:
        x, t = input[index], onehot[index]
        hidden = 1 / (1 + np.exp(-(x @ w1.T + b1)))
        scores = np.exp(hidden @ w2.T + b2)
        delta2 = (scores / scores.sum(1, keepdims=True) - t) / len(x)
        delta1 = delta2 @ w2 * hidden * (1 - hidden)
        w1, b1 = w1 - lr * delta1.T @ x, b1 - lr * delta1.sum(0)
        w2, b2 = w2 - lr * delta2.T @ hidden, b2 - lr * delta2.sum(0)
    return w1, b1, w2, b2


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
@pytest.mark.parametrize("sampling", ["partition", "random"])
def test_the_steps_are_those_by_hand(batch_size, sampling):
    input, target = blobs(30)
    model = nn.MLP(3, 5, 4, dtype=torch.float64)
    draw, batches = generator(), []
    for _ in range(3):
        order = (
            torch.randperm(30, generator=draw) if sampling == "partition" else torch.randint(30, (30,), generator=draw)
        )
        batches += [part.numpy() for part in order.split(batch_size)]
    expected = descend_by_hand(model, input, target, batches, 0.7)
    options = {"batch_size": batch_size, "lr": 0.7, "sampling": sampling, "generator": generator()}
    minibatch_sgd(model, input, target, max_passes=3, **options)
    for parameter, value in zip(model.parameters(), expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=0, atol=1e-12)


def test_a_step_is_the_formula_bit_for_bit():
    """w <- w - lr * gradient; torch.optim.SGD fuses product and difference, which rounds once less."""
    input, target = blobs(30)
    model = nn.MLP(3, 5, 4, dtype=torch.float64)
    gradients = torch.autograd.grad(model.loss(input, target), list(model.parameters()))
    expected = [w.detach() - 0.3 * g for w, g in zip(model.parameters(), gradients, strict=True)]
    gradient_descent(model, input, target, lr=0.3, max_passes=1)
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("descend", ["gradient descent", "sgd"])
def test_the_ends_of_the_batch_size(descend):
    """gradient_descent and sgd are minibatch_sgd with N and with one sample a step, to the last bit."""
    input, target = blobs(25)
    results = []
    for named in (False, True):
        torch.manual_seed(0)
        model = nn.MLP(3, 5, 4, dtype=torch.float64)
        if descend == "sgd":
            options = {
                "lr": 0.1,
                "sampling": "random",
                "max_passes": 4,
                "records_per_pass": 5,
                "generator": generator(),
            }
            run, batch_size = sgd, 1
        else:
            options = {"lr": 0.5, "max_passes": 9, "tolerance": 1e-9}
            run, batch_size = gradient_descent, 25
        if named:
            records = run(model, input, target, **options)
        else:
            records = minibatch_sgd(model, input, target, batch_size=batch_size, **options)
        results.append((records, torch.nn.utils.parameters_to_vector(model.parameters()).detach()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_gradient_descent_draws_nothing():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    gradient_descent(Mean(), samples(5), samples(5), lr=0.1, max_passes=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_partition_uses_each_sample_once_a_pass_in_an_order_of_its_own():
    model = Mean()
    minibatch_sgd(model, samples(10), samples(10), batch_size=4, lr=0.1, max_passes=3)
    assert [len(batch) for batch in model.batches] == [4, 4, 2] * 3
    drawn = [value for batch in model.batches for value in batch]
    passes = [drawn[first : first + 10] for first in (0, 10, 20)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3


@pytest.mark.parametrize("batch_size", [4, 10])
def test_random_sampling_draws_with_replacement(batch_size):
    model = Mean()
    options = {"batch_size": batch_size, "lr": 0.01, "sampling": "random", "max_passes": 200, "generator": generator()}
    minibatch_sgd(model, samples(10), samples(10), **options)
    drawn = [value for batch in model.batches for value in batch]
    assert len(drawn) == 2000
    assert np.bincount(np.int64(drawn), minlength=10) == pytest.approx([200] * 10, abs=5 * math.sqrt(2000 * 0.1 * 0.9))
    full = [batch for batch in model.batches if len(batch) == batch_size]
    repeating = sum(len(set(batch)) < batch_size for batch in full) / len(full)
    chance = 1 - math.prod(1 - place / 10 for place in range(batch_size))  # the birthday problem
    assert repeating == pytest.approx(chance, abs=0.12)
    # Anew each time: a pass is no permutation, and no pass repeats another.
    assert len({tuple(drawn[first : first + 10]) for first in range(0, 2000, 10)}) == 200


def test_the_generator_decides():
    def weights(**options):
        model = Mean()
        sgd(model, samples(9), samples(9), lr=0.1, max_passes=2, **options)
        return model.batches

    assert weights(generator=generator(1)) == weights(generator=generator(1)) != weights(generator=generator(2))
    torch.manual_seed(1)
    assert weights() == weights(generator=generator(1))  # torch's global generator, where none is given


@pytest.mark.parametrize(
    ("batch_size", "records_per_pass", "places"),
    [
        (10, 1, [1, 2]),
        (10, 5, [1, 2]),  # no more records than steps
        (1, 1, [1, 2]),
        (1, 2, [0.5, 1, 1.5, 2]),
        (1, 3, [0.4, 0.7, 1, 1.4, 1.7, 2]),  # after the step that reaches a third
        (4, 2, [0.8, 1, 1.8, 2]),
        (4, 100, [0.4, 0.8, 1, 1.4, 1.8, 2]),
    ],
)
def test_places_of_the_records(batch_size, records_per_pass, places):
    options = {"batch_size": batch_size, "lr": 0.01, "max_passes": 2, "records_per_pass": records_per_pass}
    records = minibatch_sgd(Mean(), samples(10), samples(10), **options)
    assert [record.passes for record in records] == pytest.approx([0, *places], abs=1e-15)


def test_a_record_is_the_loss_over_all_of_the_data():
    """Of more samples than are evaluated at once, with a last part that is smaller, before and after a step."""
    input, target = blobs(descent._EVALUATION_BATCH + 137)
    model = nn.MLP(3, 5, 4, dtype=torch.float64)
    expected = [Record(0.0, torch.nn.functional.cross_entropy(model(input), target).item())]
    records = gradient_descent(model, input, target, lr=0.5, max_passes=1)
    expected.append(Record(1.0, torch.nn.functional.cross_entropy(model(input), target).item()))
    assert [record.passes for record in records] == [0, 1]
    assert [record.loss for record in records] == pytest.approx([record.loss for record in expected], rel=1e-12)


def test_gradient_descent_on_a_parabola():
    """With loss (w - mean)^2 / 2 + const, w - mean shrinks by 1 - lr at each step."""
    model = Mean(start=100.0)
    records = gradient_descent(model, samples(5), samples(5), lr=0.25, max_passes=8)
    assert model.weight.item() == pytest.approx(2 + 98 * 0.75**8, rel=1e-14)
    assert [record.loss for record in records] == pytest.approx(
        [1 + 0.5 * (98 * 0.75**step) ** 2 for step in range(9)], rel=1e-14
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_it_stops_when_it_has_converged(batch_size):
    """At the end of the first pass in which the loss changed by no more than the tolerance."""
    input = torch.full((5,), 2.0, dtype=torch.float64)
    options = {"batch_size": batch_size, "lr": 0.1, "max_passes": 1000, "tolerance": 1e-3, "records_per_pass": 3}
    records = minibatch_sgd(Mean(), input, input, **options)
    ends = [record.loss for record in records if record.passes == int(record.passes)]
    changes = [abs(after - before) for before, after in pairwise(ends)]
    assert records[-1].passes == len(changes) < 1000
    assert changes[-1] <= 1e-3 < min(changes[:-1])


def test_without_a_tolerance_it_stops_where_nothing_changes():
    input = torch.full((4,), 2.0, dtype=torch.float64)
    records = gradient_descent(Mean(), input, input, lr=0.5, max_passes=10_000)
    assert records[-1] == Record(records[-2].passes + 1, records[-2].loss)
    assert records[-2].loss < records[-3].loss
    assert records[-1].passes < 1000


@pytest.mark.parametrize(
    ("batch_size", "max_passes", "sizes", "passes"),
    [
        (1, 0.5, [1] * 5, 0.5),
        (4, 0.5, [4], 0.4),  # the next one would go beyond the budget
        (10, 0.5, [], 0.0),  # as would the only step of gradient descent
        (10, 1.5, [10], 1.0),
        (4, 1.4, [4, 4, 2, 4], 1.4),
        (1, 0.7 * 3, [1] * 21, 2.1),  # 0.7 * 3 is a little less than 2.1 in floating point
    ],
)
def test_the_budget(batch_size, max_passes, sizes, passes):
    model = Mean()
    records = minibatch_sgd(model, samples(10), samples(10), batch_size=batch_size, lr=0.1, max_passes=max_passes)
    assert [len(batch) for batch in model.batches] == sizes
    assert records[-1].passes == passes
    assert records[-1].loss == pytest.approx(0.5 * (model.weight.item() - samples(10)).square().mean().item())
    assert len({record.passes for record in records}) == len(records)  # the end is recorded once


def test_divergence_is_an_error_and_leaves_what_was_recorded_last():
    """On a parabola of curvature 1 the distance to the minimum grows at each step where lr > 2."""
    model = Mean(start=1.0)
    with pytest.raises(
        FloatingPointError,
        match=r"minibatch_sgd: the loss is inf after 162 passes over the data; a lower learning rate may help",
    ):
        gradient_descent(model, samples(1), samples(1), lr=10.0, max_passes=1000)
    assert model.weight.item() == pytest.approx((-9.0) ** 161, rel=1e-12)


def test_a_loss_that_is_not_finite_before_the_first_step():
    model = Mean(start=math.inf)
    with pytest.raises(FloatingPointError, match="the loss is inf after 0 passes over the data; so it is before the"):
        sgd(model, samples(3), samples(3), lr=0.1)
    assert not model.batches
    assert model.weight.item() == math.inf


def test_a_model_stopped_in_the_middle_holds_what_it_learned():
    class Interrupted(Mean):
        def loss(self, input, target):
            if len(self.batches) == 7:
                raise KeyboardInterrupt
            return super().loss(input, target)

    model, twin = Interrupted(), Mean()
    with pytest.raises(KeyboardInterrupt):
        sgd(model, samples(10), samples(10), lr=0.1, generator=generator())
    sgd(twin, samples(10), samples(10), lr=0.1, max_passes=0.7, generator=generator())
    assert model.weight.item() == twin.weight.item() != 0


def test_frozen_parameters_and_gradients_of_others_stay():
    input, target = blobs(20)
    model = nn.MLP(3, 5, 4, dtype=torch.float64)
    frozen, bias, *free = model.parameters()
    frozen.requires_grad_(False)
    bias.grad = torch.ones_like(bias)
    before = [parameter.detach().clone() for parameter in (frozen, bias, *free)]
    minibatch_sgd(model, input, target, batch_size=5, lr=0.1, max_passes=1)
    assert torch.equal(frozen, before[0])
    assert not any(torch.equal(*pair) for pair in zip((bias, *free), before[1:], strict=True))
    assert torch.equal(bias.grad, torch.ones_like(bias))
    assert all(parameter.grad is None for parameter in free)


def test_a_parameter_that_the_loss_does_not_use_stays():
    model, twin = Mean(), Mean()
    model.unused = torch.nn.Parameter(torch.ones(2))
    records = (gradient_descent(each, samples(4), samples(4), lr=0.1, max_passes=2) for each in (model, twin))
    assert next(records) == next(records)
    assert torch.equal(model.unused, torch.ones(2))


def test_a_model_without_parameters_that_learn():
    model = nn.MLP(3, 4, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="expected a model with parameters that require grad, got none"):
        gradient_descent(model, torch.randn(5, 3), torch.zeros(5, dtype=torch.int64), lr=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", ["partition", "random"])
def test_on_every_device(device, dtype, sampling):
    input, target = blobs(200)
    model = nn.MLP(3, 16, 4).to(device, dtype)
    options = {"batch_size": 10, "lr": 0.2, "sampling": sampling, "max_passes": 20, "progress": True}
    records = minibatch_sgd(model, input.to(device, dtype), target.to(device), **options)
    assert records[-1].loss < 0.9 * records[0].loss


def test_progress_is_silent_without_a_terminal(capsys):
    minibatch_sgd(Mean(), samples(4), samples(4), batch_size=2, lr=0.1, max_passes=2, progress=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "expected batch_size from 1 to the number of samples, got 0 for 6 samples"),
        ({"batch_size": 7}, "expected batch_size from 1 to the number of samples, got 7 for 6 samples"),
        ({"lr": 0.0}, "expected lr above 0 and finite, got 0.0"),
        ({"lr": -1.0}, "expected lr above 0 and finite, got -1.0"),
        ({"lr": math.nan}, "expected lr above 0 and finite, got nan"),
        ({"max_passes": 0}, "expected max_passes above 0 and finite, got 0"),
        ({"max_passes": math.inf}, "expected max_passes above 0 and finite, got inf"),
        ({"tolerance": -1e-3}, "expected tolerance of at least 0 and finite, got -0.001"),
        ({"tolerance": math.nan}, "expected tolerance of at least 0 and finite, got nan"),
        ({"records_per_pass": 0}, "expected records_per_pass of at least 1, got 0"),
        ({"sampling": "sorted"}, "sample_order: expected sampling to be one of partition, random, got 'sorted'"),
        ({"sampling": "sorted", "batch_size": 6}, "sample_order: expected sampling to be one of partition, random"),
    ],
)
def test_option_errors(options, sentence):
    model = Mean()
    with pytest.raises(ValueError, match=sentence):
        minibatch_sgd(model, samples(6), samples(6), **{"batch_size": 2, "lr": 0.1, **options})
    assert not model.batches


@pytest.mark.parametrize("descend", [sgd, gradient_descent])
@pytest.mark.parametrize(("inputs", "targets"), [((6,), (5,)), ((6,), ()), ((0,), (0,)), ((0, 3), (0,))])
def test_shapes_that_do_not_fit(descend, inputs, targets):
    with pytest.raises(RuntimeError, match=r"expected input of shape \(N, \*\) and target of shape \(N, \*\), of at"):
        descend(Mean(), torch.zeros(inputs), torch.zeros(targets), lr=0.1)


@pytest.mark.parametrize("descend", [sgd, gradient_descent])
def test_a_number_is_no_data(descend):
    with pytest.raises(
        RuntimeError, match=r"expected input of shape \(N, \*\) .* of at least one sample, got \(\) and"
    ):
        descend(Mean(), torch.zeros(()), torch.zeros(()), lr=0.1)
