"""torch_mlp/epoch.py and the op train_epoch: against SGD by stock torch in float64, option by option."""

import math
import os
import signal

import pytest
import torch
from conftest import assert_no_less_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_mlp import epoch, nn, train_epoch
from torch_mlp.engine import choose_engine, layers_of

STOCK = {"identity": torch.nn.Identity, "sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def images_of(kind, count, features, generator):
    """Images of which most pixels are 0, of which none is, and others."""
    if kind == "floats":
        return torch.randn(count, features, generator=generator)
    images = torch.randint(1, 256, (count, features), generator=generator, dtype=torch.uint8)
    share = {"sparse": 0.2, "half": 0.5, "dense": 1.0, "empty": 0.0}[kind]
    return images * (torch.rand(count, features, generator=generator) < share)


def stock_epochs(model, images, labels, orders, batch_size, dtype, rates, momentum, decay, scale, shift):
    """SGD by stock torch layers; the final parameters and the mean loss of each epoch."""
    layers = []
    for layer in model.children():
        layers += [torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)]
        layers += [STOCK[layer.activation]()]
    twin = torch.nn.Sequential(*layers)
    twin.load_state_dict(model.state_dict())
    twin.to(dtype)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=momentum, weight_decay=decay)
    input = images.to(dtype) * scale + shift
    losses = []
    for order in orders:
        total = 0.0
        for index, rate in zip(order.split(batch_size), rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            loss = torch.nn.functional.cross_entropy(twin(input[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
        losses.append(total / len(order))
    return [parameter.detach() for parameter in twin.parameters()], losses


def check_against_stock(
    widths, kind, count, batch_size, *, activation="sigmoid", momentum=0.0, decay=0.0, bias=True, shift=-0.4, epochs=2
):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7)
    images = images_of(kind, count, widths[0], generator)
    labels = torch.randint(widths[-1], (count,), generator=generator)
    scale = 1.0 if kind == "floats" else 1 / 100
    rates = torch.linspace(0.3, 0.1, math.ceil(count / batch_size)).tolist()
    orders = [torch.randperm(count, generator=generator) for _ in range(epochs)]
    model = nn.MLP(widths[0], widths[1:-1], widths[-1], activation, bias)
    arguments = (images, labels, orders, batch_size)
    options = (rates, momentum, decay, scale, shift)
    truth, true_losses = stock_epochs(model, *arguments, torch.float64, *options)
    eager, _ = stock_epochs(model, *arguments, torch.float32, *options)
    settings_ = {"momentum": momentum, "weight_decay": decay, "scale": scale, "shift": shift, "engine": "epoch"}
    for order, true_loss in zip(orders, true_losses, strict=True):
        loss = train_epoch(model, images, labels, batch_size=batch_size, lr=rates, order=order, **settings_)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(true_loss, rel=1e-5)
    for ours, theirs, true in zip(model.parameters(), eager, truth, strict=True):
        # Sums are taken in another order: some units of rounding, which add up over the steps, are a matter of luck.
        slack = 4 * torch.finfo(torch.float32).eps * true.square().mean().sqrt() * math.sqrt(epochs * len(rates))
        error = (ours.detach().double() - true).square().mean().sqrt()
        if error > slack:
            assert_no_less_accurate(ours.detach(), theirs, true)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["sparse", "dense", "floats"])
@pytest.mark.parametrize("hidden", [[], [5], [33], [150, 20], [17, 40, 9]], ids=str)
def test_against_float64(threads, kind, hidden):
    torch.set_num_threads(threads)
    check_against_stock([61, *hidden, 10], kind, 150, 64)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.01), (0.9, 0.0), (0.7, 0.02)])
def test_every_option_against_float64(kind, activation, momentum, decay):
    check_against_stock([30, 20, 6], kind, 100, 30, activation=activation, momentum=momentum, decay=decay)
    check_against_stock([30, 7], kind, 100, 30, activation=activation, momentum=momentum, decay=decay)


@pytest.mark.parametrize("kind", ["sparse", "half", "empty", "dense", "floats"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_images_biases_and_shifts_against_float64(kind, bias, shift):
    check_against_stock([70, 24, 3], kind, 90, 40, bias=bias, shift=shift, momentum=0.5)


@given(
    st.lists(st.integers(1, 140), min_size=2, max_size=5),
    st.integers(1, 200),
    st.integers(1, 130),
    st.sampled_from(["sparse", "dense"]),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_any_sizes_against_float64(widths, count, batch_size, kind, threads):
    torch.set_num_threads(threads)
    check_against_stock(widths, kind, count, min(batch_size, count), epochs=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_engines_agree(dtype):
    generator = torch.Generator().manual_seed(1)
    images, labels = images_of("sparse", 500, 100, generator), torch.randint(10, (500,), generator=generator)
    order = torch.randperm(500, generator=generator)
    one = nn.MLP(100, [40, 30], 10).to(dtype)
    two = nn.MLP(100, [40, 30], 10).to(dtype)
    two.load_state_dict(one.state_dict())
    options = {"batch_size": 32, "lr": 0.2, "momentum": 0.9, "order": order, "shift": -0.1}
    losses = [
        train_epoch(model, images, labels, engine=engine, **options)
        for model, engine in ((one, "auto"), (two, "autograd"))
    ]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        assert (left - right).norm() <= tolerance * right.norm()


def some_data(count=200, features=40, classes=5, kind="sparse"):
    generator = torch.Generator().manual_seed(3)
    return images_of(kind, count, features, generator), torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_the_same_threads_give_the_same_bits(kind):
    images, labels = some_data(kind=kind)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = []
        for _ in range(3):
            torch.manual_seed(0)
            model = nn.MLP(40, [50, 20], 5)
            for _ in range(3):
                train_epoch(model, images, labels, batch_size=16, lr=0.5, momentum=0.9)
            results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_training_goes_on_with_torchs_optimizer_and_back():
    """Epochs by the op, by stock steps and by the op again, against stock steps alone in float64."""
    images, labels = some_data()
    orders = [torch.randperm(200) for _ in range(3)]
    rates = [0.2] * 7
    model = nn.MLP(40, [12], 5)
    truth, _ = stock_epochs(model, images, labels, orders, 32, torch.float64, rates, 0.9, 0.01, 1 / 255, 0.0)
    options = {"batch_size": 32, "lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}
    train_epoch(model, images, labels, order=orders[0], engine="epoch", **options)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    optimizer.load_state_dict(epoch.optimizer_of(model).state_dict())
    for index in orders[1].split(32):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[index] / 255), labels[index]).backward()
        optimizer.step()

    epoch.optimizer_of(model).load_state_dict(optimizer.state_dict())
    train_epoch(model, images, labels, order=orders[2], engine="epoch", **options)
    for parameter, true in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.detach().double(), true, rtol=1e-4, atol=1e-6)


def test_an_optimizer_gives_its_options_and_keeps_the_momentum():
    images, labels = some_data()
    one, two = nn.MLP(40, [12], 5), nn.MLP(40, [12], 5)
    two.load_state_dict(one.state_dict())
    optimizer = torch.optim.SGD(one.parameters(), lr=0.3, momentum=0.8, weight_decay=0.1)
    order = torch.arange(200)
    for _ in range(2):
        train_epoch(one, images, labels, batch_size=50, optimizer=optimizer, order=order)
        train_epoch(two, images, labels, batch_size=50, lr=0.3, momentum=0.8, weight_decay=0.1, order=order)
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right)
        assert optimizer.state[left]["momentum_buffer"].abs().sum() > 0


def test_nothing_but_the_parameters_moves_and_autograd_knows():
    images, labels = some_data()
    model, order = nn.MLP(40, [12], 5), torch.randperm(200)
    copies = images.clone(), labels.clone(), order.clone()
    versions = [parameter._version for parameter in model.parameters()]
    loss = model(images.float()).sum()
    train_epoch(model, images, labels, batch_size=64, lr=0.1, order=order)
    assert all(torch.equal(*pair) for pair in zip(copies, (images, labels, order), strict=True))
    assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_random_order_is_the_generators():
    images, labels = some_data()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = nn.MLP(40, [12], 5)
        train_epoch(model, images, labels, batch_size=10, lr=0.5, generator=torch.Generator().manual_seed(seed))
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("engine", ["epoch", "autograd"])
def test_progress_counts_every_image(engine, monkeypatch):
    monkeypatch.setattr(epoch, "_OPERATIONS_PER_CALL", 1e5)
    images, labels = some_data()
    calls = []
    model = nn.MLP(40, [12], 5)
    loss = train_epoch(
        model, images, labels, batch_size=3, lr=0.1, engine=engine, progress=lambda *call: calls.append(call)
    )
    assert sum(count for count, _ in calls) == 200
    assert len(calls) > 1
    assert all(0.5 < last.item() / loss.item() < 2 for _, last in calls)


def test_several_calls_are_as_exact_as_one(monkeypatch):
    monkeypatch.setattr(epoch, "_OPERATIONS_PER_CALL", 1e5)
    check_against_stock([61, 33, 10], "sparse", 150, 16, momentum=0.9)


@pytest.mark.parametrize("engine", ["epoch", "autograd"])
def test_divergence_names_the_minibatch(engine):
    images, labels = some_data(kind="floats")
    images[37] = math.nan
    with pytest.raises(FloatingPointError, match=r"train_epoch: the loss is nan in minibatch 3 \(counted from 0\)"):
        train_epoch(nn.MLP(40, [12], 5), images, labels, batch_size=10, lr=0.1, order=torch.arange(200), engine=engine)


def test_ctrl_c_leaves_a_model_that_goes_on(monkeypatch):
    monkeypatch.setattr(epoch, "_OPERATIONS_PER_CALL", 1e5)
    images, labels = some_data(count=4000)
    model = nn.MLP(40, [12], 5)
    calls = []

    def progress(count, loss):
        calls.append(count)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_epoch(model, images, labels, batch_size=10, lr=0.1, momentum=0.9, progress=progress)
    assert 3 <= len(calls) <= 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert train_epoch(model, images, labels, batch_size=10, lr=0.1, momentum=0.9).isfinite()


def test_an_epoch_that_ends_early_leaves_the_learning_rate_of_the_optimizer():
    images, labels = some_data(kind="floats")
    images[150] = math.nan
    model = nn.MLP(40, [12], 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for engine in ("epoch", "autograd"):
        with pytest.raises(FloatingPointError):
            train_epoch(model, images, labels, batch_size=10, lr=[0.1] * 20, optimizer=optimizer, engine=engine)
        assert optimizer.param_groups[0]["lr"] == 0.3


SEQUENTIAL = torch.nn.Sequential
LINEAR = torch.nn.Linear


def test_stock_layers_are_trained_too():
    images, labels = some_data()
    model = SEQUENTIAL(torch.nn.Flatten(), LINEAR(40, 12), torch.nn.Tanh(), nn.LinearSigmoid(12, 8), LINEAR(8, 5))
    twin = nn.MLP(40, [12, 8], 5)
    assert [layer.activation for layer in layers_of(model)] == ["tanh", "sigmoid", "identity"]
    assert choose_engine(model) == choose_engine(twin) == "epoch"
    before = train_epoch(model, images, labels, batch_size=20, lr=0.5)
    for _ in range(20):
        after = train_epoch(model, images, labels, batch_size=20, lr=0.5)
    assert after < before


def hooked():
    model = nn.MLP(40, [12], 5)
    next(model.children()).register_forward_hook(lambda *_: None)
    return model


def tied():
    model = SEQUENTIAL(LINEAR(5, 5), torch.nn.Tanh(), LINEAR(5, 5))
    model[2].weight = model[0].weight
    return model


def frozen():
    model = nn.MLP(40, [12], 5)
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: LINEAR(40, 5), "expected an MLP or a Sequential of linear layers, got Linear"),
        (lambda: SEQUENTIAL(LINEAR(40, 5), torch.nn.Dropout()), "got Dropout as layer 1"),
        (lambda: SEQUENTIAL(torch.nn.Tanh(), LINEAR(40, 5)), "got Tanh as layer 0"),
        (lambda: SEQUENTIAL(LINEAR(40, 5), torch.nn.ReLU()), "expected a last layer that gives logits, got a relu"),
        (lambda: SEQUENTIAL(), "expected a network of at least one linear layer, got none"),
        (
            lambda: nn.MLP(40, [12], 5).double(),
            r"expected float32 parameters on the CPU, got torch.float64 .* 0.weight",
        ),
        (hooked, r"expected layers without hooks, got some on 0 \(LinearAct\)"),
        (tied, r"expected parameters of their own, got \d.weight and \d.weight that share memory"),
        (frozen, "got one in 0.weight that requires no grad"),
    ],
)
def test_models_the_op_cannot_train(model, sentence):
    images, labels = some_data()
    model = model()
    with pytest.raises(ValueError, match=f"train_epoch: .*{sentence}.*; use the engine autograd"):
        train_epoch(model, images, labels, batch_size=10, lr=0.1, engine="epoch")
    assert choose_engine(model) == "autograd"


GOOD = {"batch_size": 10, "lr": 0.1}


@pytest.mark.parametrize("engine", ["epoch", "autograd"])
@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"batch_size": 0}, ValueError, "expected batch_size from 1 to the number of images, got 0 for 200 images"),
        ({"batch_size": 201}, ValueError, "expected batch_size from 1 to the number of images, got 201 for 200 images"),
        ({"lr": None}, ValueError, "expected lr or an optimizer, got neither"),
        ({"lr": -1.0}, ValueError, "expected lr of at least 0 and finite"),
        ({"lr": math.nan}, ValueError, "expected lr of at least 0 and finite"),
        ({"lr": [0.1] * 3}, ValueError, r"expected one lr, or one for each of 20 minibatches, got \(3,\)"),
        ({"order": torch.zeros(3)}, RuntimeError, r"expected order of shape \(M,\) and dtype int64"),
        ({"order": torch.full((20,), 200)}, IndexError, r"out of (bounds|range)|in \[0, 200\)"),
        ({"images": torch.zeros(200)}, RuntimeError, r"expected images of shape \(N, \*\)"),
        ({"images": torch.zeros(200, 40, dtype=torch.int64)}, RuntimeError, "uint8 or floating-point images"),
        ({"images": torch.zeros(200, 39)}, RuntimeError, "39"),
        ({"labels": torch.zeros(199, dtype=torch.int64)}, RuntimeError, r"labels of shape \(N,\)"),
        ({"labels": torch.zeros(200)}, RuntimeError, "dtype int64"),
        ({"labels": torch.full((200,), 5)}, IndexError, r"5"),
        ({"labels": torch.full((200,), -1)}, IndexError, r"-1"),
    ],
    ids=str,
)
def test_bad_arguments(engine, options, error, sentence):
    images, labels = some_data()
    model = nn.MLP(40, [12], 5)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    arguments = {"images": images, "labels": labels, **GOOD, **options}
    with pytest.raises(error, match=sentence):
        train_epoch(model, engine=engine, **arguments)
    assert all(torch.equal(left, right) for left, right in zip(before, model.parameters(), strict=True))


def test_bad_optimizers():
    images, labels = some_data()
    model = nn.MLP(40, [12], 5)
    for optimizer, sentence in [
        (torch.optim.Adam(model.parameters()), "expected a torch.optim.SGD with one group"),
        (torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True), "expected an optimizer without nesterov"),
        (torch.optim.SGD(nn.MLP(40, [12], 5).parameters(), 0.1), "expected the optimizer of the model's parameters"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            train_epoch(model, images, labels, batch_size=10, optimizer=optimizer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="expected momentum and weight_decay from the optimizer"):
        train_epoch(model, images, labels, batch_size=10, optimizer=optimizer, momentum=0.9)
    with pytest.raises(KeyError, match="optimizer_of: expected a model that train_epoch has trained"):
        epoch.optimizer_of(model)
    with pytest.raises(ValueError, match="expected engine to be one of auto, epoch, autograd, got 'fast'"):
        train_epoch(model, images, labels, batch_size=10, lr=0.1, engine="fast")
