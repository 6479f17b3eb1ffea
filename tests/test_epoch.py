"""torch_mlp/epoch.py: engines, optimizers, progress and errors. What the op computes is in test_train_epoch.py."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from test_train_epoch import _threads, check_against_stock, images_of, some_data, stock_epochs  # noqa: F401

from torch_mlp import epoch, nn, train_epoch


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs the memory figures of Linux")
def test_memory_is_a_few_minibatches():
    """Of 157 MB of images, an epoch in another process adds less than a tenth to its peak."""
    code = """
import resource, torch, torch_mlp
images, labels = torch.randint(256, (200_000, 784), dtype=torch.uint8), torch.randint(10, (200_000,))
model = torch_mlp.nn.MLP(784, 16, 10)
order = torch.randperm(200_000)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch_mlp.train_epoch(model, images[:1000], labels[:1000], batch_size=64, lr=0.1)
before = peak()
torch_mlp.train_epoch(model, images, labels, batch_size=64, lr=0.1, order=order)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 15_000  # kilobytes


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs the memory figures of Linux")
def test_threads_that_do_not_start():
    """In an address space with no room for their stacks: an error, nothing has moved, and fewer threads go on."""
    code = """
import resource, torch, torch_mlp
images, labels = torch.randint(256, (200, 40), dtype=torch.uint8), torch.randint(5, (200,))
model = torch_mlp.nn.MLP(40, 12, 5)
torch_mlp.train_epoch(model, images, labels, batch_size=10, lr=0.1)
before = [parameter.detach().clone() for parameter in model.parameters()]
order = torch.arange(200)
torch.set_num_threads(400)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 500_000_000, resource.RLIM_INFINITY))
try:
    torch_mlp.train_epoch(model, images, labels, batch_size=10, lr=0.1, order=order)
except RuntimeError as error:
    print(error)
assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
torch.set_num_threads(2)
print(torch_mlp.train_epoch(model, images, labels, batch_size=10, lr=0.1, order=order).isfinite().item())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    error, trained = run.stdout.strip().splitlines()
    assert "train_epoch: expected 400 threads, got " in error
    assert trained == "True"


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
    with pytest.raises(ValueError, match="expected precision to be one of full, bf16, got 'half'"):
        train_epoch(model, images, labels, batch_size=10, lr=0.1, precision="half")
    with pytest.raises(ValueError, match="expected float32 parameters with precision bf16"):
        train_epoch(model.double(), images, labels, batch_size=10, lr=0.1, precision="bf16")
