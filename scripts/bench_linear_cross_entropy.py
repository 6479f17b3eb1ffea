"""The loss of a linear layer's output, forward + backward, beside torch's ways to it; for scripts/bench.py.

Peers: torch.nn.functional.linear_cross_entropy as it stands, the same in chunks (options), and torch.compile of linear
and cross_entropy. Times are medians over turns in one process. Memory is what a forward and backward pass adds to the
peak of a process of its own that has done a small one before.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_timing import error_ratio, forward_backward, medians, multiply_adds
from tqdm import tqdm

from torch_mlp import functional

SHAPES = ((1024, 256, 10), (1024, 256, 1000), (1024, 512, 32000))  # batch, in_features, classes
QUICK_SHAPES = SHAPES[:2]


def eager(input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What all stand for."""
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(input, weight), target)


def peers() -> dict[str, Callable[..., torch.Tensor]]:
    """Ours first; torch's in chunks where this torch has it."""
    found: dict[str, Callable[..., torch.Tensor]] = {"ours": functional.linear_cross_entropy, "eager": eager}
    if options := getattr(torch.nn, "LinearCrossEntropyOptions", None):
        chunked = torch.nn.functional.linear_cross_entropy
        found["chunked"] = lambda input, weight, target: chunked(input, weight, target, options=options())
    return found


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Input and weight, logits of unit variance; and targets."""
    batch, features, classes = shape
    input, weight = torch.randn(batch, features), torch.randn(classes, features).div_(features**0.5)
    return [t.to(dtype).requires_grad_() for t in (input, weight)], torch.randint(classes, (batch,))


def measure(shape: tuple[int, int, int], turns: int) -> dict[str, Any]:
    """A row, times in milliseconds."""
    torch.manual_seed(0)
    leaves, target = inputs(shape, torch.float32)
    halves = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    one = torch.ones(())
    steps: dict[str, Callable[[], Any]] = {
        name: forward_backward(lambda *args, function=function: function(*args, target), leaves, one)
        for name, function in peers().items()
    }
    torch.compiler.reset()
    compiled = torch.compile(eager, dynamic=False)
    steps["compile"] = forward_backward(lambda *args: compiled(*args, target), leaves, one)
    steps["ours bfloat16"] = forward_backward(
        lambda *args: functional.linear_cross_entropy(*args, target), halves, one.bfloat16()
    )
    steps["peak"] = multiply_adds
    times = medians(steps, turns, 0.05)
    batch, features, classes = shape
    peak = multiply_adds() / times.pop("peak")
    error = error_ratio(
        lambda *args: functional.linear_cross_entropy(*args, target), lambda *args: eager(*args, target), leaves, one
    )
    return {
        "op": "linear_cross_entropy",
        "shape": f"{batch} x {features} -> {classes}",
        "threads": torch.get_num_threads(),
        "milliseconds": {name: 1e3 * value for name, value in times.items()},
        "ratio": min(times[name] for name in times if not name.startswith("ours")) / times["ours"],
        "float32 over bfloat16": times["ours"] / times["ours bfloat16"],
        "of peak": 6 * batch * features * classes / peak / times["ours"],
        "error": error,
    }


def peak_memory(name: str, shape: tuple[int, int, int]) -> float:
    """MiB that a step of this peer adds to the peak of this process, which has done nothing else."""
    torch.set_num_threads(1)
    (small, weight), target = inputs((2, shape[1], 10), torch.float32)
    torch.autograd.grad(peers()[name](small, weight, target), (small, weight))
    leaves, target = inputs(shape, torch.float32)
    before = peak_of_process()
    torch.autograd.grad(peers()[name](*leaves, target), leaves)
    return peak_of_process() - before


def peak_of_process() -> float:
    """MiB; Linux only. What getrusage gives would begin with the peak of the process that started this one."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def run(threads: list[int], turns: int, quick: bool) -> list[dict[str, Any]]:
    """Print and return all rows."""
    shapes = QUICK_SHAPES if quick else SHAPES
    names = [*peers(), "compile"]
    print(
        "milliseconds, medians; ratio: the best peer over ours; bf16: our float32 over our bfloat16; error: ours over "
        "eager's; memory: MiB that a step adds\n"
        + f"{'':22s}"
        + "".join(f"{name:>10s}" for name in names)
        + f"{'ratio':>7s}{'bf16':>6s}{'of peak':>9s}{'error':>7s}   memory"
    )
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for shape in tqdm([(count, shape) for count in threads for shape in shapes], unit="shape", disable=None):
        torch.set_num_threads(shape[0])
        row = measure(shape[1], turns)
        memory = {}
        for name in peers():
            with spawn.Pool(1) as pool:
                memory[name] = pool.apply(peak_memory, (name, shape[1]))
        row["memory"] = memory
        rows.append(row)
        times = "".join(f"{row['milliseconds'][name]:10.2f}" for name in names)
        held = ", ".join(f"{name} {value:.0f}" for name, value in memory.items())
        tqdm.write(
            f"{row['shape']:22s}{times}{row['ratio']:7.2f}{row['float32 over bfloat16']:6.2f}"
            f"{100 * row['of peak']:8.0f}%{row['error']:7.2f}   {held}   {row['threads']} thread(s)"
        )
    return rows
