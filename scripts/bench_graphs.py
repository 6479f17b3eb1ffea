"""How the GPU benchmarks time: CUDA graphs of calls on inputs that are not in the cache, in turns, medians.

A graph holds several calls over sets of inputs that together exceed the L2 cache fourfold (at most 8 sets), so that no
launch and no Python is in the times, and little of what an earlier call left in the cache.
"""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

DEVICE = "cuda"
COMPILE_MODE, COMPILE_SECONDS = "max-autotune-no-cudagraphs", 40.0  # once so long is spent, default mode
Row = dict[str, Any]
Planned = tuple[str, str, torch.dtype, Callable[[], Row]]  # op, shape, dtype, measurement
Step = Callable[..., Any]
_compile_spent = 0.0


def input_sets(nbytes: int, cache: int) -> int:
    """How many sets of inputs of so many bytes leave nothing of one in the cache when its turn comes again."""
    return max(1, min(8, -(-4 * cache // nbytes)))


def capture(step: Step, sets: list[tuple[torch.Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of several calls, and how many; results stay until the set comes again, each in memory of its own."""
    calls = len(sets) * (2 if len(sets) < 8 else 8)  # short ones many times: the launch of the graph counts too
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), deque[Any](maxlen=len(sets))
    with torch.cuda.graph(graph):
        for call in range(calls):
            kept.append(step(*sets[call % len(sets)]))
    return graph, calls


def in_turns(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median microseconds of each between two events."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn:  # the first one warms up
                times[name].append(1e3 * start.elapsed_time(end))
    return {name: median(values) for name, values in times.items()}


def on_each(step: Step, sets: list[tuple[torch.Tensor, ...]]) -> None:
    """Call a step that no graph can hold on every set."""
    for inputs in sets:
        step(*inputs)


def graph_times(steps: dict[str, Step], make: Callable[[], tuple[torch.Tensor, ...]], turns: int) -> Row:
    """Microseconds of a call of each step, and why the others have none; ours must run."""
    first = make()
    nbytes = sum(tensor.nbytes for tensor in first)
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    sets = [first, *(make() for _ in range(input_sets(nbytes, cache) - 1))]
    runs: dict[str, tuple[Callable[[], Any], int]] = {}
    failed = {}
    global _compile_spent
    for name, step in steps.items():
        start = time.monotonic()
        try:
            if name == "liger":  # it asks the GPU for a number, which no graph can hold
                runs[name] = partial(on_each, step, sets), len(sets)
            else:
                graph, calls = capture(step, sets)
                runs[name] = graph.replay, calls
        except Exception as error:
            if name.startswith("ours"):
                raise
            failed[name] = brief(error)
        if name.startswith("compile"):
            _compile_spent += time.monotonic() - start
    times = in_turns({name: run for name, (run, _) in runs.items()}, turns)
    return {"microseconds": {name: times[name] / runs[name][1] for name in times}, "failed": failed}


def brief(error: BaseException) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def compiled(function: Step) -> Step:
    """By torch.compile, to be captured in a graph of ours."""
    mode = COMPILE_MODE if _compile_spent < COMPILE_SECONDS else "default"
    return torch.compile(function, mode=mode, dynamic=False)


def gradients(function: Step, leaves: int) -> Step:
    """Forward and backward: the first arguments get gradients, the last one is the upstream gradient."""

    def step(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = [argument.detach().requires_grad_() for argument in arguments[:leaves]]
        return torch.autograd.grad(function(*inputs, *arguments[leaves:-1]), inputs, arguments[-1])

    return step


def best_peer(times: dict[str, float], suffix: str = "") -> float:
    """Time of the fastest of the others over ours."""
    peers = [times[name + suffix] for name in ("eager", "compile", "chunked", "liger") if name + suffix in times]
    return min(peers, default=float("nan")) / times["ours" + suffix]
