"""The loss as a landscape over the parameters: on a plane through a network, and on the line between two."""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from torch_mlp.descent import Learner, mean_loss


def filter_normalized_direction(model: Learner, generator: torch.Generator | None = None) -> list[Tensor]:
    """Draw a random direction in which the weights of each neuron move by as much as they are long.

    It is Gaussian, then each row of a weight (each filter, of a convolution) is scaled to the norm of that row in the
    model; biases do not move. So a step of some length disturbs networks of small and of large weights alike.

    Args:
        model: the model from which the direction leads away.
        generator: the source of randomness, on the device of the parameters; None for torch's global one.

    Returns:
        A tensor for each parameter, of its shape.

    Example:
        >>> from torch_mlp import nn
        >>> model = nn.MLP(2, 8, 2)
        >>> direction = filter_normalized_direction(model)
        >>> torch.allclose(direction[0].norm(dim=1), next(model.parameters()).norm(dim=1))
        True

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, 2018, section 4.
    """
    direction = []
    for parameter in model.parameters():
        value = parameter.detach()
        if value.dim() < 2:
            direction.append(torch.zeros_like(value))
            continue
        draw = torch.randn(value.shape, generator=generator, dtype=value.dtype, device=value.device)
        row = tuple(range(1, value.dim()))
        length, drawn = (torch.linalg.vector_norm(values, dim=row, keepdim=True) for values in (value, draw))
        direction.append(draw * (length / drawn))
    return direction


def losses_on_plane(
    model: Learner,
    input: Tensor,
    target: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: Tensor,
    progress: bool = False,
) -> Tensor:
    """Take the loss at ``parameters + x * first + y * second``, for x and y among the steps.

    Args:
        model: the model in the middle, which stays as it is.
        input: the samples, as ``model.loss`` takes them.
        target: what belongs to them.
        first: a direction, with a tensor for each parameter: :func:`filter_normalized_direction` draws one.
        second: another one.
        steps: the values of x and of y, one dimension.
        progress: whether to show a progress bar, where there is a terminal.

    Returns:
        float64 (len(steps), len(steps)), on the CPU: a row for each y, a column for each x.

    Raises:
        ValueError: if a direction has other shapes than the parameters.

    Example:
        >>> from torch_mlp import nn
        >>> model, input, target = nn.MLP(2, 8, 2), torch.randn(50, 2), torch.randint(2, (50,))
        >>> first, second = filter_normalized_direction(model), filter_normalized_direction(model)
        >>> losses = losses_on_plane(model, input, target, first, second, torch.tensor([-1.0, 0.0, 1.0]))
        >>> abs(losses[1, 1].item() - model.loss(input, target).item()) < 1e-6
        True
    """
    centre = [parameter.detach() for parameter in model.parameters()]
    shapes = [[tuple(value.shape) for value in values] for values in (centre, first, second)]
    if shapes[1:] != shapes[:1] * 2:
        raise ValueError(
            f"losses_on_plane: expected directions of the shapes of the parameters, {shapes[0]}, got {shapes[1]} and "
            f"{shapes[2]}"
        )
    places = (
        [value + x * along + y * across for value, along, across in zip(centre, first, second, strict=True)]
        for y in steps.tolist()
        for x in steps.tolist()
    )
    bar = tqdm(places, "landscape", len(steps) ** 2, leave=False, disable=None if progress else True)
    return _losses_at(model, bar, input, target).view(len(steps), len(steps))


def losses_between(first: Learner, last: Learner, input: Tensor, target: Tensor, points: int = 41) -> Tensor:
    """Take the loss at evenly spaced points of the straight line from the parameters of one model to those of another.

    Args:
        first: the model where the line begins; it stays as it is, as does the other one.
        last: the model where it ends, with parameters of the same shapes.
        input: the samples, as ``first.loss`` takes them.
        target: what belongs to them.
        points: number of points, the two ends among them.

    Returns:
        float64 (points,), on the CPU.

    Raises:
        ValueError: if the shapes of the parameters differ.

    Example:
        >>> from torch_mlp import nn
        >>> losses = losses_between(nn.MLP(2, 8, 2), nn.MLP(2, 8, 2), torch.randn(50, 2), torch.randint(2, (50,)))
        >>> losses.shape
        torch.Size([41])

    Source: Goodfellow et al., Qualitatively Characterizing Neural Network Optimization Problems, 2015.
    """
    ends = [[parameter.detach() for parameter in model.parameters()] for model in (first, last)]
    shapes = [[tuple(value.shape) for value in values] for values in ends]
    if shapes[0] != shapes[1]:
        raise ValueError(f"losses_between: expected models with parameters of the same shapes, got {shapes}")
    places = (
        [torch.lerp(begin, end, t) for begin, end in zip(*ends, strict=True)]
        for t in torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    )
    return _losses_at(first, places, input, target)


def height_above_chord(losses: Tensor) -> float:
    """How far losses at evenly spaced points of a line rise above the straight line between the two at the ends.

    Of a convex function that is nowhere above 0. One point above it is proof that a function is not convex.

    Args:
        losses: at least two of them, one dimension.

    Example:
        >>> height_above_chord(torch.tensor([1.0, 0.0, 3.0])), height_above_chord(torch.tensor([0.0, 5.0, 2.0]))
        (0.0, 4.0)

    Formula: Boyd and Vandenberghe, Convex Optimization, 2004, section 3.1.1.
    """
    t = torch.linspace(0, 1, len(losses), dtype=losses.dtype, device=losses.device)
    return (losses - torch.lerp(losses[0], losses[-1], t)).max().item()


@torch.no_grad()
def _losses_at(model: Learner, places: Iterable[Sequence[Tensor]], input: Tensor, target: Tensor) -> Tensor:
    """The loss with each of these values of the parameters, of a copy: the model itself is not even touched."""
    model = copy.deepcopy(model)
    losses = []
    for values in places:
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)
        losses.append(mean_loss(model, input, target))
    return torch.tensor(losses, dtype=torch.float64)
