"""scripts/train_mnist.py, run as its users run it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from torch_mlp import checkpoint, data, training
from torch_mlp.nn import CrossEntropyLoss

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_mnist.py"


def run(folder, *options, code=0, **environment):
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    finished = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == code, finished.stderr
    return finished


def weights(path):
    return torch.cat([value.flatten() for value in checkpoint.load(path / "weights.safetensors").state_dict().values()])


def test_digits_end_to_end(tmp_path, device):
    options = ("--dataset", "digits", "--epochs", 30, "--hidden", 64, 32, "--batch-size", 16, "--device", device)
    finished = run(tmp_path, *options, "--output-dir", "out", "--reference")
    assert "digits: 1437 training and 360 test images; 64-64-32-10 sigmoid network, 6,570 parameters" in finished.stdout
    epochs = re.findall(r"^(torch_mlp|torch) +epoch +(\d+) .*test accuracy ([\d.]+) %", finished.stdout, re.MULTILINE)
    assert [(name, int(epoch)) for name, epoch, _ in epochs] == [
        (name, epoch) for epoch in range(1, 31) for name in ("torch_mlp", "torch")
    ]
    assert re.search(r"comparison: [\d.]+x the speed of stock torch layers", finished.stdout)

    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["test_accuracy"] > 0.93
    assert [len(epochs) for epochs in record["epochs"].values()] == [30, 30]
    ours, theirs = (epochs[-1]["test_loss"] for epochs in record["epochs"].values())
    assert ours == pytest.approx(theirs, rel=0.02)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")

    digits = data.load("digits", "nowhere")
    model = checkpoint.load(tmp_path / "out" / "weights.safetensors")
    evaluation = training.evaluate(model, CrossEntropyLoss(), digits)
    assert evaluation.accuracy == pytest.approx(record["test_accuracy"], abs=0.004)
    rows = re.findall(r"^ +(\d)((?: +\d+){10})  +([\d.]+) %$", finished.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(10))
    assert sum(int(counts.split()[int(row)]) for row, counts, _ in rows) == round(record["test_accuracy"] * 360)
    assert [sum(map(int, counts.split())) for _, counts, _ in rows] == digits.test_labels.bincount().tolist()


def test_the_same_seed_gives_the_same_weights(tmp_path):
    for folder, seed in (("one", 7), ("again", 7), ("other", 8)):
        run(tmp_path, "--dataset", "digits", "--epochs", 2, "--seed", seed, "--output-dir", folder)
    one, again, other = (weights(tmp_path / folder) for folder in ("one", "again", "other"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        ("--hidden",),
        ("--activation", "relu", "--lr", 0.02),
        ("--activation", "tanh", "--init", "gaussian"),
        ("--sampling", "random", "--lr-decay", "none", "--momentum", 0, "--lr", 1, "--weight-decay", 1e-4),
        ("--dtype", "bfloat16"),
        ("--dtype", "float64", "--threads", 1),
        ("--limit", 500),
    ],
    ids=str,
)
def test_options(tmp_path, options):
    finished = run(tmp_path, "--dataset", "digits", "--epochs", 8, "--output-dir", "out", *options)
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["test_accuracy"] > 0.6
    if "--limit" in options:
        assert "500 training and 360 test images" in finished.stdout


def test_mnist(tmp_path, mnist_dir):
    options = ("--data-dir", mnist_dir, "--epochs", 2, "--hidden", 128, "--batch-size", 32, "--output-dir", tmp_path)
    finished = run(tmp_path, *options)
    assert "MNIST: 60000 training and 10000 test images; 784-128-10 sigmoid network" in finished.stdout
    assert json.loads((tmp_path / "metrics.json").read_text())["test_accuracy"] > 0.94


def test_data_folder_from_the_environment(tmp_path, mnist_dir):
    finished = run(tmp_path, "--dataset", "mnist", "--epochs", 1, "--limit", 1000, TORCH_MLP_DATA=str(mnist_dir))
    assert "MNIST: 1000 training and 1000 test images" in finished.stdout
    assert (tmp_path / "runs" / "mnist" / "weights.safetensors").exists()


def test_mnist_without_data_or_network(tmp_path):
    """A proxy where nobody answers stands for the missing network."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    nowhere = tmp_path / "nowhere"
    finished = run(tmp_path, "--dataset", "mnist", "--data-dir", nowhere, code=2, no_proxy="", **proxies)
    assert re.fullmatch(
        r"train_mnist.py: MNIST is not in .*raw and cannot be downloaded .*--data-dir\.\n",
        finished.stderr.splitlines(True)[-1],
    )
    assert "Traceback" not in finished.stderr
    options = ("--data-dir", nowhere, "--epochs", 1, "--output-dir", "out")
    finished = run(tmp_path, *options, no_proxy="", **proxies)
    assert "Training on scikit-learn's bundled 8x8 digits instead." in finished.stdout
    assert "digits: 1437 training" in finished.stdout


def test_a_truncated_file_stops_the_script(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01")
    finished = run(tmp_path, "--data-dir", tmp_path, code=2)
    assert "train-images-idx3-ubyte is truncated or corrupt" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_divergence(tmp_path):
    """Weights that are no numbers do not take the place of those of an earlier run."""
    run(tmp_path, "--dataset", "digits", "--epochs", 1, "--output-dir", "out")
    before = weights(tmp_path / "out")
    options = ("--dataset", "digits", "--lr", 1e30, "--activation", "relu", "--output-dir", "out")
    finished = run(tmp_path, *options, code=1)
    assert re.search(r"Stopped: epoch 1: train_epoch: the loss is \S+ in minibatch \d+", finished.stderr)
    assert "Nothing is saved." in finished.stderr
    assert "Traceback" not in finished.stderr
    assert torch.equal(weights(tmp_path / "out"), before)


@pytest.mark.parametrize("engine", ["epoch", "autograd"])
def test_engines(tmp_path, engine):
    options = ("--dataset", "digits", "--epochs", 20, "--hidden", 32, "--engine", engine, "--output-dir", "out")
    finished = run(tmp_path, *options)
    assert f"engine {engine}" in finished.stdout.splitlines()[0]
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["test_accuracy"] > 0.85


def test_the_engines_learn_the_same(tmp_path):
    for engine in ("epoch", "autograd"):
        run(tmp_path, "--dataset", "digits", "--epochs", 3, "--engine", engine, "--output-dir", engine)
    torch.testing.assert_close(weights(tmp_path / "epoch"), weights(tmp_path / "autograd"), rtol=1e-4, atol=1e-5)


def test_an_engine_that_cannot_train_this(tmp_path):
    finished = run(tmp_path, "--dataset", "digits", "--dtype", "bfloat16", "--engine", "epoch", code=2)
    assert "expected float32 or float64 parameters" in finished.stderr
    assert "use the engine autograd" in finished.stderr
    finished = run(tmp_path, "--dataset", "digits", "--dtype", "bfloat16", "--epochs", 1)
    assert "engine autograd" in finished.stdout.splitlines()[0]
    finished = run(tmp_path, "--dataset", "digits", "--dtype", "float64", "--precision", "bf16", code=2)
    assert "expected float32 parameters with precision bf16" in finished.stderr


def test_precision(tmp_path):
    finished = run(tmp_path, "--dataset", "digits", "--precision", "bf16", "--output-dir", ".")
    assert "engine epoch, products in bfloat16" in finished.stdout.splitlines()[0]
    assert json.loads((tmp_path / "metrics.json").read_text())["test_accuracy"] > 0.8


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--lr", "nan", "expected a number of at least 0, got nan"),
        ("--momentum", "-1", "expected a number of at least 0, got -1"),
        ("--epochs", "0", "expected a positive integer, got 0"),
        ("--hidden", "abc", "expected a positive integer, got abc"),
        ("--activation", "step", "invalid choice: 'step'"),  # it has no gradient to learn by
        ("--seed", str(2**63), "expected an integer from 0 to"),
        ("--threads", "100000", "the cores of this machine, got 100000"),
    ],
)
def test_bad_values(tmp_path, option, value, sentence):
    finished = run(tmp_path, option, value, code=2)
    assert sentence in finished.stderr
    assert "Traceback" not in finished.stderr


def test_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    finished = run(tmp_path, "--dataset", "digits", "--output-dir", "file", code=2)
    assert finished.stderr == "train_mnist.py: --output-dir file cannot be made: File exists\n"


def test_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        finished = run(tmp_path, "--device", "cuda", code=2, CUDA_VISIBLE_DEVICES="")
    else:
        finished = run(tmp_path, "--device", "cuda", code=2)
    assert finished.stderr == "train_mnist.py: --device cuda: torch finds no CUDA device; use --device cpu\n"


def test_ctrl_c_saves_what_was_learned(tmp_path):
    command = [sys.executable, str(SCRIPT), "--dataset", "digits", "--epochs", "100000", "--output-dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch   3" in line:
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.stdout.read()
    assert process.wait(timeout=120) == 130
    assert "Stopped by Ctrl-C; what was learned is saved." in output
    assert "confusion matrix" in output
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(record["epochs"]["torch_mlp"]) >= 3
    assert record["test_accuracy"] > 0.3
    assert checkpoint.load(tmp_path / "out" / "weights.safetensors").num_parameters() == 19_210
