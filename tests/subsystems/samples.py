"""The ops and layers that every test of this folder runs on: a new op is one row of OPS, a new layer one row of LAYERS.

A test is parametrized with ``every_op`` or ``every_layer`` and marked ``support("what it shows")``; of these marks
scripts/support_table.py makes the tables of docs/limits.md: a row for each op and layer, a column for each mark.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from conftest import DIFFERENTIABLE, EAGER
from torch import Tensor

from torch_mlp import functional, nn

torch_functional = torch.nn.functional

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


def probabilities(reduction: str, **options):
    def make(device, dtype, batch):
        target = torch.rand(batch, CLASSES, dtype=torch.float64).to(device, dtype)
        return Sample(
            lambda *tensors: functional.cross_entropy(*tensors, reduction=reduction, **options),
            lambda *tensors: torch_functional.cross_entropy(*tensors, reduction=reduction, **options),
            [normal(device, dtype, batch, CLASSES).requires_grad_(), target.requires_grad_()],
            [],
            (0, 1),
        )

    return make


def with_z_loss(device, dtype, batch):
    def ours(input, target):
        loss, lse = functional.cross_entropy(input, target, reduction="sum", return_lse=True, z_loss=0.1)
        return loss + lse.sum().to(loss.dtype)

    def torchs(input, target):
        lse = input.logsumexp(1).where(target != -100, 0)
        return torch_functional.cross_entropy(input, target, reduction="sum") + (0.1 * lse.square() + lse).sum()

    input = normal(device, dtype, batch, CLASSES).requires_grad_()
    return Sample(ours, torchs, [input], [targets(device, batch)], (0, 1))


def linear_cross_entropy(bias: bool, weighted: bool, **options):
    def make(device, dtype, batch):
        def arguments(input, matrix, *rest):
            linear_bias, (target, *weight) = (rest[0], rest[1:]) if bias else (None, rest)
            return input, matrix, linear_bias, target, weight[0] if weighted else None

        def ours(*tensors):
            input, matrix, linear_bias, target, weight = arguments(*tensors)
            return functional.linear_cross_entropy(
                input, matrix, target, linear_bias=linear_bias, weight=weight, **options
            )

        def torchs(*tensors):
            input, matrix, linear_bias, target, weight = arguments(*tensors)
            logits = torch_functional.linear(input, matrix, linear_bias)
            return torch_functional.cross_entropy(logits, target, weight, **options)

        shapes = [(batch, IN), (CLASSES, IN)] + [(CLASSES,)] * bias
        weight = [torch.rand(CLASSES, dtype=torch.float64).to(device, dtype)] * weighted
        inputs = [normal(device, dtype, *shape).requires_grad_() for shape in shapes]
        return Sample(ours, torchs, inputs, [targets(device, batch), *weight], (0, len(shapes)))

    return make


def binary_target(device, dtype, *shape):
    return torch.rand(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def binary_cross_entropy(weighted: bool, **options):
    def make(device, dtype, batch):
        weights = [torch.rand(CLASSES, dtype=torch.float64).to(device, dtype) for _ in range(2)] * weighted

        def call(function):
            def called(input, target, *weights):
                weight, pos_weight = weights or (None, None)
                return function(input, target, weight, pos_weight=pos_weight, **options)

            return called

        return Sample(
            call(functional.binary_cross_entropy_with_logits),
            call(torch_functional.binary_cross_entropy_with_logits),
            [normal(device, dtype, batch, CLASSES).requires_grad_(), binary_target(device, dtype, batch, CLASSES)],
            weights,
            (0, 1),
        )

    return make


def linear_binary_cross_entropy(outs: int, weight_decay: float = 0.0, **options):
    def make(device, dtype, batch):
        def ours(input, matrix, bias, target):
            return functional.linear_binary_cross_entropy(
                input, matrix, target, linear_bias=bias, weight_decay=weight_decay, **options
            )

        def torchs(input, matrix, bias, target):
            logits = torch_functional.linear(input, matrix, bias)
            loss = torch_functional.binary_cross_entropy_with_logits(logits, target, **options)
            return loss + weight_decay / 2 * matrix.square().sum() if weight_decay else loss

        inputs = [normal(device, dtype, *shape).requires_grad_() for shape in ((batch, IN), (outs, IN), (outs,))]
        return Sample(ours, torchs, [*inputs, binary_target(device, dtype, batch, outs)], [], (0, 3))

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
        for activation in DIFFERENTIABLE
        for bias in (True, False)
    },
    "linear_sigmoid": {"": linear_sigmoid},
    "mlp": {activation: mlp(activation) for activation in DIFFERENTIABLE},
    "mlp_cross_entropy": {
        "identity, reduction=sum": mlp_cross_entropy("identity", reduction="sum"),
        "sigmoid, reduction=none": mlp_cross_entropy("sigmoid", reduction="none"),
        "tanh": mlp_cross_entropy("tanh"),
        "relu, label_smoothing=0.1": mlp_cross_entropy("relu", label_smoothing=0.1),
    },
    "cross_entropy": {
        **dict(cross_entropy_options()),
        "probabilities, reduction=none": probabilities("none"),
        "probabilities, reduction=mean, label_smoothing=0.1": probabilities("mean", label_smoothing=0.1),
        "return_lse, z_loss": with_z_loss,
    },
    "linear_cross_entropy": {
        "bias, reduction=mean": linear_cross_entropy(True, False),
        "bias, weight, reduction=sum, label_smoothing=0.1": linear_cross_entropy(
            True, True, reduction="sum", label_smoothing=0.1
        ),
        "no bias, weight, reduction=none": linear_cross_entropy(False, True, reduction="none"),
    },
    "binary_cross_entropy_with_logits": {
        "reduction=mean": binary_cross_entropy(False),
        "weight, pos_weight, reduction=sum": binary_cross_entropy(True, reduction="sum"),
        "weight, pos_weight, reduction=none": binary_cross_entropy(True, reduction="none"),
    },
    "linear_binary_cross_entropy": {
        "one output, reduction=mean": linear_binary_cross_entropy(1),
        "several outputs, reduction=none": linear_binary_cross_entropy(3, reduction="none"),
        "several outputs, reduction=sum, weight_decay=0.7": linear_binary_cross_entropy(3, 0.7, reduction="sum"),
    },
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


def binary_loss(**options):
    return layer(
        lambda: nn.BCEWithLogitsLoss(**options),
        lambda: torch.nn.BCEWithLogitsLoss(**options),
        lambda device, dtype: (normal(device, dtype, 6, CLASSES), binary_target(device, dtype, 6, CLASSES).detach()),
    )


class StockLinearCrossEntropy(torch.nn.Module):
    """torch.nn.LinearCrossEntropyLoss, which not every torch that we support has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(IN, CLASSES)

    def forward(self, input, target):
        return torch_functional.cross_entropy(self.linear(input), target)


LAYERS: dict[str, dict[str, Callable[[str, torch.dtype], LayerSample]]] = {
    "LinearAct": {activation: linear_layer(activation) for activation in DIFFERENTIABLE},
    "LinearSigmoid": {
        "": layer(
            lambda: nn.LinearSigmoid(IN, HIDDEN),
            lambda: torch.nn.Sequential(torch.nn.Linear(IN, HIDDEN), torch.nn.Sigmoid()),
            rows,
        )
    },
    "LogisticRegression": {
        "": layer(lambda: nn.LogisticRegression(IN), lambda: torch.nn.Linear(IN, 1), rows),
    },
    "CrossEntropyLoss": {"": loss_layer(), "weight, label_smoothing": loss_layer(label_smoothing=0.1)},
    "BCEWithLogitsLoss": {
        "": binary_loss(),
        "pos_weight": binary_loss(pos_weight=torch.tensor([0.5, 2.0, 1.0])),
    },
    "LinearCrossEntropyLoss": {
        "": layer(
            lambda: nn.LinearCrossEntropyLoss(IN, CLASSES, bias=True),
            StockLinearCrossEntropy,
            lambda device, dtype: (*rows(device, dtype), targets(device, 6)),
        )
    },
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
