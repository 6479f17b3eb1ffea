"""How the benchmarks time: steps in turns, medians over the turns."""

import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

import torch_mlp.ops  # noqa: F401 - registers them


def forward_backward(function: Callable, inputs: list[torch.Tensor], grad_output: torch.Tensor) -> Callable[[], None]:
    """A step of training without the update."""

    def step() -> None:
        torch.autograd.grad(function(*inputs), inputs, grad_output)

    return step


def forward(function: Callable, inputs: list[torch.Tensor]) -> Callable[[], None]:
    """The forward pass without autograd."""
    inputs = [input.detach() for input in inputs]
    return lambda: function(*inputs)


def multiply_adds(rounds: int = 1_000_000) -> int:
    """Some milliseconds of multiplications and additions on every thread; returns their number."""
    return torch.ops.torch_mlp._cpu_multiply_adds(torch.get_num_threads(), rounds)


def split_multiply_adds(rounds: int = 5_000) -> int:
    """The same of float32 by a matrix unit; none, and 0, where the processor has no such unit."""
    return torch.ops.torch_mlp._cpu_split_multiply_adds(torch.get_num_threads(), rounds)


def medians(steps: dict[str, Callable[[], Any]], turns: int, seconds: float) -> dict[str, float]:
    """Seconds of each step: the median over turns in which each runs for about so many seconds.

    Each turn has an order of its own, for a step leaves its successor a cache and a clock rate to begin with.
    """
    timers, counts = {}, {}
    for name, step in steps.items():
        timers[name] = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        timers[name].timeit(2)
        counts[name] = max(1, round(seconds / timers[name].timeit(2).mean))
    times: dict[str, list[float]] = {name: [] for name in steps}
    shuffled = random.Random(0)
    for _ in range(turns):
        for name in shuffled.sample(list(steps), len(steps)):
            times[name].append(timers[name].timeit(counts[name]).mean)
    return {name: statistics.median(values) for name, values in times.items()}


def error_ratio(ours: Callable, eager: Callable, inputs: list[torch.Tensor], grad_output: torch.Tensor) -> float:
    """Our root mean square error against float64 over eager's, the worst of the output and the gradients."""

    def values(function: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [input.detach().to(dtype).requires_grad_() for input in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(dtype))]

    dtype = inputs[0].dtype
    worst = 0.0
    for our, their, truth in zip(values(ours, dtype), values(eager, dtype), values(eager, torch.float64), strict=True):
        # Below a tenth of a unit in the last place a comparison is one of luck.
        luck = 0.1 * torch.finfo(dtype).eps * truth.square().mean().sqrt()
        error, eager_error = ((value.double() - truth).square().mean().sqrt() for value in (our, their))
        worst = max(worst, float(error / (eager_error + luck)))
    return worst
