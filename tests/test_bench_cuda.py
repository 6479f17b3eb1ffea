"""scripts/bench_cuda.py without a GPU: every row's computations on the CPU, with a timer that makes times up."""

import argparse
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import bench_cuda
import bench_cuda_train
import bench_graphs

from torch_mlp import data

LIMITS = {"bytes per second": 1e12, "operations per second": 1e14}


@pytest.fixture
def on_cpu(monkeypatch):
    def graph_times(steps, make, turns):
        for step in steps.values():
            step(*make())
        return {"microseconds": {name: 2.0 if name.startswith("ours") else 3.0 for name in steps}, "failed": {}}

    def in_turns(runs, turns):
        for run in runs.values():
            run()
        return {name: 2.0 if name == "ours" else 1.0 for name in runs}

    for module in (bench_cuda, bench_cuda_train, bench_graphs):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(bench_cuda, "graph_times", graph_times)
    monkeypatch.setattr(bench_cuda, "in_turns", in_turns)
    monkeypatch.setattr(bench_cuda, "LOGITS", ((32, 10),))
    monkeypatch.setattr(bench_cuda, "BINARY_LOGITS", ((64,),))
    monkeypatch.setattr(bench_cuda, "SMALL_LINEAR", ((8, 7, 6),))
    monkeypatch.setattr(bench_cuda, "LARGE_LINEAR", ((9, 7, 6),))
    monkeypatch.setattr(bench_cuda_train, "random_images", lambda count: _images(256 if count == 60000 else 4096))
    monkeypatch.setattr(bench_cuda_train, "WIDE", (784, 8, 8, 10))
    monkeypatch.setattr(bench_cuda_train, "SHAPES", (((784, 8, 10), 16), ((784, 8, 10), 32)))
    monkeypatch.setattr(bench_cuda, "ceilings", lambda turns: dict(LIMITS))
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1 << 20)


def _images(count):
    return torch.randint(256, (count, 784), dtype=torch.uint8), torch.randint(10, (count,))


@pytest.mark.parametrize(("op", "count"), [("cross_entropy", 2), ("binary_cross_entropy", 2), ("linear", 3)])
def test_every_row_is_measured_and_printed(on_cpu, capsys, op, count):
    options = argparse.Namespace(op=op, dtype="both", quick=False, no_compile=True, turns=3, data_dir="nowhere")
    rows = bench_cuda.run(options)[1:]
    assert len(rows) == count
    assert all(row["ratio"] == 1.5 for row in rows), rows
    assert [text for text in capsys.readouterr().out.splitlines() if text.startswith(op)] == list(
        map(bench_cuda.line, rows)
    )
    if op == "cross_entropy":
        assert math.isclose(rows[0]["of copy"], 2 * 32 * 10 * 2 / 1e12 * 1e6 / 2)


def test_training_and_wide(on_cpu, capsys):
    options = argparse.Namespace(op="train", dtype="both", quick=False, no_compile=True, turns=3, data_dir="nowhere")
    rows = bench_cuda.run(options)[1:]
    assert len(rows) == 5
    assert all(set(row["microseconds"]) == {"ours", "eager"} for row in rows), rows
    (wide,) = [row for row in rows if "of bf16 rate" in row]
    assert "random pixels" in capsys.readouterr().out
    assert " of bf16 rate " in bench_cuda.line(wide)


@pytest.mark.parametrize("quick", [False, True])
def test_training_on_images_from_disk(on_cpu, monkeypatch, quick):
    monkeypatch.setattr(bench_cuda_train, "mnist_of", lambda folder: data.load("digits", folder))
    monkeypatch.setattr(bench_cuda_train, "SHAPES", (((64, 8, 10), 16), ((64, 8, 10), 32)))
    monkeypatch.setattr(bench_cuda_train, "ACCURACY", 0.5)
    options = argparse.Namespace(op="train", dtype="float32", quick=quick, no_compile=True, turns=3, data_dir="nowhere")
    rows = bench_cuda.run(options)[1:]
    labels = ["64-8-10 / 32"] if quick else ["64-8-10 / 16", "64-8-10 / 32", "to 50.0 % of MNIST"]
    assert [row["shape"] for row in rows] == labels
    assert all(row["microseconds"]["ours"] > 0 for row in rows), rows


def test_time_to_an_accuracy(on_cpu, monkeypatch):
    digits = data.load("digits", "nowhere")
    monkeypatch.setattr(bench_cuda_train, "SEEDS", 2)
    monkeypatch.setattr(bench_cuda_train, "ACCURACY", 0.5)
    row = bench_cuda_train.accuracy_row(digits)
    times = row["microseconds"]
    assert 0 < times["ours"] <= times["ours worst"]
    assert row["ratio"] == times["eager"] / times["ours"]
    monkeypatch.setattr(bench_cuda_train, "ACCURACY", 1.1)
    with pytest.raises(RuntimeError, match=r"expected an accuracy of 1\.1, got 0\.\d+ with seed 0"):
        bench_cuda_train.accuracy_row(digits)


def test_linear_cross_entropy(on_cpu):
    row = bench_cuda.linear_cross_entropy_row((16, 8, 12), argparse.Namespace(turns=3))
    assert row["ratio"] == 0.5
    assert set(row["memory"]) >= {"ours", "eager"}
    assert not row["failed"]


def test_a_row_that_fails_is_a_line_and_the_rest_follows(on_cpu, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(bench_cuda, "loss_row", fail)
    options = argparse.Namespace(op="cross_entropy", dtype="both", quick=False, no_compile=True, turns=3)
    rows = bench_cuda.run(options)[1:]
    assert [row["error"] for row in rows] == ["RuntimeError: out of memory"] * 2
    assert capsys.readouterr().out.count("RuntimeError: out of memory") == 2


def test_a_peer_that_fails_is_left_out(monkeypatch):
    def capture(step, sets):
        step(*sets[0])
        return argparse.Namespace(replay=lambda: None), 4

    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(bench_graphs, "capture", capture)
    monkeypatch.setattr(
        bench_graphs, "in_turns", lambda runs, turns: {name: run() or 8.0 for name, run in runs.items()}
    )
    cache = argparse.Namespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: cache)
    steps = {"ours": torch.square, "eager": fail, "liger": torch.square}
    row = bench_graphs.graph_times(steps, lambda: (torch.ones(1000),), 3)
    assert row == {"microseconds": {"ours": 2.0, "liger": 1.0}, "failed": {"eager": "ValueError: no"}}
    with pytest.raises(ValueError, match="no"):
        bench_graphs.graph_times({"ours": fail}, lambda: (torch.ones(1000),), 3)


def test_sets_exceed_the_cache_fourfold():
    assert bench_graphs.input_sets(1 << 30, 50 << 20) == 1
    assert bench_graphs.input_sets(100 << 20, 50 << 20) == 2
    assert bench_graphs.input_sets(64, 50 << 20) == 8
