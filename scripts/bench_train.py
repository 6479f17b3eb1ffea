"""The training part of bench.py: an epoch of minibatch SGD on MNIST by torch_mlp and by what else a user could pick.

Every peer trains the same network from the same weights on the same images in the same order, an epoch at a time in
turns: sigmoid hidden units, softmax cross-entropy, plain SGD. Beside the seconds stands how often that is our time, the
share of the dense limit that it reaches, and the accuracy on the test images after all turns. The dense limit is what
the multiplications and additions of all layers, forward and backward, would take at the processor's measured peak; a
first layer that skips zero pixels goes below it.

Then the time from files to a trained network with the default settings of train_mnist.py, and how the time of an epoch
grows with the number of images.
"""

import statistics
import time
import warnings
from typing import Any

import torch
from bench_peers import LR, PEERS, SLOW, Task, ours_bfloat16, usual_script
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from train_mnist import HIDDEN, stock_twin

from torch_mlp import data, epoch, nn, training

NETWORKS = ((784, 128, 10), (784, 512, 256, 10))
BATCHES = (64, 128)
SEEDS = 5
MORE_IMAGES = 10  # times as many, to see how the time grows


def measure(task: Task, turns: int, progress: tqdm) -> list[dict[str, Any]]:
    """A row for each peer that is installed."""
    peers = {}
    for name, make in PEERS.items():
        if make is (usual_script if task.dense else ours_bfloat16):
            continue  # its images are those on disk; most of its products do not take place
        try:
            peers[name] = make(task)
        except ImportError as error:
            tqdm.write(f"{name}: left out, {error.name} is not installed")
    orders = [torch.randperm(len(task.labels), generator=torch.Generator().manual_seed(turn)) for turn in range(turns)]
    for run, _ in peers.values():
        run(orders[0][: 2 * task.batch_size])  # some compile at the first call
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    rates = []
    for turn, order in enumerate(orders):
        for name, (run, _) in peers.items():
            if turn == 0 or name not in SLOW:
                start = time.perf_counter()
                run(order)
                seconds[name].append(time.perf_counter() - start)
                progress.update()
        start = time.perf_counter()
        operations = torch.ops.torch_mlp._cpu_multiply_adds(torch.get_num_threads(), 1_000_000)
        rates.append(operations / (time.perf_counter() - start))
    limit = task.operations() / max(rates)
    best = statistics.median(seconds["train_epoch"])
    return [
        {
            "task": task.label,
            "threads": torch.get_num_threads(),
            "peer": name,
            "seconds": statistics.median(seconds[name]),
            "times ours": statistics.median(seconds[name]) / best,
            "of dense limit": limit / statistics.median(seconds[name]),
            "accuracy": task.accuracy(parameters),
        }
        for name, (_, parameters) in peers.items()
    ]


def time_to_accuracy(data_dir: str, progress: tqdm) -> list[dict[str, Any]]:
    """From the files to the last epoch and its test accuracy with the default settings of train_mnist.py."""
    rows = []
    for seed in range(SEEDS):
        for name, engine in (("train_mnist.py", "auto"), ("the same, torch eager", "autograd")):
            start = time.perf_counter()
            dataset = data.load("mnist", data_dir)
            torch.manual_seed(seed)
            model: torch.nn.Module = nn.MLP(dataset.num_features, HIDDEN, dataset.num_classes)
            criterion: torch.nn.Module = nn.CrossEntropyLoss()
            if engine == "autograd":
                model, criterion = stock_twin(model), torch.nn.CrossEntropyLoss()
            *_, last = training.train(model, criterion, dataset, seed=seed, engine=engine, progress=False)
            seconds = time.perf_counter() - start
            rows.append({"peer": name, "seed": seed, "seconds": seconds, "accuracy": last.test_accuracy})
            progress.update()
    return [{"task": "default settings", "threads": torch.get_num_threads(), **row} for row in rows]


def growth(dataset: data.Dataset, turns: int, progress: tqdm) -> dict[str, Any]:
    """The time of an epoch over many times the images, over that over the images."""
    seconds: dict[int, list[float]] = {1: [], MORE_IMAGES: []}
    images, labels = dataset.train_images.flatten(1), dataset.train_labels
    sets = {times: (images.repeat(times, 1), labels.repeat(times)) for times in seconds}
    model = nn.MLP(dataset.num_features, 128, dataset.num_classes)
    for _ in range(turns):
        for times, arguments in sets.items():
            order = torch.randperm(len(arguments[1]))
            start = time.perf_counter()
            epoch.train_epoch(model, *arguments, batch_size=BATCHES[0], lr=LR, order=order)
            seconds[times].append(time.perf_counter() - start)
            progress.update()
    few, many = (statistics.median(values) for values in seconds.values())
    return {"task": "growth", "threads": torch.get_num_threads(), "peer": "train_epoch", "times": many / few}


def run(threads: list[int], data_dir: str, turns: int, quick: bool) -> list[dict[str, Any]]:
    """Print the tables, give their rows."""
    warnings.filterwarnings("ignore", module="sklearn")
    dataset = data.load("mnist", data_dir)
    cases = [(widths, batch, False) for widths in NETWORKS for batch in BATCHES]
    cases += [(widths, BATCHES[0], True) for widths in NETWORKS] + [(NETWORKS[1], BATCHES[1], True)]
    if quick:
        cases, threads = cases[:1], threads[:1]
    rows = []
    with tqdm(total=len(threads) * len(cases) * len(PEERS) * turns, unit=" runs", disable=None) as progress:
        for count in threads:
            torch.set_num_threads(count)
            with threadpool_limits(count):
                for widths, batch, dense in cases:
                    torch.compiler.reset()
                    task = Task(dataset, data_dir, widths, batch, dense)
                    table = measure(task, turns, progress)
                    rows += table
                    tqdm.write(f"\n{task.label}, {count} thread(s)")
                    tqdm.write(f"{'':22s}{'s/epoch':>9s}{'times ours':>12s}{'of dense limit':>16s}{'accuracy':>10s}")
                    for row in table:
                        tqdm.write(
                            f"{row['peer']:22s}{row['seconds']:9.3f}{row['times ours']:12.2f}"
                            f"{100 * row['of dense limit']:15.0f}%{100 * row['accuracy']:9.2f}%"
                        )
                if not quick:
                    rows += _report_whole_runs(dataset, data_dir, turns, progress)
    return rows


def _report_whole_runs(dataset: data.Dataset, data_dir: str, turns: int, progress: tqdm) -> list[dict[str, Any]]:
    runs = time_to_accuracy(data_dir, progress)
    tqdm.write(
        f"\ndefault settings of train_mnist.py, from the files to the last epoch, {runs[0]['threads']} thread(s)"
    )
    tqdm.write(f"{'':22s}{'seconds':>9s}{'accuracy':>10s}   medians of {SEEDS} seeds; accuracy of each")
    for name in dict.fromkeys(row["peer"] for row in runs):
        of_peer = [row for row in runs if row["peer"] == name]
        accuracies = [100 * row["accuracy"] for row in of_peer]
        seconds = statistics.median(row["seconds"] for row in of_peer)
        tqdm.write(
            f"{name:22s}{seconds:9.2f}{statistics.median(accuracies):9.2f}%"
            f"   {', '.join(f'{accuracy:.2f}' for accuracy in accuracies)}"
        )
    more = growth(dataset, turns, progress)
    tqdm.write(f"\n{MORE_IMAGES} times the images take {more['times']:.2f} times as long")
    return [*runs, more]
