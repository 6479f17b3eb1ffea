"""The GPU part of bench.py: ops and training beside torch eager and torch.compile, and beside what the GPU can do.

The ceilings are measured first: the bytes that an elementwise kernel copies in a second, and a bfloat16 product. Ops
run in CUDA graphs, see bench_graphs.py; linear_cross_entropy does not, as its kernels are long.
"""

import argparse
import datetime
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bench_cuda_train
import bench_linear_cross_entropy
import torch
from bench_graphs import DEVICE, Planned, Row, Step, best_peer, brief, compiled, gradients, graph_times, in_turns
from torch.nn import functional as F

from torch_mlp import functional

LOGITS = ((8192, 32000), (4096, 128256), (16384, 1000), (65536, 10))
BINARY_LOGITS = ((64,), (1 << 20,), (1 << 26,))
LARGE_LINEAR = ((4096, 4096, 4096), (8192, 1024, 4096))  # batch, in_features, out_features; bfloat16 only
SMALL_LINEAR = ((64, 784, 512), (256, 1024, 1024))


def eager_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What linear_sigmoid stands for."""
    return torch.sigmoid(F.linear(input, weight, bias))


def eager_cross_entropy(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What cross_entropy stands for."""
    return F.cross_entropy(input, target)


def loss_row(op: str, shape: tuple[int, ...], dtype: torch.dtype, limits: Row, options: argparse.Namespace) -> Row:
    """A loss, forward + backward through autograd, beside the time in which its bytes could be copied."""
    peers: dict[str, Step] = {"ours": functional.cross_entropy, "eager": eager_cross_entropy}
    if op == "binary_cross_entropy":
        peers = {"ours": functional.binary_cross_entropy_with_logits, "eager": F.binary_cross_entropy_with_logits}
    elif limits.get("liger"):
        peers["liger"] = limits["liger"]
    if not options.no_compile and op == "cross_entropy":
        peers["compile"] = compiled(eager_cross_entropy)

    def make() -> tuple[torch.Tensor, ...]:
        input, one = torch.randn(shape, dtype=dtype, device=DEVICE), torch.ones((), dtype=dtype, device=DEVICE)
        binary = op == "binary_cross_entropy"
        target = torch.randint(2 if binary else shape[1], shape[:1], device=DEVICE)
        return input, target.to(dtype) if binary else target, one

    row = graph_times({name: gradients(peer, 1) for name, peer in peers.items()}, make, options.turns)
    count = torch.Size(shape).numel() * dtype.itemsize
    # The gradient is written once, the logits are read once, and so are targets as large as they.
    copy = 1e6 * count * (3 if op == "binary_cross_entropy" else 2) / limits["bytes per second"]
    times = row["microseconds"]
    return row | {"of copy": copy / times["ours"], "ratio": best_peer(times)}


def linear_row(shape: tuple[int, int, int], dtype: torch.dtype, options: argparse.Namespace) -> Row:
    """linear_sigmoid, forward alone and forward + backward, beside the bare product of the forward pass."""
    batch, ins, outs = shape
    peers: dict[str, Step] = {"ours": functional.linear_sigmoid, "eager": eager_linear}
    if not options.no_compile and shape in LARGE_LINEAR:
        peers["compile"] = compiled(eager_linear)

    def make() -> tuple[torch.Tensor, ...]:
        sizes = ((batch, ins), (outs, ins), (outs,), (batch, outs))
        input, weight, bias, grad = (torch.randn(size, dtype=dtype, device=DEVICE) for size in sizes)
        return input, weight / ins**0.5, bias, grad

    steps: dict[str, Step] = {"mm": lambda input, weight, *_: torch.mm(input, weight.t())}
    for name, peer in peers.items():
        steps[f"{name} forward"] = lambda *arguments, peer=peer: peer(*arguments[:3])
        steps[name] = gradients(peer, 3)
    row = graph_times(steps, make, options.turns)
    times = row["microseconds"]
    ratios = {"forward ratio": best_peer(times, " forward"), "ratio": best_peer(times)}
    return row | {"forward over mm": times["ours forward"] / times["mm"]} | ratios


def linear_cross_entropy_row(shape: tuple[int, int, int], options: argparse.Namespace) -> Row:
    """linear_cross_entropy, forward + backward without a graph, and the MiB that a step adds at its peak."""
    batch, features, classes = shape
    input, weight = (torch.randn(n, features, dtype=torch.bfloat16, device=DEVICE) for n in (batch, classes))
    weight /= features**0.5
    target, one = torch.randint(classes, (batch,), device=DEVICE), torch.ones((), dtype=input.dtype, device=DEVICE)
    runs: dict[str, Callable[[], Any]] = {}
    memory, failed = {}, {}
    for name, peer in bench_linear_cross_entropy.peers().items():
        step = gradients(peer, 2)
        try:
            step(input, weight, target, one)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(input, weight, target, one)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            runs[name] = partial(step, input, weight, target, one)
        except Exception as error:
            if name == "ours":
                raise
            failed[name] = brief(error)
    times = in_turns(runs, min(5, options.turns))
    return {"microseconds": times, "failed": failed, "memory": memory, "ratio": best_peer(times)}


def ceilings(turns: int) -> Row:
    """What the GPU can do: bytes a second read and written by a copy, operations a second of a bfloat16 product."""
    source = torch.ones(1 << 30, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    copies = {"add": lambda: torch.add(source, 0, out=target), "copy": lambda: target.copy_(source)}
    copy = min(in_turns(copies, turns).values())
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    product = in_turns({"mm": lambda: torch.mm(a, b)}, turns)["mm"]
    return {"bytes per second": 2e6 * source.nbytes / copy, "operations per second": 2e6 * 8192**3 / product}


def line(row: Row) -> str:
    """A row as text: microseconds, then ratios; < marks a loss."""
    head = f"{row['op']:21s}{row['shape']:23s}{row['dtype']:9s}"
    if "error" in row:
        return head + row["error"]
    text = "".join(f" {name} {value:.1f}" for name, value in row["microseconds"].items())
    text += f" | ratio {row['ratio']:.2f}{'<' if row['ratio'] < 0.97 else ''}"
    text += "".join(f" {name} {row[name]:.2f}" for name in ("forward ratio", "forward over mm") if name in row)
    text += "".join(f" {name} {100 * row[name]:.0f}%" for name in ("of copy", "of bf16 rate") if name in row)
    text += "".join(f" {name} +{mib:.0f} MiB" for name, mib in row.get("memory", {}).items())
    return head + text + "".join(f" ({name} left out: {why})" for name, why in row.get("failed", {}).items())


def describe() -> str:
    """The GPU and its software."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = ""
    return (
        f"{datetime.date.today()}, {torch.cuda.get_device_name()}, driver {driver or 'unknown'}; torch "
        f"{torch.__version__}, CUDA {torch.version.cuda}, TF32 {torch.backends.cuda.matmul.allow_tf32}"
    )


def plan(options: argparse.Namespace, limits: Row) -> list[Planned]:
    """Op, shape, dtype and measurement of every row."""
    rows: list[Planned] = []
    logits: dict[str, tuple[tuple[int, ...], ...]] = {"cross_entropy": LOGITS, "binary_cross_entropy": BINARY_LOGITS}
    if options.quick:
        logits["cross_entropy"] = LOGITS[::3]
    for name in ("bfloat16", "float32") if options.dtype == "both" else (options.dtype,):
        dtype = getattr(torch, name)
        for op in (op for op in logits if options.op in (op, "all")):
            for sizes in logits[op]:
                label = " x ".join(map(str, sizes))
                rows.append((op, label, dtype, partial(loss_row, op, sizes, dtype, limits, options)))
        linear = SMALL_LINEAR + LARGE_LINEAR if dtype == torch.bfloat16 else SMALL_LINEAR
        for shape in linear[:: 2 if options.quick else 1] if options.op in ("linear", "all") else ():
            label = f"{shape[0]} x {shape[1]} -> {shape[2]}"
            rows.append(("linear_sigmoid", label, dtype, partial(linear_row, shape, dtype, options)))
        if dtype == torch.bfloat16 and options.op in ("linear_cross_entropy", "all"):
            shape = (2048, 1024, 32000) if options.quick else (8192, 4096, 128256)
            label = f"{shape[0]} x {shape[1]} -> {shape[2]}"
            rows.append(("linear_cross_entropy", label, dtype, partial(linear_cross_entropy_row, shape, options)))
    if options.op in ("train", "all"):
        rows += bench_cuda_train.plan(options, limits["operations per second"])
    return rows


def run(options: argparse.Namespace) -> list[Row]:
    """Print and return all rows, the ceilings first."""
    start = time.monotonic()
    if options.quick:
        options.no_compile, options.turns = True, min(options.turns, 5)
    limits = ceilings(options.turns)
    print(
        f"copy {limits['bytes per second'] / 1e12:.2f} TB/s, bfloat16 product "
        f"{limits['operations per second'] / 1e12:.0f} TFLOP/s; microseconds, medians of {options.turns} turns, "
        "forward + backward unless named forward; ratio: the best peer over ours",
        flush=True,
    )
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy  # type: ignore[import-not-found]

        limits["liger"] = liger_cross_entropy  # writes its gradient over the logits, which changes no time
    except ImportError:
        print("Liger-Kernel: left out, not installed")
    if "chunked" not in bench_linear_cross_entropy.peers():
        print("torch's linear_cross_entropy in chunks: left out, this torch has none")
    rows = [{"op": "ceilings"} | {name: value for name, value in limits.items() if name != "liger"}]
    try:
        for op, shape, dtype, measure in plan(options, limits):
            torch.manual_seed(0)
            torch.compiler.reset()
            row: Row = {"op": op, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
            try:
                row |= measure()
            except Exception as error:
                row["error"] = brief(error)
            rows.append(row)
            print(line(row), flush=True)
            torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print("bench: stopped; what was measured is kept")
    print(f"{time.monotonic() - start:.0f} s")
    return rows
