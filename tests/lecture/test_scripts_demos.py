"""scripts/backprop.py and scripts/xor.py, run as their users run them; and Ctrl-C in each of the demonstrations."""

import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def run(folder, script, *options, code=0):
    command = [sys.executable, str(SCRIPTS / script), *map(str, options)]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def table(output, begin, columns):
    """The rows of a printed table: the first word of each, and the last ones as numbers."""
    block = output.split(f"\n{begin}")[1].split("\n\n")[0].splitlines()[2:]
    rows = [re.split(r" {3,}", line.strip()) for line in block]
    return {row[0]: tuple(map(float, row[-columns:])) for row in rows}


def test_backprop(tmp_path):
    """By hand from the weights that it prints, in Python's floats."""
    finished = run(tmp_path, "backprop.py", "--lr", 2)
    output = finished.stdout
    assert output.startswith("2-2-1 sigmoid network, cross-entropy, y = 1\n")
    weights = table(output, "weights", 3)
    w = {name: value for name, (_, value, _) in weights.items()}
    x1, x2 = 1.0, 0.5
    z1, z2 = (w[f"w^1_{j}1"] * x1 + w[f"w^1_{j}2"] * x2 + w[f"b^1_{j}"] for j in (1, 2))
    a1, a2 = sigmoid(z1), sigmoid(z2)
    z = w["w^2_11"] * a1 + w["w^2_12"] * a2 + w["b^2_1"]
    y_hat = sigmoid(z)
    dz = y_hat - 1
    dz1, dz2 = dz * w["w^2_11"] * a1 * (1 - a1), dz * w["w^2_12"] * a2 * (1 - a2)

    def close(value):
        return pytest.approx(value, rel=2e-4)

    forward, backward = table(output, "forward", 1), table(output, "backward", 1)
    values = {"x_1": x1, "x_2": x2, "z^1_1": z1, "z^1_2": z2, "a^1_1": a1, "a^1_2": a2, "z^2_1": z, "y_hat": y_hat}
    assert forward == {name: (close(value),) for name, value in {**values, "loss": -math.log(y_hat)}.items()}
    assert list(backward) == list(forward)[::-1]
    for name, gradient in {"loss": 1, "y_hat": -1 / y_hat, "z^2_1": dz, "z^1_1": dz1, "z^1_2": dz2}.items():
        assert backward[name] == (close(gradient),)
    gradients = {"w^1_11": dz1 * x1, "w^1_22": dz2 * x2, "b^1_2": dz2, "w^2_12": dz * a2, "b^2_1": dz}
    for name, gradient in gradients.items():
        assert weights[name] == (close(gradient), w[name], close(w[name] - 2 * gradient))
    assert f"y_hat - y = {dz:.5g}" in output
    assert float(re.search(r"Chain rule by hand: largest difference ([\d.e-]+)\.\n", output)[1]) < 1e-15
    assert output.endswith("picture: runs/backprop.png\n")
    assert is_png(tmp_path / "runs" / "backprop.png")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--hidden", 3, 2, "--activation", "relu", "--target", 0), "2-3-2-1 relu network, cross-entropy, y = 0"),
        (("--hidden", "--input", 4), "1-1 sigmoid network, cross-entropy, y = 1"),
        (("--head", "regression", "--target", -2.5), "2-2-1 sigmoid network, squared error, y = -2.5"),
    ],
    ids=str,
)
def test_options_of_backprop(tmp_path, options, sentence):
    finished = run(tmp_path, "backprop.py", *options, "--seed", 1, "--output", "new/folder/graph.png")
    assert finished.stdout.startswith(f"{sentence}\n")
    assert is_png(tmp_path / "new" / "folder" / "graph.png")


@pytest.mark.parametrize(
    ("script", "options", "sentence"),
    [
        ("backprop.py", ("--target", "2"), "backprop.py: trace: expected target from 0 to 1, got 2.0"),
        ("backprop.py", ("--input", "1", "inf"), "argument --input: expected a finite number, got inf"),
        ("backprop.py", ("--activation", "step"), "argument --activation: invalid choice: 'step'"),
        ("backprop.py", ("--lr", "-1"), "argument --lr: expected a number of at least 0, got -1"),
        ("backprop.py", ("--hidden", "--input", "-1000"), "trace: expected y_hat between 0 and 1, got"),
        ("backprop.py", ("--output", "a.doc"), "argument --output: expected a file of one of the formats "),
        ("xor.py", ("--hidden", "0"), "argument --hidden: expected a positive integer, got 0"),
        ("xor.py", ("--seed", "x"), "argument --seed: expected an integer from 0 to"),
        ("xor.py", ("--output", "."), "argument --output: expected a file, got the folder ."),
        ("xor.py", ("--output", "/dev/null/a.png"), "xor.py: --output /dev/null/a.png cannot be written: File exists"),
    ],
)
def test_bad_options(tmp_path, script, options, sentence):
    finished = run(tmp_path, script, *options, code=2)
    assert sentence in finished.stderr.splitlines()[-1]


def test_xor(tmp_path):
    finished = run(tmp_path, "xor.py", "--output", "out/regions")
    tables = finished.stdout.split("\n\n")
    accuracies = {}
    for text in tables[:-1]:
        name, accuracy = re.match(r"(.+): (\d+) % right\n", text).groups()
        accuracies[name] = int(accuracy)
        rows = re.findall(r"^ +(\d) +(\d) +(\d) +(\d)  (right|wrong)$", text, re.MULTILINE)
        assert [(int(x1), int(x2)) for x1, x2, *_ in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for x1, x2, target, output, verdict in rows:
            assert int(target) == int(x1) ^ int(x2)
            assert (output == target) == (verdict == "right")
        assert 25 * sum(verdict == "right" for *_, verdict in rows) == int(accuracy)
    assert list(accuracies) == ["perceptron", "linear network", "MLP, tanh", "MLP, step, by hand"]
    assert accuracies["perceptron"] <= 75
    assert accuracies["linear network"] <= 75
    assert accuracies["MLP, tanh"] == accuracies["MLP, step, by hand"] == 100
    assert tables[-1] == "picture: out/regions\n"
    assert is_png(tmp_path / "out" / "regions")


@pytest.mark.parametrize("script", ["backprop.py", "landscape.py", "logistic_regression.py", "optimizers.py", "xor.py"])
def test_ctrl_c(script, monkeypatch, capsys, tmp_path):
    """One sentence and the exit code of a shell, and no traceback."""

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # which two of them would set for good
    monkeypatch.setattr("options.demo_parser", stop)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nStopped by Ctrl-C; no picture was drawn.\n"
