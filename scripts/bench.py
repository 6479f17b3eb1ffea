#!/usr/bin/env python3
"""Time the fused ops, forward and backward, beside torch eager and torch.compile, in one process and in turns.

Prints the median of each in microseconds and our speed relative to the better of the two peers; below 1 is a loss.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from torch_mlp import functional

LINEAR_SHAPES = {  # batch, in_features, out_features
    "cpu": [(64, 784, 128), (64, 784, 512), (512, 784, 512), (64, 512, 512), (64, 256, 10), (1024, 256, 10)],
    "cuda": [(64, 784, 512), (256, 1024, 1024), (8192, 1024, 4096), (4096, 4096, 4096)],
}
CROSS_ENTROPY_SHAPES = {  # batch, num_classes
    "cpu": [(64, 10), (1024, 10), (60000, 10), (256, 1000), (512, 32000)],
    "cuda": [(64, 10), (65536, 10), (16384, 1000), (8192, 32000), (4096, 128256)],
}


def median_times(steps: dict[str, Callable[[], None]], rounds: int, seconds: float) -> dict[str, float]:
    """Microseconds of each step: the median over rounds in which the steps take turns."""
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        for name, step in steps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.blocked_autorange(min_run_time=seconds).median * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def training_step(function: Callable, inputs: list[torch.Tensor], grad_output: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of a function of tensors that require gradients."""

    def step() -> None:
        torch.autograd.grad(function(*inputs), inputs, grad_output)

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="least time of one measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}

    def eager_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.nn.functional.linear(input, weight, bias))

    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    print(f"torch {torch.__version__}, {name}, {arguments.dtype}; forward + backward, microseconds")
    print(f"{'':36s}{'torch_mlp':>12s}{'eager':>12s}{'compile':>12s}{'ratio':>8s}")
    cases = [
        (f"linear_sigmoid {batch} x {ins} -> {outs}", (batch, outs), [(batch, ins), (outs, ins), (outs,)], None)
        for batch, ins, outs in LINEAR_SHAPES[arguments.device]
    ] + [
        (
            f"cross_entropy {batch} x {classes}",
            (),
            [(batch, classes)],
            torch.randint(classes, (batch,), device=arguments.device),
        )
        for batch, classes in CROSS_ENTROPY_SHAPES[arguments.device]
    ]
    for label, output_shape, input_shapes, target in cases:
        inputs = [torch.randn(shape, **options, requires_grad=True) for shape in input_shapes]
        grad_output = torch.randn(output_shape, **options)
        ours: Callable = functional.linear_sigmoid
        theirs: Callable = eager_linear
        if target is not None:
            ours = lambda input, target=target: functional.cross_entropy(input, target)  # noqa: E731
            theirs = lambda input, target=target: torch.nn.functional.cross_entropy(input, target)  # noqa: E731
        torch.compiler.reset()
        functions = {"torch_mlp": ours, "eager": theirs, "compile": torch.compile(theirs)}
        steps = {name: training_step(function, inputs, grad_output) for name, function in functions.items()}
        for step in steps.values():
            step()
        times = median_times(steps, arguments.rounds, arguments.seconds)
        ratio = min(times["eager"], times["compile"]) / times["torch_mlp"]
        print(f"{label:36s}" + "".join(f"{times[name]:12.1f}" for name in functions) + f"{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
