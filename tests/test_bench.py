"""scripts/bench.py, run as its users run it, but in seconds."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    options = ["--quick", "--no-compile", "--turns=3", "--seconds=0.0005"]
    files = [f"--json={folder / 'rows.json'}", f"--plot={folder / 'ratios.png'}"]
    run = subprocess.run([sys.executable, SCRIPT, "all", *options, *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads((folder / "rows.json").read_text()), folder / "ratios.png"


def test_every_shape_is_a_line_and_a_row(result):
    text, written, _ = result
    rows = written["rows"]
    assert [row["op"] for row in rows] == ["linear"] * 6 + ["cross_entropy"] * 4 + ["binary_cross_entropy"] * 3
    for row in rows:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{row['shape']} ")]
        assert f"{row['microseconds']['ours']:.1f}" in line
        assert ("<" in line) == (row["ratio"] < 0.97)


def test_figures_follow_from_the_times(result):
    text, written, _ = result
    rows = written["rows"]
    for row in rows:
        times = row["microseconds"]
        assert math.isclose(row["ratio"], times["eager"] / times["ours"])
        assert math.isclose(row["forward ratio"], times["eager forward"] / times["ours forward"])
        assert 0 < row["limit"] < times["eager"] / max(1e-9, times["ours"] - times["ops"])
        assert 0 < row["error"] < 1.5
    batch, ins, outs = 512, 512, 512
    (row,) = [row for row in rows if row["shape"] == f"{batch} x {ins} -> {outs}"]
    rate = 1e-9 * 6 * batch * ins * outs / (1e-6 * row["microseconds"]["ours"])
    assert math.isclose(row["of peak"], rate / row["gflops"])
    for op in ("linear", "cross_entropy", "binary_cross_entropy"):
        mean = statistics.geometric_mean(row["ratio"] for row in rows if row["op"] == op)
        assert f"geometric mean {mean:.2f} (limit " in text


def test_plot_is_a_picture(result):
    assert result[2].read_bytes().startswith(b"\x89PNG")


def test_training_peers_learn_the_same(tmp_path, mnist_dir):
    """A run of its own for a twentieth of the images, each peer for one epoch: equal accuracy, figures that fit."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bench_train, json, torch; from torch_mlp import data\n"
        "load = data.load; bench_train.data.load = lambda *arguments: load(*arguments).first(3000)\n"
        "rows = bench_train.run([1], sys.argv[2], 1, quick=True)\n"
        "open(sys.argv[3], 'w').write(json.dumps(rows))"
    )
    command = [sys.executable, "-c", code, SCRIPT.parent, mnist_dir, tmp_path / "rows.json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = {row["peer"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert {"train_epoch", "torch eager", "torch.compile", "numpy, by hand", "DataLoader"} <= set(rows)
    for name, row in rows.items():
        assert f"{name:22s}{row['seconds']:9.3f}" in run.stdout
        assert math.isclose(row["times ours"], row["seconds"] / rows["train_epoch"]["seconds"])
        # JAX leaves out the last, short minibatch.
        assert abs(row["accuracy"] - rows["torch eager"]["accuracy"]) < (0.05 if name == "JAX, all cores" else 0.002)


def test_whole_runs(tmp_path, mnist_dir):
    """The same for the default settings and for more images: one seed, and both ways of training learn the same."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bench_train, json; from torch_mlp import data\n"
        "from tqdm import tqdm\n"
        "load = data.load; bench_train.data.load = lambda *arguments: load(*arguments).first(2000)\n"
        "bench_train.SEEDS = 1; images = bench_train.data.load('mnist', sys.argv[2])\n"
        "rows = bench_train._report_whole_runs(images, sys.argv[2], 1, tqdm(disable=True))\n"
        "open(sys.argv[3], 'w').write(json.dumps(rows))"
    )
    command = [sys.executable, "-c", code, SCRIPT.parent, mnist_dir, tmp_path / "rows.json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ours, eager, growth = json.loads((tmp_path / "rows.json").read_text())
    assert ours["peer"] == "train_mnist.py"
    assert abs(ours["accuracy"] - eager["accuracy"]) < 0.002
    assert ours["accuracy"] > 0.8
    assert f"{ours['seconds']:9.2f}{100 * ours['accuracy']:9.2f}%" in run.stdout
    assert f"10 times the images take {growth['times']:.2f} times as long" in run.stdout
