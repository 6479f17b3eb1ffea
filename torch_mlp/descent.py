"""Gradient descent, SGD and minibatch SGD as the lecture writes them: one loop, in which only the batch size differs.

Written to be read and to be watched. :func:`torch_mlp.training.train` is the fast one, with momentum.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from torch_mlp.training import sample_order

_EVALUATION_BATCH = 4096


class Record(NamedTuple):
    """Where a descent stood."""

    passes: float  # over the data so far: samples used / N
    loss: float  # mean over all of the data


class Learner(Protocol):
    """What a descent asks of a model: parameters, and the mean loss of a batch as a function of them."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters; those that require no gradient stay as they are."""

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        """A mean over the samples, of shape ()."""


@torch.no_grad()
def mean_loss(model: Learner, input: Tensor, target: Tensor) -> float:
    """The mean loss over all samples, in parts, so that memory does not bound their number.

    Example:
        >>> from torch_mlp import nn
        >>> mean_loss(nn.MLP(3, 8, 2), torch.zeros(10_000, 3), torch.zeros(10_000, dtype=torch.int64)) > 0
        True
    """
    parts = zip(input.split(_EVALUATION_BATCH), target.split(_EVALUATION_BATCH), strict=True)
    return sum(model.loss(part, part_target).item() * len(part) for part, part_target in parts) / len(input)


def minibatch_sgd(
    model: Learner,
    input: Tensor,
    target: Tensor,
    *,
    batch_size: int,
    lr: float,
    sampling: str = "partition",
    max_passes: float = 100,
    tolerance: float = 0.0,
    records_per_pass: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> list[Record]:
    r"""Minibatch SGD: step after step against the gradient of the mean loss over a few samples.

    Each step takes a minibatch B of samples and moves the parameters, in place, by

    .. math:: w \leftarrow w - \eta \, \nabla_w \frac{1}{|B|} \sum_{i \in B} loss(x_i, y_i; w)

    until it converges or ``max_passes`` are used up. On average over the draw of B that gradient is the one over all
    samples. After Ctrl-C the model holds what it has learned so far.

    Args:
        model: the model to train: :class:`torch_mlp.nn.MLP` or anything else with ``parameters()`` and a mean
            ``loss(input, target)``. It stays in the mode that it is in, training or not, for the recorded losses too:
            where it drops out units, they are as random as those of the steps.
        input: the samples.
        target: what ``model.loss`` takes for each of them.
        batch_size: samples in a minibatch, 1 to N; the last one of a pass is smaller where N is no multiple of it.
        lr: the learning rate :math:`\eta`.
        sampling: "partition" cuts a random permutation of the samples into minibatches, a new one for each pass;
            "random" draws every minibatch at random, with replacement.
        max_passes: the budget, in passes over the data: a pass is N samples. A step that goes beyond it is not made.
        tolerance: it has converged when, at the end of a pass, the loss over all of the data has changed by no more
            than this since one pass before; 0 goes on until the loss does not change at all.
        records_per_pass: how often in a pass the loss over all of the data is taken, which costs a forward pass over
            them. Where a pass has fewer steps, after each of them.
        generator: the source of randomness; None for torch's global one.
        progress: whether to show a progress bar, where there is a terminal.

    Shape:
        - input: :math:`(N, *)`
        - target: :math:`(N, *)`

    Returns:
        A :class:`Record` of the start, one at every place that ``records_per_pass`` asks for, and one of the end.

    Raises:
        FloatingPointError: if a recorded loss is not finite; the model is as it was at the record before.
        RuntimeError: if input and target do not have the same number of samples, or none.
        ValueError: if an option is not known or out of its range, or no parameter requires grad.

    Example:
        >>> from torch_mlp import nn
        >>> generator = torch.Generator().manual_seed(0)
        >>> input = torch.randn(200, 2, generator=generator)
        >>> target = (input[:, 0] * input[:, 1] > 0).long()  # XOR of the signs
        >>> model = nn.MLP(2, 8, 2, "tanh")
        >>> records = minibatch_sgd(model, input, target, batch_size=10, lr=0.5, max_passes=50, generator=generator)
        >>> records[-1].passes, records[-1].loss < 0.5 * records[0].loss
        (50.0, True)

    Source: Bottou, Large-Scale Machine Learning with Stochastic Gradient Descent, 2010; Bishop, Pattern Recognition and
    Machine Learning, 2006, section 5.2.4.
    """
    _check_arguments(input, target, batch_size, lr, max_passes, tolerance, records_per_pass)
    num_samples = len(input)
    budget = round(max_passes * num_samples)  # in samples, as is what follows
    used = 0
    records: list[Record] = []
    weights: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weights:
        raise ValueError("minibatch_sgd: expected a model with parameters that require grad, got none")
    recorded = [torch.empty_like(weight) for weight in weights]

    def record() -> float:
        loss = mean_loss(model, input, target)
        if not math.isfinite(loss):
            _copy(recorded if records else weights, weights)
            remedy = "a lower learning rate may help" if records else "so it is before the first step"
            raise FloatingPointError(
                f"minibatch_sgd: the loss is {loss} after {used / num_samples:g} passes over the data; {remedy}"
            )
        _copy(weights, recorded)
        records.append(Record(used / num_samples, loss))
        return loss

    loss_at_end_of_pass = record()
    bar = tqdm(total=budget, unit=" samples", unit_scale=True, leave=False, disable=None if progress else True)
    with bar:
        for batch, batch_target in _minibatches(input, target, batch_size, sampling, generator):
            if used + len(batch) > budget:
                break
            loss = model.loss(batch, batch_target)
            # Of a parameter that the loss does not use the gradient is 0.
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight -= lr * gradient
            places_before, places = (records_per_pass * n // num_samples for n in (used, used + len(batch)))
            used += len(batch)
            bar.update(len(batch))
            if places > places_before:
                bar.set_postfix(loss=f"{record():.4f}", refresh=False)
            if used % num_samples == 0:  # the end of a pass, which always has a record
                change = records[-1].loss - loss_at_end_of_pass
                loss_at_end_of_pass = records[-1].loss
                if abs(change) <= tolerance:
                    break
    if records[-1].passes < used / num_samples:
        record()
    return records


def sgd(model: Learner, input: Tensor, target: Tensor, *, lr: float, **options: Any) -> list[Record]:
    """Stochastic gradient descent: :func:`minibatch_sgd` with one sample a step, which makes N steps a pass.

    Takes every option of :func:`minibatch_sgd` but ``batch_size``.

    Example:
        >>> from torch_mlp import nn
        >>> input, target = torch.eye(3), torch.arange(3)
        >>> records = sgd(nn.MLP(3, 8, 3), input, target, lr=0.5, max_passes=300, records_per_pass=3)
        >>> records[1].passes < 1, records[-1].loss < 0.1
        (True, True)
    """
    return minibatch_sgd(model, input, target, batch_size=1, lr=lr, **options)


def gradient_descent(
    model: Learner,
    input: Tensor,
    target: Tensor,
    *,
    lr: float,
    max_passes: float = 100,
    tolerance: float = 0.0,
    progress: bool = False,
) -> list[Record]:
    """Gradient descent: :func:`minibatch_sgd` with all samples in each step, so that a pass is one step.

    Nothing in it is random, and there is a record after each step.

    Example:
        >>> from torch_mlp import nn
        >>> input, target = torch.eye(3), torch.arange(3)
        >>> len(gradient_descent(nn.MLP(3, [], 3), input, target, lr=1.0, max_passes=20))
        21
    """
    return minibatch_sgd(
        model,
        input,
        target,
        batch_size=len(input) if input.dim() else 1,  # which minibatch_sgd refuses
        lr=lr,
        max_passes=max_passes,
        tolerance=tolerance,
        progress=progress,
    )


def _check_arguments(
    input: Tensor,
    target: Tensor,
    batch_size: int,
    lr: float,
    max_passes: float,
    tolerance: float,
    records_per_pass: int,
) -> None:
    if input.dim() == 0 or target.shape[:1] != input.shape[:1] or len(input) == 0:
        raise RuntimeError(
            "minibatch_sgd: expected input of shape (N, *) and target of shape (N, *), of at least one sample, got "
            f"{tuple(input.shape)} and {tuple(target.shape)}"
        )
    if not 1 <= batch_size <= len(input):
        raise ValueError(
            f"minibatch_sgd: expected batch_size from 1 to the number of samples, got {batch_size} for {len(input)} "
            "samples"
        )
    for name, value in (("lr", lr), ("max_passes", max_passes)):
        if not 0 < value < math.inf:
            raise ValueError(f"minibatch_sgd: expected {name} above 0 and finite, got {value}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"minibatch_sgd: expected tolerance of at least 0 and finite, got {tolerance}")
    if records_per_pass < 1:
        raise ValueError(f"minibatch_sgd: expected records_per_pass of at least 1, got {records_per_pass}")


def _minibatches(
    input: Tensor, target: Tensor, batch_size: int, sampling: str, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Input and target of one minibatch after another, pass after pass, without end."""
    while True:
        if batch_size == len(input) and sampling == "partition":
            yield input, target  # its one part, whose order does not matter
        else:
            order = sample_order(len(input), sampling, generator or torch.default_generator).to(input.device)
            for index in order.split(batch_size):
                yield input[index], target[index]


@torch.no_grad()
def _copy(sources: list[Tensor], destinations: list[Tensor]) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        destination.copy_(source)
