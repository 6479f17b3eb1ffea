"""The training part of bench_cuda.py: an epoch of minibatch SGD by torch_mlp, torch eager and torch.compile.

All take the same minibatches from images on the GPU. Times are by the wall clock, launches included: that is what a
user waits for. With MNIST on disk also the time in which train_mnist.py's default settings reach an accuracy.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from bench_graphs import DEVICE, Planned, Row, best_peer, brief
from torch.nn import functional as F
from train_mnist import HIDDEN, stock_twin

import torch_mlp
from torch_mlp import data, training

SHAPES = tuple(((784, hidden, 10), batch) for hidden in (128, 512) for batch in (64, 128, 1024))
WIDE = (784, 4096, 4096, 10)
ACCURACY, SEEDS = 0.98, 5


def epoch_row(
    widths: tuple[int, ...],
    batch: int,
    dtype: torch.dtype,
    images: tuple[torch.Tensor, torch.Tensor],
    with_compile: bool,
) -> Row:
    """Wall-clock microseconds of an epoch of whole minibatches, and its multiplications and additions."""
    pixels, labels = images
    order = torch.randperm(len(pixels), device=DEVICE)[: len(pixels) // batch * batch]
    bf16 = dtype == torch.bfloat16
    model = torch_mlp.nn.MLP(widths[0], list(widths[1:-1]), widths[-1]).to(DEVICE)
    twins = {"eager": stock_twin(model)} | ({"compile": stock_twin(model)} if with_compile else {})

    def ours(order: torch.Tensor) -> None:
        precision = "bf16" if bf16 else "full"
        torch_mlp.train_epoch(model, pixels, labels, batch_size=batch, lr=0.1, order=order, precision=precision)

    def stock(name: str) -> Callable[[torch.Tensor], None]:
        twin = twins[name]
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, fused=True)

        def loss(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=bf16):
                return F.cross_entropy(twin(input.to(torch.float32) / 255), target)

        function = torch.compile(loss, mode="reduce-overhead", dynamic=False) if name == "compile" else loss

        def run(order: torch.Tensor) -> None:
            for index in order.split(batch):
                if name == "compile":
                    torch.compiler.cudagraph_mark_step_begin()
                optimizer.zero_grad()
                function(pixels.index_select(0, index), labels.index_select(0, index)).backward()
                optimizer.step()

        return run

    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    runs = {"ours": ours} | {name: stock(name) for name in twins}
    for turn in range(4):
        for name, run in runs.items():
            if name in failed:
                continue
            try:
                torch.cuda.synchronize()
                start = time.perf_counter()
                run(order if turn else order[: 5 * batch])  # the first one warms up
                torch.cuda.synchronize()
                times.setdefault(name, [])
                times[name] += [1e6 * (time.perf_counter() - start)] if turn else []
            except Exception as error:
                if name == "ours":
                    raise
                times.pop(name, None)
                failed[name] = brief(error)
    medians = {name: median(values) for name, values in times.items() if values}
    parameters = sum(a * b for a, b in itertools.pairwise(widths))
    operations = len(order) * (6 * parameters - 2 * widths[0] * widths[1])  # images need no gradient
    return {"microseconds": medians, "failed": failed, "ratio": best_peer(medians), "operations": operations}


def accuracy_row(dataset: data.Dataset) -> Row:
    """Wall-clock microseconds until so many of the test images are recognized: median and worst of the seeds."""

    def seconds(model: torch.nn.Module, criterion: torch.nn.Module, engine: str, seed: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for metrics in training.train(model, criterion, dataset, seed=seed, engine=engine, progress=False):
            if metrics.test_accuracy >= ACCURACY:
                return time.perf_counter() - start
        raise RuntimeError(f"expected an accuracy of {ACCURACY}, got {metrics.test_accuracy} with seed {seed}")

    def network(seed: int) -> torch_mlp.nn.MLP:
        torch.manual_seed(seed)
        return torch_mlp.nn.MLP(dataset.num_features, HIDDEN, dataset.num_classes).to(DEVICE)

    seconds(network(0), torch_mlp.nn.CrossEntropyLoss(), "auto", 0)  # warms up
    ours = [1e6 * seconds(network(seed), torch_mlp.nn.CrossEntropyLoss(), "auto", seed) for seed in range(SEEDS)]
    eager = 1e6 * seconds(stock_twin(network(0)), torch.nn.CrossEntropyLoss(), "autograd", 0)
    times = {"ours": median(ours), "ours worst": max(ours), "eager": eager}
    return {"microseconds": times, "ratio": best_peer(times)}


def mnist_of(folder: str) -> data.Dataset | None:
    """MNIST on the GPU, if it is on disk."""
    if (Path(folder) / "MNIST" / "raw").is_dir():
        try:
            return data.load("mnist", folder).to(DEVICE)
        except (data.DataError, ImportError) as error:
            print(brief(error))
    return None


def random_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels."""
    pixels = torch.randint(256, (count, 784), dtype=torch.uint8, device=DEVICE)
    return pixels, torch.randint(10, (count,), device=DEVICE)


def plan(options: argparse.Namespace, matrix_rate: float) -> list[Planned]:
    """Op, shape, dtype and measurement of every row."""
    rows: list[Planned] = []
    mnist = mnist_of(options.data_dir)
    images = (mnist.train_images.flatten(1), mnist.train_labels) if mnist else random_images(60000)
    which = "MNIST" if mnist else f"random pixels (no MNIST in {options.data_dir})"
    print(f"train: wall-clock microseconds of an epoch of whole minibatches, {which}", flush=True)
    for name in ("bfloat16", "float32") if options.dtype == "both" else (options.dtype,):
        dtype = getattr(torch, name)
        for widths, batch in SHAPES[1:2] if options.quick else SHAPES:
            compiles = not options.no_compile and (widths, batch) == SHAPES[1]
            label = f"{'-'.join(map(str, widths))} / {batch}"
            rows.append(("train", label, dtype, partial(epoch_row, widths, batch, dtype, images, compiles)))
        if options.quick:
            continue
        if dtype == torch.bfloat16:
            rows.append(("train", f"{'-'.join(map(str, WIDE))} / 4096", dtype, partial(wide_row, matrix_rate)))
        if dtype == torch.float32 and mnist:
            rows.append(("train", f"to {100 * ACCURACY:.1f} % of MNIST", dtype, partial(accuracy_row, mnist)))
    return rows


def wide_row(matrix_rate: float) -> Row:
    """A network whose products take the time, and its share of the rate of a bare product."""
    row = epoch_row(WIDE, 4096, torch.bfloat16, random_images(32768), False)
    return row | {"of bf16 rate": 1e6 * row["operations"] / row["microseconds"]["ours"] / matrix_rate}
