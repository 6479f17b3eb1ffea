"""The ops and layers that every test of this folder runs on: a new op is one row of OPS, a new layer one row of LAYERS.

A test is parametrized with ``every_op`` or ``every_layer`` and marked ``support("what it shows")``; of these marks
scripts/support_table.py makes the tables of docs/limits.md: a row for each op and layer, a column for each mark.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from torch_mlp import functional, nn

torch_functional = torch.nn.functional

EAGER = {"identity": lambda z: z, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
STOCK = {"identity": torch.nn.Identity, "sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}
REDUCTIONS = ("none", "mean", "sum")
IN, HIDDEN, CLASSES = 5, 4, 3


class Sample(NamedTuple):
    """An op beside torch's; both are functions of (*inputs, *others)."""

    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    inputs: list[Tensor]  # those that are differentiated
    others: list[Tensor]  # targets, class weights
    rows: tuple[int, ...]  # the places in (*inputs, *others) of tensors with a row for each sample

    def gradients(self, function: Callable[..., Tensor], grad_output: Tensor, **options) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*self.inputs, *self.others), self.inputs, grad_output, **options)


def normal(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def targets(device: str, batch: int) -> Tensor:
    """Classes, one of them ignored where there is more than one."""
    target = torch.randint(CLASSES, (batch,), device=device)
    target[1:2] = -100
    return target


def linear_act(activation: str, bias: bool):
    def make(device, dtype, batch):
        shapes = [(batch, IN), (HIDDEN, IN)] + [(HIDDEN,)] * bias
        return Sample(
            lambda *tensors: functional.linear_act(*tensors, activation=activation),
            lambda *tensors: EAGER[activation](torch_functional.linear(*tensors)),
            [normal(device, dtype, *shape).requires_grad_() for shape in shapes],
            [],
            (0,),
        )

    return make


def linear_sigmoid(device, dtype, batch):
    sample = linear_act("sigmoid", True)(device, dtype, batch)
    return sample._replace(ours=functional.linear_sigmoid)


def eager_network(activation, input, parameters):
    *hidden, last = zip(parameters[::2], parameters[1::2], strict=True)
    for weight, bias in hidden:
        input = EAGER[activation](torch_functional.linear(input, weight, bias))
    return torch_functional.linear(input, *last)


def parameters_of_network(device, dtype):
    shapes = [(HIDDEN, IN), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,)]
    return [normal(device, dtype, *shape).requires_grad_() for shape in shapes]


def mlp(activation: str):
    def make(device, dtype, batch):
        return Sample(
            lambda input, *parameters: functional.mlp(input, parameters[::2], parameters[1::2], activation),
            lambda input, *parameters: eager_network(activation, input, parameters),
            [normal(device, dtype, batch, IN).requires_grad_(), *parameters_of_network(device, dtype)],
            [],
            (0,),
        )

    return make


def mlp_cross_entropy(activation: str, **options):
    def make(device, dtype, batch):
        network = mlp(activation)(device, dtype, batch)

        def ours(input, *rest):
            *parameters, target = rest
            return functional.mlp_cross_entropy(input, parameters[::2], parameters[1::2], target, activation, **options)

        def torchs(*tensors):
            return torch_functional.cross_entropy(network.torchs(*tensors[:-1]), tensors[-1], **options)

        return Sample(ours, torchs, network.inputs, [targets(device, batch)], (0, 7))

    return make


def cross_entropy(weighted: bool, **options):
    def make(device, dtype, batch):
        weight = [torch.rand(CLASSES, dtype=torch.float64).to(device, dtype)] * weighted
        return Sample(
            lambda *tensors: functional.cross_entropy(*tensors, **options),
            lambda *tensors: torch_functional.cross_entropy(*tensors, **options),
            [normal(device, dtype, batch, CLASSES).requires_grad_()],
            [targets(device, batch), *weight],
            (0, 1),
        )

    return make


Make = Callable[[str, torch.dtype, int], Sample]


def cross_entropy_options() -> Iterator[tuple[str, Make]]:
    for reduction, smoothing, weighted in itertools.product(REDUCTIONS, (0.0, 0.1, 1.0), (False, True)):
        name = f"reduction={reduction}" + f", label_smoothing={smoothing}" * (smoothing > 0) + ", weight" * weighted
        yield name, cross_entropy(weighted, reduction=reduction, label_smoothing=smoothing)


# op -> options -> what makes a sample of a batch size, on a device, of a dtype
OPS: dict[str, dict[str, Make]] = {
    "linear_act": {
        f"{activation}" + ", no bias" * (not bias): linear_act(activation, bias)
        for activation in functional.ACTIVATIONS
        for bias in (True, False)
    },
    "linear_sigmoid": {"": linear_sigmoid},
    "mlp": {activation: mlp(activation) for activation in functional.ACTIVATIONS},
    "mlp_cross_entropy": {
        "identity, reduction=sum": mlp_cross_entropy("identity", reduction="sum"),
        "sigmoid, reduction=none": mlp_cross_entropy("sigmoid", reduction="none"),
        "tanh": mlp_cross_entropy("tanh"),
        "relu, label_smoothing=0.1": mlp_cross_entropy("relu", label_smoothing=0.1),
    },
    "cross_entropy": dict(cross_entropy_options()),
}


class LayerSample(NamedTuple):
    """A layer, torch's with the same parameters, and what they are called with."""

    ours: torch.nn.Module
    torchs: torch.nn.Module
    arguments: tuple[Tensor, ...]


def layer(make_ours, make_torchs, make_arguments):
    def make(device, dtype):
        ours, torchs = make_ours().to(device, dtype), make_torchs().to(device, dtype)
        # Names differ where torch has a Sequential for one of our layers, the order does not.
        torchs.load_state_dict(dict(zip(torchs.state_dict(), ours.state_dict().values(), strict=True)))
        return LayerSample(ours, torchs, make_arguments(device, dtype))

    return make


def rows(device, dtype):
    return (normal(device, dtype, 6, IN),)


def logits_and_classes(device, dtype):
    return normal(device, dtype, 6, CLASSES), targets(device, 6)


def linear_layer(activation):
    return layer(
        lambda: nn.LinearAct(IN, HIDDEN, activation=activation),
        lambda: torch.nn.Sequential(torch.nn.Linear(IN, HIDDEN), STOCK[activation]()),
        rows,
    )


def network(activation):
    return layer(
        lambda: nn.MLP(IN, [HIDDEN, 6], CLASSES, activation),
        lambda: torch.nn.Sequential(
            torch.nn.Linear(IN, HIDDEN),
            STOCK[activation](),
            torch.nn.Linear(HIDDEN, 6),
            STOCK[activation](),
            torch.nn.Linear(6, CLASSES),
        ),
        rows,
    )


def loss_layer(**options):
    def given():
        return {**options, "weight": torch.tensor([0.5, 2.0, 1.0])} if options else {}

    return layer(
        lambda: nn.CrossEntropyLoss(**given()), lambda: torch.nn.CrossEntropyLoss(**given()), logits_and_classes
    )


LAYERS: dict[str, dict[str, Callable[[str, torch.dtype], LayerSample]]] = {
    "LinearAct": {activation: linear_layer(activation) for activation in functional.ACTIVATIONS},
    "LinearSigmoid": {
        "": layer(
            lambda: nn.LinearSigmoid(IN, HIDDEN),
            lambda: torch.nn.Sequential(torch.nn.Linear(IN, HIDDEN), torch.nn.Sigmoid()),
            rows,
        )
    },
    "CrossEntropyLoss": {"": loss_layer(), "weight, label_smoothing": loss_layer(label_smoothing=0.1)},
    "MLP": {activation: network(activation) for activation in ("sigmoid", "relu")},
}


def name_of(case: Callable) -> tuple[str, str]:
    """Row and options of what makes a sample."""
    return next(
        (row, options) for row, variants in (OPS | LAYERS).items() for options, make in variants.items() if make is case
    )


def parametrize(argument: str, table: dict[str, dict[str, Callable]]) -> pytest.MarkDecorator:
    """With what makes each sample; the name of its row goes before a colon."""
    cases = [
        pytest.param(make, id=f"{row}: {options}" if options else row)
        for row, variants in table.items()
        for options, make in variants.items()
    ]
    return pytest.mark.parametrize(argument, cases)


every_op = parametrize("op", OPS)
every_layer = parametrize("layer", LAYERS)
every_layer_with_weights = parametrize("layer", {row: LAYERS[row] for row in LAYERS if not row.endswith("Loss")})


def stacked(op: Make, count: int, device: str, batch: int = 2) -> tuple[Sample, list[Tensor]]:
    """A sample, and the inputs and others of that many stacked upon each other."""
    samples = [op(device, torch.float64, batch) for _ in range(count)]
    return samples[0], [
        torch.stack([tensor.detach() for tensor in tensors])
        for tensors in zip(*[(*sample.inputs, *sample.others) for sample in samples], strict=True)
    ]
