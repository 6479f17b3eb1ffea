#!/usr/bin/env python3
"""Time torch_mlp's ops beside torch eager and torch.compile, in one process and in turns, losses included.

Forward + backward through autograd, and the forward pass alone. Beside them run, in the same turns, our two ops called
directly ("ops"), the processor's own peak (multiplications and additions that wait for nothing) and a copy of the
logits. What the ops do not take is taken by autograd and Python, whatever the kernels do. Together they give the limit:
the ratio if products ran at the peak, or if a loss took no longer than one exponential a logit at the peak (three for
the binary one, whose logarithm counts as one) or a copy of what it reads and writes, whichever is longer. The peak is
that of the vector instructions in float32; where a matrix unit multiplies float32, more than 100 % of it may be
reached, and the limit is by the unit's own peak. Losses get the upstream gradient that loss.backward() gives, 1; with
another one ("scaled") cross_entropy multiplies by it. Every figure is the median over the turns.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads that wait by spinning stop each other on a machine that is shared, see train_mnist.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # numpy's, which would spin into the turn of whoever comes next

import bench_cuda
import bench_linear_cross_entropy
import bench_train
import torch
from bench_timing import error_ratio, forward, forward_backward, medians, multiply_adds, split_multiply_adds
from tqdm import tqdm

import torch_mlp
from torch_mlp import functional

BATCHES = (1, 8, 32, 64, 128, 256, 512, 1024, 4096)
LAYERS = ((784, 128), (784, 512), (512, 512), (1024, 1024), (512, 256), (256, 10), (512, 1000))
LOGITS = ((64, 10), (1024, 10), (60000, 10), (256, 1000), (4096, 1000), (512, 32000), (64, 128256))
BINARY_LOGITS = ((64,), (4096,), (1_000_000,))
QUICK_LINEAR = ((1, 784, 512), (64, 784, 128), (64, 784, 512), (128, 512, 512), (512, 512, 512), (64, 256, 10))
QUICK_LOGITS = ((64, 10), (1024, 10), (60000, 10), (256, 1000))
BFLOAT16_LAYERS = ((784, 128), (512, 512), (1024, 1024), (256, 10))
MULTIPLY_ADDS_OF_EXP = 10  # whose time one takes in a loop of nothing else, of which 9 are its own: csrc/cpu/exp.h


def eager_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What linear_sigmoid stands for."""
    return torch.sigmoid(torch.nn.functional.linear(input, weight, bias))


class Case:
    """One row of a table: an op, its inputs and what it is measured against."""

    def __init__(self, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        options: dict[str, Any] = {"dtype": dtype}
        self.op, self.shape, self.dtype = op, shape, dtype
        self.ours: Callable
        self.eager: Callable
        if op == "linear":
            batch, ins, outs = shape
            self.label = f"{batch} x {ins} -> {outs}"
            sizes: list[tuple[int, ...]] = [(batch, ins), (outs, ins), (outs,)]
            self.grad_output = torch.randn(batch, outs, **options)
            self.ours, self.eager = functional.linear_sigmoid, eager_linear
            self.work = 2 * batch * ins * outs  # floating-point operations of one of the three products
            self.ops = self.linear_ops
        elif op == "binary_cross_entropy":
            self.label = f"{shape[0]} logits"
            sizes = [shape]
            target = torch.randint(2, shape)
            targets = {to: target.to(to) for to in (torch.float64, dtype)}
            self.grad_output = torch.ones((), **options)
            self.exponentials, self.copies = 3, 2.5  # logits and targets are read twice, the gradient is written once
            self.ours = lambda input: functional.binary_cross_entropy_with_logits(input, targets[input.dtype])
            self.eager = lambda input: torch.nn.functional.binary_cross_entropy_with_logits(input, targets[input.dtype])
            self.ops = lambda: self.binary_cross_entropy_ops(targets[dtype])
        else:
            batch, classes = shape
            self.label = f"{batch} x {classes}"
            sizes = [(batch, classes)]
            target = torch.randint(classes, (batch,))
            self.grad_output = torch.ones((), **options)
            self.exponentials, self.copies = 1, 1  # the logits are read once, the gradient is written once
            self.ours = lambda input: functional.cross_entropy(input, target)
            self.eager = lambda input: torch.nn.functional.cross_entropy(input, target)
            self.ops = lambda: self.cross_entropy_ops(target)
        self.inputs = [torch.randn(size, **options, requires_grad=True) for size in sizes]
        if op == "linear":  # sums of unit variance, in the sloping part of the sigmoid
            self.inputs[1].data /= self.shape[1] ** 0.5

    @torch.no_grad()
    def linear_ops(self) -> None:
        """Forward and backward without autograd."""
        input, weight, bias = self.inputs
        output = torch.ops.torch_mlp.linear_act.default(input, weight, bias, "sigmoid")
        torch.ops.torch_mlp._linear_act_backward.default(
            self.grad_output, input, weight, output, "sigmoid", True, True, True
        )

    @torch.no_grad()
    def cross_entropy_ops(self, target: torch.Tensor) -> None:
        """Forward and backward without autograd."""
        options = (target, None, "mean", -100, 0.0)
        if self.dtype == torch.float32:
            torch.ops.torch_mlp._cross_entropy_with_gradient.default(*self.inputs, *options)
            return
        _, lse, total_weight = torch.ops.torch_mlp.cross_entropy.default(*self.inputs, *options)
        torch.ops.torch_mlp._cross_entropy_backward.default(
            self.grad_output, None, *self.inputs, *options[:2], lse, total_weight, *options[2:]
        )

    @torch.no_grad()
    def binary_cross_entropy_ops(self, target: torch.Tensor) -> None:
        """Forward and backward without autograd."""
        arguments = (*self.inputs, target, None, None, "mean")
        torch.ops.torch_mlp.binary_cross_entropy_with_logits.default(*arguments)
        torch.ops.torch_mlp._binary_cross_entropy_with_logits_backward.default(
            self.grad_output, *arguments, True, False
        )

    def work_at_peak(self) -> None:
        """As many multiplications and additions as the three products, and as many times waking the threads."""
        rounds = multiply_adds(rounds=1)  # on all threads
        for _ in range(3):
            multiply_adds(max(1, self.work // rounds))

    def steps(self, with_compile: bool) -> dict[str, Callable[[], Any]]:
        """What takes turns."""
        inputs, grad_output = self.inputs, self.grad_output
        steps: dict[str, Callable[[], Any]] = {
            "ours": forward_backward(self.ours, inputs, grad_output),
            "eager": forward_backward(self.eager, inputs, grad_output),
        }
        if with_compile:
            torch.compiler.reset()
            compiled = torch.compile(self.eager, dynamic=False)
            steps["compile"] = forward_backward(compiled, inputs, grad_output)
        steps["ops"] = self.ops
        if self.op == "cross_entropy":
            steps["ours scaled"] = forward_backward(self.ours, inputs, torch.full_like(grad_output, 0.7))
        steps["ours forward"] = forward(self.ours, inputs)
        steps["eager forward"] = forward(self.eager, inputs)
        steps["peak"], steps["unit's peak"] = multiply_adds, split_multiply_adds
        if self.op != "linear":
            source = torch.empty(self.inputs[0].shape, dtype=self.dtype)
            target = torch.zeros_like(source)
            steps["copy"] = lambda: target.copy_(source)
        elif self.dtype == torch.float32:
            steps["work"] = self.work_at_peak
        elif self.dtype == torch.bfloat16:
            floats = Case(self.op, self.shape, torch.float32)
            steps["ours float32"] = forward_backward(self.ours, floats.inputs, floats.grad_output)
        return steps

    def measure(self, turns: int, seconds: float, with_compile: bool) -> dict[str, Any]:
        """The row, times in microseconds."""
        steps = self.steps(with_compile)
        times = medians(steps, turns, seconds)
        best_peer = min(times["eager"], times.get("compile", times["eager"]))
        row: dict[str, Any] = {
            "op": self.op,
            "shape": self.label,
            "batch": self.shape[0],
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "microseconds": {
                name: 1e6 * value for name, value in times.items() if name not in ("peak", "unit's peak", "copy")
            },
            "ratio": best_peer / times["ours"],
            "forward ratio": times["eager forward"] / times["ours forward"],
        }
        if "ours scaled" in times:
            row["ratio scaled"] = best_peer / times["ours scaled"]
        if "ours float32" in times:
            row["float32 over ours"] = times["ours float32"] / times["ours"]
        peak = multiply_adds() / times["peak"]
        row["gflops"] = 1e-9 * peak
        if self.op == "linear":
            highest_peak = max(peak, split_multiply_adds() / times["unit's peak"])
            row["highest gflops"] = 1e-9 * highest_peak
            floor = 3 * self.work / highest_peak
            row["forward of peak"] = self.work / times["ours forward"] / peak
            row["eager forward of peak"] = self.work / times["eager forward"] / peak
        else:
            # A copy reads and writes.
            exponentials = self.exponentials * self.inputs[0].numel() * 2 * MULTIPLY_ADDS_OF_EXP / peak
            floor = max(self.copies * times["copy"], exponentials)
        row["of peak"] = 3 * self.work / peak / times["ours"] if self.op == "linear" else floor / times["ours"]
        if self.op != "linear" or self.dtype == torch.float32:  # the peak of bfloat16 products is another
            # New memory of over 32 MiB may cost the ops alone more than ours.
            row["limit"] = best_peer / (max(0.0, times["ours"] - times["ops"]) + floor)
        if self.dtype == torch.float32:
            row["error"] = error_ratio(self.ours, self.eager, self.inputs, self.grad_output)
        return row


def plan(arguments: argparse.Namespace, dtype: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Op, shape and dtype of every row."""
    linear: list[tuple[int, ...]] = [(batch, *layer) for layer in LAYERS for batch in BATCHES]
    logits: list[tuple[int, ...]] = list(LOGITS)
    if arguments.quick:
        linear, logits = list(QUICK_LINEAR), list(QUICK_LOGITS)
    elif dtype == "bfloat16":
        linear = [(batch, *layer) for layer in BFLOAT16_LAYERS for batch in BATCHES]
    shapes = {"linear": linear, "cross_entropy": logits, "binary_cross_entropy": list(BINARY_LOGITS)}
    return [(op, shape, dtype) for op in shapes if arguments.op in (op, "all") for shape in shapes[op]]


HEADER = (
    f"{'':24s}{'ours':>10s}{'eager':>10s}{'compile':>10s}{'ops':>10s}{'ratio':>7s}{'limit':>7s}{'of peak':>9s}"
    f"{'forward':>10s}{'eager':>10s}{'ratio':>7s}{'of peak':>9s}{'error':>7s}"
)


def line(row: dict[str, Any]) -> str:
    """A row as text; < marks a loss."""
    times = row["microseconds"]

    def percent(name: str) -> str:
        return f"{100 * row[name]:8.0f}%" if name in row else f"{'':9s}"

    mark = "<" if row["ratio"] < 0.97 else " "
    limit = f"{row['limit']:6.1f} " if "limit" in row else f"{'':7s}"
    text = (
        f"{row['shape']:24s}{times['ours']:10.1f}{times['eager']:10.1f}{times.get('compile', float('nan')):10.1f}"
        f"{times['ops']:10.1f}{row['ratio']:6.2f}{mark}{limit}{percent('of peak')}{times['ours forward']:10.1f}"
        f"{times['eager forward']:10.1f}{row['forward ratio']:7.2f}{percent('forward of peak')}"
    )
    text += f"{row['error']:7.2f}" if "error" in row else ""
    for name in ("float32 over ours", "ratio scaled"):
        text += f"   {name} {row[name]:.2f}" if name in row else ""
    return text


def summary(rows: list[dict[str, Any]]) -> str:
    """Geometric mean and worst row of one table."""
    worst = min(rows, key=lambda row: row["ratio"])
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    losses = sum(row["ratio"] < 0.97 for row in rows)
    limits = [row["limit"] for row in rows if "limit" in row]
    of_limit = f" (limit {statistics.geometric_mean(limits):.2f})" if limits else ""
    text = (
        f"geometric mean {mean:.2f}{of_limit}, worst {worst['ratio']:.2f} at {worst['shape']}, "
        f"{losses} of {len(rows)} below 0.97"
    )
    errors = [row["error"] for row in rows if "error" in row]
    return text + (f", largest error {max(errors):.2f} of eager's" if errors else "")


def scaling(rows: list[dict[str, Any]]) -> list[str]:
    """How time grows with work: batch 4096 beside 512, and two threads beside one."""
    all_times = {(row["shape"], row["threads"]): row["microseconds"] for row in rows if row["dtype"] == "float32"}
    times = {key: values["ours"] for key, values in all_times.items()}
    lines = []
    for ins, outs in LAYERS:
        small, large = f"512 x {ins} -> {outs}", f"4096 x {ins} -> {outs}"
        if (small, 1) in times and (large, 1) in times:
            lines.append(
                f"{ins} -> {outs}: time per row, batch 4096 / 512: {times[large, 1] / times[small, 1] / 8:.2f}"
            )
    for (shape, threads), value in times.items():
        if threads == 2 and (shape, 1) in times and times[shape, 1] > 1000:
            text = f"{shape}: 2 threads {times[shape, 1] / value:.2f} times as fast as 1"
            if "work" in all_times[shape, 1]:
                text += f" (at the peak {all_times[shape, 1]['work'] / all_times[shape, 2]['work']:.2f})"
            lines.append(text)
    return lines


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar for each row: our speed relative to the better peer."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1 + 0.18 * len(rows)), layout="constrained")
    colors = ["tab:green" if row["ratio"] >= 1 else "tab:red" for row in rows]
    axes.barh(range(len(rows)), [row["ratio"] for row in rows], color=colors)
    labels = [f"{row['op']} {row['shape']} {row['dtype']}, {row['threads']} thread(s)" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("speed relative to the better of torch eager and torch.compile, forward + backward")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check_bfloat16() -> None:
    """Starts again without AMX where the machine announces it and then kills who uses it."""
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        return
    probe = "import torch; torch.ones(32, 32, dtype=torch.bfloat16) @ torch.ones(32, 32, dtype=torch.bfloat16)"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True)
    if result.returncode:
        print("bench: torch cannot multiply bfloat16 matrices here; all run without AMX (ONEDNN_MAX_CPU_ISA)")
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def describe() -> str:
    """The machine and its load."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [text.split(":", 1)[1].strip() for text in cpuinfo.read_text().splitlines() if "model name" in text]
        name = names[0] if names else name
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{datetime.date.today()}, {name}, {os.cpu_count()} cores, load {load}; torch {torch.__version__}, "
        f"torch_mlp {torch_mlp.__version__}, {torch_mlp.ops.cpu_capability()} kernels"
    )


def write(path: Path | None, rows: list[dict[str, Any]], machine: str = "") -> None:
    """All rows, if asked for."""
    if path:
        path.write_text(json.dumps({"machine": machine or describe(), "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "op",
        choices=("linear", "cross_entropy", "binary_cross_entropy", "linear_cross_entropy", "all", "train"),
        nargs="?",
        default="all",
        help="linear_cross_entropy: the loss of a linear layer, with memory; train: a whole epoch; both not among all "
        "on the CPU",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="CPU threads, in turn")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "both"), default="both", help="both: bfloat16 on a few layers only"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: see bench_cuda.py")
    parser.add_argument("--quick", action="store_true", help="a few shapes, float32, one thread: under two minutes")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--turns", type=int, default=9, help="how often each is measured")
    parser.add_argument("--seconds", type=float, default=0.005, help="about how long, each time")
    parser.add_argument("--data-dir", default=os.environ.get("TORCH_MLP_DATA", "data"), help="of MNIST, for train")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all ratios, as PNG or PDF")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        if arguments.plot:
            parser.error("--plot draws CPU rows only")
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU")
        machine = bench_cuda.describe()
        print(machine, flush=True)
        write(arguments.json, bench_cuda.run(arguments), machine)
        return
    dtypes = {"float32": ["float32"], "bfloat16": ["bfloat16"], "both": ["float32", "bfloat16"]}[arguments.dtype]
    if arguments.quick:
        dtypes, arguments.threads = dtypes[:1], arguments.threads[:1]
    if "bfloat16" in dtypes:
        check_bfloat16()
    print(describe())
    if arguments.op == "train":
        rows = bench_train.run(arguments.threads, arguments.data_dir, min(arguments.turns, 5), arguments.quick)
        write(arguments.json, rows)
        return
    if arguments.op == "linear_cross_entropy":
        write(
            arguments.json, bench_linear_cross_entropy.run(arguments.threads, min(arguments.turns, 7), arguments.quick)
        )
        return
    print("microseconds, medians; ratio: the better of eager and compile over ours; error: ours over eager's\n")

    # The allocator keeps from now on what is given back to it, as in a process that has trained for a while. Before, it
    # may fetch the pages of large results from the system anew each time, whoever's turn it happens to be. It learns so
    # from blocks of less than 32 MiB only, and always fetches larger ones anew.
    torch.empty(28 << 20, dtype=torch.uint8)

    rows = []
    todo = [(threads, *case) for threads in arguments.threads for name in dtypes for case in plan(arguments, name)]
    start = time.monotonic()
    try:
        with tqdm(total=len(todo), unit="shape", disable=None) as progress:
            table: list[dict[str, Any]] = []
            for index, (threads, op, shape, dtype) in enumerate(todo):
                if not table:
                    tqdm.write(f"{op}, {dtype}, {threads} thread(s), forward + backward\n{HEADER}")
                torch.set_num_threads(threads)
                torch.manual_seed(0)
                case = Case(op, shape, getattr(torch, dtype))
                table.append(case.measure(arguments.turns, arguments.seconds, not arguments.no_compile))
                tqdm.write(line(table[-1]))
                progress.update()
                following = todo[index + 1] if index + 1 < len(todo) else (0, "", (), "")
                if (following[0], following[1], following[3]) != (threads, op, dtype):
                    tqdm.write(summary(table) + "\n")
                    rows += table
                    table = []
    except KeyboardInterrupt:
        print("bench: stopped; what was measured is kept")
        rows += table
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("\n".join(scaling(rows)))
    print(f"{time.monotonic() - start:.0f} s; load {os.getloadavg()[0]:.2f}")
    write(arguments.json, rows)
    if arguments.plot and rows:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
