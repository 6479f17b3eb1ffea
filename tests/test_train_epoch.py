"""The op train_epoch: against SGD by stock torch in float64, option by option, on the CPU and on a GPU."""

import math

import pytest
import torch
from conftest import assert_no_less_accurate, why_no_cuda
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_mlp import nn, ops, train_epoch

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


def some_data(count=200, features=40, classes=5, kind="sparse"):
    generator = torch.Generator().manual_seed(3)
    return images_of(kind, count, features, generator), torch.randint(classes, (count,), generator=generator)


def stock_epochs(model, images, labels, orders, batch_size, dtype, rates, momentum, decay, scale, shift):
    """SGD by stock torch layers; the final parameters and the mean loss of each epoch."""
    layers = []
    for layer in model.children():
        layers += [torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)]
        layers += [STOCK[layer.activation]()]
    twin = torch.nn.Sequential(*layers)
    twin.load_state_dict(model.state_dict())
    twin.to(images.device, dtype)
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
    return [parameter.detach().cpu() for parameter in twin.parameters()], losses


def check_against_stock(
    widths,
    kind,
    count,
    batch_size,
    *,
    activation="sigmoid",
    momentum=0.0,
    decay=0.0,
    bias=True,
    shift=-0.4,
    epochs=2,
    dtype=torch.float32,
    precision="full",
    device="cpu",
    times_as_accurate=1,
):
    """Parameters and losses no further from float64 than those of stock torch in the same dtype or with autocast."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7)
    images = images_of(kind, count, widths[0], generator)
    labels = torch.randint(widths[-1], (count,), generator=generator)
    scale = 1.0 if kind == "floats" else 1 / 100
    rates = torch.linspace(0.3, 0.1, math.ceil(count / batch_size)).tolist()
    orders = [torch.randperm(count, generator=generator) for _ in range(epochs)]
    model = nn.MLP(widths[0], widths[1:-1], widths[-1], activation, bias)
    start = [parameter.detach().double() for parameter in model.parameters()]
    options = (rates, momentum, decay, scale, shift)
    truth, true_losses = stock_epochs(model, images, labels, orders, batch_size, torch.float64, *options)
    model.to(device, dtype)
    images, labels, orders = images.to(device), labels.to(device), [order.to(device) for order in orders]
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        eager, _ = stock_epochs(model, images, labels, orders, batch_size, dtype, *options)
    settings_ = {"momentum": momentum, "weight_decay": decay, "scale": scale, "shift": shift, "engine": "epoch"}
    settings_["precision"] = precision
    rounding = torch.finfo(torch.bfloat16 if precision == "bf16" else dtype).eps
    for order, true_loss in zip(orders, true_losses, strict=True):
        loss = train_epoch(model, images, labels, batch_size=batch_size, lr=rates, order=order, **settings_)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(true_loss, rel=100 * rounding if precision == "full" else 2 * rounding)
    for ours, theirs, true, before in zip(model.parameters(), eager, truth, start, strict=True):
        # Sums are taken in another order: some units of rounding, which add up over the steps, are a matter of luck.
        # A value may have come near 0 from afar.
        scale = (true.square() + before.square()).mean().sqrt()
        slack = 4 * torch.finfo(dtype).eps * scale * math.sqrt(epochs * len(rates))
        ours = ours.detach().cpu()
        error = (ours.double() - true).square().mean().sqrt()
        if error > slack:
            bound = true + (theirs.double() - true) / times_as_accurate
            assert_no_less_accurate(ours, bound.to(dtype), true)


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


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["sparse", "dense", "floats"])
@pytest.mark.parametrize("hidden", [[], [18], [33], [150, 21], [17, 40, 19], [1600, 40]], ids=str)
def test_bfloat16_is_ten_times_as_accurate_as_autocast(threads, kind, hidden):
    """Which rounds outputs, gradients and their sums too. The widest layer is summed in two parts by a matrix unit."""
    torch.set_num_threads(threads)
    check_against_stock([61, *hidden, 23], kind, 150, 63, precision="bf16", times_as_accurate=15)


@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.01), (0.9, 0.0), (0.7, 0.02)])
def test_every_option_in_bfloat16(activation, momentum, decay):
    options = {"activation": activation, "momentum": momentum, "decay": decay, "bias": momentum != 0.7}
    check_against_stock([31, 20, 18, 6], "dense", 100, 31, precision="bf16", **options)


def test_bfloat16_keeps_what_it_does_not_use_out():
    """The last of an odd number of images is paired with zeros, not with whatever comes next."""
    images, labels = some_data(count=33, features=41, kind="floats")
    images[0] = math.inf
    model = nn.MLP(41, [20], 5)
    order = torch.arange(1, 32)
    assert train_epoch(model, images, labels, batch_size=31, lr=0.1, order=order, precision="bf16").isfinite()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["sparse", "floats"])
@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.0, 0.01), (0.9, 0.0), (0.7, 0.02)])
def test_every_option_in_float64(kind, activation, momentum, decay):
    options = {"activation": activation, "momentum": momentum, "decay": decay, "bias": momentum != 0.7}
    check_against_stock([30, 20, 6], kind, 100, 30, dtype=torch.float64, **options)
    check_against_stock([30, 7], kind, 100, 30, dtype=torch.float64, **options)


@pytest.mark.parametrize("kind", ["sparse", "floats"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "full"), (torch.float64, "full"), (torch.float32, "bf16")], ids=str
)
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.7, 0.02)])
def test_on_a_gpu(kind, dtype, precision, momentum, decay):
    if reason := why_no_cuda():
        pytest.skip(reason)
    options = {"dtype": dtype, "precision": precision, "momentum": momentum, "decay": decay, "device": "cuda"}
    check_against_stock([61, 33, 20, 10], kind, 150, 64, **options)


@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize(
    ("widths", "count", "batch_size"),
    [
        ([784, 128, 10], 300, 128),  # in one kernel, from here
        ([20, 7, 5, 3], 33, 8),
        ([300, 150, 150, 40], 150, 70),
        ([64, 10], 2000, 1024),
        ([30, 20, 1024], 150, 64),
        ([9, 8, 7, 6, 5, 5, 4, 4, 3], 60, 16),  # to here
        ([9, 8, 7, 6, 5, 5, 4, 4, 3, 3], 60, 16),  # layers
        ([64, 10], 2000, 1025),  # images of a minibatch
        ([30, 20, 1025], 150, 64),  # classes
        ([1500, 1500, 5], 60, 16),  # parameters
    ],
    ids=str,
)
def test_networks_of_one_kernel_and_of_several_on_a_gpu(widths, count, batch_size, activation):
    """On both sides of each limit of fits_persistent."""
    if reason := why_no_cuda():
        pytest.skip(reason)
    options = {"activation": activation, "momentum": 0.7, "decay": 0.02, "bias": activation != "tanh"}
    check_against_stock(widths, "dense", count, batch_size, device="cuda", **options)


@pytest.mark.parametrize("last_rate", [0.1, 0.05])  # rates that differ are copied to the device
def test_on_cuda_the_host_waits_for_nothing(last_rate):
    if reason := why_no_cuda():
        pytest.skip(reason)
    images, labels = (tensor.cuda() for tensor in some_data())
    order, rates = torch.randperm(200, device="cuda"), torch.linspace(0.1, last_rate, 7, dtype=torch.float64)
    parameters = [parameter.detach() for parameter in nn.MLP(40, [12], 5).cuda().parameters()]
    rest = (["sigmoid", "identity"], 32, rates, 0.0, 0.0, 1 / 255, 0.0, False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = ops.train_epoch(images, labels, order, parameters[::2], parameters[1::2], [], *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


@pytest.mark.parametrize("last_rate", [0.1, 0.05])  # rates that differ take several kernels where a graph is captured
def test_a_cuda_graph_holds_an_epoch(last_rate):
    if reason := why_no_cuda():
        pytest.skip(reason)
    images, labels = (tensor.cuda() for tensor in some_data())
    order, rates = torch.randperm(200, device="cuda"), torch.linspace(0.1, last_rate, 7, dtype=torch.float64)
    models = [nn.MLP(40, [12], 5).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def run(model):
        parameters = [parameter.detach() for parameter in model.parameters()]
        rest = (["sigmoid", "identity"], 32, rates, 0.0, 0.0, 1 / 255, 0.0, False)
        return ops.train_epoch(images, labels, order, parameters[::2], parameters[1::2], [], *rest)

    state = {name: value.clone() for name, value in models[0].state_dict().items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(models[0])  # warms the libraries up
    torch.cuda.synchronize()
    models[0].load_state_dict(state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = run(models[0])
    for _ in range(3):
        graph.replay()
        expected = run(models[1])
    tolerance = {"rtol": 0, "atol": 0} if last_rate == 0.1 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(losses, expected, **tolerance)
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(left, right, **tolerance)
