"""torch_mlp/training.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_mlp import data, nn, training


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", "nowhere")


@given(st.integers(0, 200))
def test_a_partition_draws_every_sample_once(num_samples):
    order = training.sample_order(num_samples, "partition", torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(num_samples))


@given(st.integers(1, 200))
def test_random_sampling_draws_as_many(num_samples):
    drawn = training.sample_order(num_samples, "random", torch.Generator().manual_seed(1))
    assert len(drawn) == num_samples
    assert drawn.min() >= 0
    assert drawn.max() < num_samples


def test_random_sampling_repeats_samples():
    drawn = training.sample_order(1000, "random", torch.Generator().manual_seed(1))
    assert 550 < len(drawn.unique()) < 700  # 1 - 1/e of them


def test_orders_differ_between_epochs_and_seeds_and_repeat_with_the_seed():
    def order(generator):
        return training.sample_order(100, "partition", generator).tolist()

    one, again, two = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    first, second = order(one), order(one)
    assert first != second
    assert [first, second] == [order(again), order(again)]
    assert order(two) != first


def test_one_step_is_that_of_sgd_by_hand(digits):
    """w1 = w0 - lr (g + decay w0), then v = momentum v + g and the decayed learning rate."""
    small = digits.first(16)
    mean, std = digits.train_images.double().mean(), digits.train_images.double().std()
    model = nn.MLP(64, 5, 10).double()
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    twin = nn.MLP(64, 5, 10).double()
    velocity = [torch.zeros_like(parameter) for parameter in expected]
    lr, momentum, decay, steps = 0.2, 0.8, 0.01, 4
    generator = torch.Generator().manual_seed(5)
    step = 0
    for _ in range(2):
        for index in training.sample_order(16, "partition", generator).split(8):
            for parameter, value in zip(twin.parameters(), expected, strict=True):
                parameter.data = value.clone()
                parameter.grad = None
            input = (small.train_images[index].reshape(-1, 64).double() - mean) / std
            torch.nn.functional.cross_entropy(twin(input), small.train_labels[index]).backward()
            for place, parameter in enumerate(twin.parameters()):
                gradient = parameter.grad + decay * expected[place]
                velocity[place] = gradient if step == 0 else momentum * velocity[place] + gradient
                expected[place] = expected[place] - lr * (1 - step / steps) * velocity[place]
            step += 1
    options = {"lr": lr, "momentum": momentum, "weight_decay": decay, "seed": 5, "progress": False}
    list(training.train(model, nn.CrossEntropyLoss(), small, epochs=2, batch_size=8, **options))
    for found, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampling", training.SAMPLINGS)
@pytest.mark.parametrize("lr_decay", training.LR_DECAYS)
def test_learns_digits(device, digits, sampling, lr_decay):
    model = nn.MLP(64, 64, 10).to(device)
    options = {"epochs": 20, "sampling": sampling, "lr_decay": lr_decay, "progress": False}
    history = list(training.train(model, nn.CrossEntropyLoss(), digits.to(device), **options))
    assert [metrics.epoch for metrics in history] == list(range(1, 21))
    assert history[-1].test_accuracy > 0.94
    assert history[-1].train_loss < 0.2 * history[0].train_loss
    assert all(metrics.seconds > 0 for metrics in history)


def test_the_same_seed_gives_the_same_bits(device, digits):
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        model = nn.MLP(64, [32, 16], 10).to(device)
        list(training.train(model, nn.CrossEntropyLoss(), digits.to(device), epochs=3, seed=seed, progress=False))
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_fused_layers_learn_what_stock_layers_learn(device, digits):
    """In float64 the two runs stay together to the last digits."""
    ours = nn.MLP(64, 32, 10).to(device, torch.float64)
    stock = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Sigmoid(), torch.nn.Linear(32, 10))
    stock = stock.to(device, torch.float64)
    stock.load_state_dict(ours.state_dict())
    options = {"epochs": 3, "progress": False}
    for model, criterion in ((ours, nn.CrossEntropyLoss()), (stock, torch.nn.CrossEntropyLoss())):
        list(training.train(model, criterion, digits.to(device), **options))
    for our, their in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_training(device, digits, dtype):
    model = nn.MLP(64, 64, 10).to(device, dtype)
    history = list(training.train(model, nn.CrossEntropyLoss(), digits.to(device), epochs=20, progress=False))
    assert history[-1].test_accuracy > 0.9


def test_a_model_stopped_in_the_middle_holds_what_it_learned(digits):
    model = nn.MLP(64, 64, 10)
    criterion = nn.CrossEntropyLoss()
    before = training.evaluate(model, criterion, digits)
    run = training.train(model, criterion, digits, epochs=50, lr_decay="none", progress=False)
    for _ in range(5):
        last = next(run)
    run.close()
    after = training.evaluate(model, criterion, digits)
    assert after.accuracy == last.test_accuracy
    assert after.loss < before.loss


def test_evaluate(device, digits):
    """More images than one evaluation batch, and a last batch that is smaller."""
    images, labels = digits.train_images.repeat(4, 1, 1).to(device), digits.train_labels.repeat(4).to(device)
    model = nn.MLP(64, 8, 10).to(device)
    evaluation = training.evaluate(
        model, nn.CrossEntropyLoss(), digits._replace(test_images=images, test_labels=labels)
    )
    logits = model(images.flatten(1).float() * digits.scale + digits.shift)
    assert evaluation.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert torch.equal(evaluation.predictions, logits.argmax(1).cpu())
    assert evaluation.accuracy == (logits.argmax(1) == labels).double().mean().item()


def test_evaluate_is_in_eval_mode_and_leaves_the_mode_as_it_was(digits):
    model = torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.Dropout(0.5))
    losses = {training.evaluate(model, torch.nn.CrossEntropyLoss(), digits).loss for _ in range(3)}
    assert len(losses) == 1
    assert model.training


def test_divergence_is_an_error(digits):
    model = nn.MLP(64, 64, 10, "relu")
    with pytest.raises(
        FloatingPointError,
        match=r"epoch .: train_epoch: the loss is .* in minibatch \d+ .* a lower learning rate may help",
    ):
        list(training.train(model, nn.CrossEntropyLoss(), digits, lr=1e30, progress=False))


@pytest.mark.parametrize("engine", ["epoch", "autograd"])
def test_a_diverged_epoch_is_taken_back(digits, engine):
    model = nn.MLP(64, 64, 10)
    run = training.train(model, nn.CrossEntropyLoss(), digits, epochs=3, engine=engine, progress=False)
    next(run)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    poisoned = digits._replace(train_images=digits.train_images.float().index_fill(0, torch.tensor([7]), float("nan")))
    run = training.train(model, nn.CrossEntropyLoss(), poisoned, epochs=3, engine=engine, progress=False)
    with pytest.raises(FloatingPointError, match="epoch 1: train_epoch: the loss is nan in minibatch"):
        next(run)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sampling": "sorted"}, "sample_order: expected sampling to be one of partition, random, got 'sorted'"),
        ({"batch_size": 0}, "train: expected epochs and batch_size of at least 1, got 10 and 0"),
        ({"epochs": 0}, "train: expected epochs and batch_size of at least 1, got 0 and 128"),
        ({"lr_decay": "cosine"}, "train: expected lr_decay to be one of linear, none, got 'cosine'"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_option_errors(digits, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        next(training.train(nn.MLP(64, 4, 10), nn.CrossEntropyLoss(), digits, progress=False, **options))


def test_a_head_without_softmax(digits):
    run = training.train(nn.MLP(64, 4, 10, head="binary"), nn.CrossEntropyLoss(), digits, progress=False)
    with pytest.raises(ValueError, match="expected a model with head multiclass for the softmax cross-entropy"):
        next(run)
