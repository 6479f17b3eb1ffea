"""scripts/optimizers.py, landscape.py and logistic_regression.py, run as their users run them."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def run(folder, script, *options, code=0):
    command = [sys.executable, str(SCRIPTS / script), *map(str, options)]
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_MLP_DATA"}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == code, finished.stderr
    return finished


def assert_picture(path):
    assert path.read_bytes().startswith(b"\x89PNG")


def test_optimizers(tmp_path):
    """On the digits where there is no MNIST, without a download; each line is of one method."""
    output = tmp_path / "new" / "folder" / "curves.png"
    options = ("--limit", 200, "--passes", 2, "--batch-size", 30, "--output", output)
    finished = run(tmp_path, "optimizers.py", *options)
    assert "MNIST is not in data; --dataset mnist downloads it. Taking the 8x8 digits instead." in finished.stdout
    assert "digits: 200 images; network 64-64-10, tanh" in finished.stdout
    row = r"^(gradient descent|SGD|minibatch SGD) +(\d+) +([\d.]+) +(\d+) +([\d.]+) +[\d.]+ +([\d.]+)$"
    rows = re.findall(row, finished.stdout, re.MULTILINE)
    assert [row[:5] for row in rows] == [
        ("gradient descent", "200", "0.3", "20", "20.00"),
        ("SGD", "1", "0.005", "40", "0.20"),
        ("minibatch SGD", "30", "0.1", "14", "2.00"),
    ]
    assert all(float(row[5]) < 2.3 for row in rows)
    reached = re.findall(r"^(.*\S) +([\d.]+) passes +[\d.]+ seconds$", finished.stdout, re.MULTILINE)
    assert [name for name, _ in reached] == [row[0] for row in rows]
    assert float(reached[2][1]) < float(reached[0][1])  # minibatch SGD comes there in fewer passes
    assert finished.stdout.splitlines()[-1] == f"picture: {output}"
    assert finished.stderr == ""  # no progress bar, where there is no terminal
    assert_picture(output)


def test_logistic_regression(tmp_path):
    """Without a prior the norm still grows in the second half of the steps; the larger lambda, the smaller it is."""
    finished = run(tmp_path, "logistic_regression.py", "--steps", 400, "--output", "norms.png")
    rows = re.findall(r"^ +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +100%$", finished.stdout, re.MULTILINE)
    lambdas, halfway, norms, losses, least = ([float(row[column]) for row in rows] for column in range(5))
    assert lambdas == [0, 0.01, 0.1, 1]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 1.1 * halfway[0]
    assert norms[-1] == halfway[-1]
    # Each minimum is below the loss at weights of 0, which bounds the norm.
    for strength, norm, loss in zip(lambdas, norms, losses, strict=True):
        assert strength / 2 * norm**2 < loss < 40 * math.log(2)
    assert all(0.5 < probability < 1 for probability in least)
    assert finished.stdout.splitlines()[-1] == "picture: norms.png"
    assert_picture(tmp_path / "norms.png")


def test_landscape(tmp_path):
    options = ("--dataset", "digits", "--points", 7, "--passes", 4, "--output", "landscape.png")
    finished = run(tmp_path, "landscape.py", *options)
    losses = re.findall(r"^(.*), seed (\d): loss ([\d.]+), trained ([\d.]+)$", finished.stdout, re.MULTILINE)
    assert [(name, seed) for name, seed, _, _ in losses] == [
        (name, seed) for name in ("multilayer perceptron", "softmax regression") for seed in "01"
    ]
    assert all(float(after) < 0.5 * float(before) for _, _, before, after in losses)
    assert re.search(r"^multilayer perceptron .* not convex: up to [\d.]+ above", finished.stdout, re.MULTILINE)
    assert re.search(r"^softmax regression .* nowhere above the chord$", finished.stdout, re.MULTILINE)
    for name, *numbers in re.findall(
        r"^(multi.*n|softmax.*n) +([\d.]+) and ([\d.]+) .* mean ([\d.]+), ([\d.]+) midway",
        finished.stdout,
        re.MULTILINE,
    ):
        begin, end, mean, middle = map(float, numbers)
        assert mean == pytest.approx((begin + end) / 2, abs=1e-4)
        assert (middle > mean) == (name == "multilayer perceptron")
    assert finished.stdout.splitlines()[-1] == "picture: landscape.png"
    assert_picture(tmp_path / "landscape.png")


@pytest.mark.parametrize("script", ["optimizers.py", "landscape.py"])
def test_help_and_bad_values(tmp_path, script):
    explained = " ".join(run(tmp_path, script, "--help").stdout.split())
    assert f"(default: runs/{script[:-3]}.png)" in explained
    finished = run(tmp_path, script, "--passes", 0, code=2)
    assert finished.stderr.endswith("argument --passes: expected a positive integer, got 0\n")
    assert list(tmp_path.iterdir()) == []


def test_the_least_that_makes_a_picture(tmp_path):
    """Of three images a tenth of a pass is no step of SGD: it makes one."""
    options = ("--dataset", "digits", "--limit", 3, "--passes", 1, "--output", "picture.png")
    finished = run(tmp_path, "optimizers.py", *options)
    assert re.search(r"^SGD +1 +0.005 +1 +0.33 ", finished.stdout, re.MULTILINE)
    assert_picture(tmp_path / "picture.png")
    finished = run(tmp_path, "landscape.py", "--points", 1, code=2)
    assert finished.stderr == "landscape.py: --points: expected at least 2, got 1\n"


@pytest.mark.parametrize("script", ["optimizers.py", "landscape.py"])
def test_damaged_data_stops_the_script(tmp_path, script):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01")
    finished = run(tmp_path, script, "--data-dir", tmp_path, code=2)
    assert re.fullmatch(rf"{script}: .*train-images-idx3-ubyte is truncated or corrupt .*\n", finished.stderr)
