"""torch_mlp/data.py: real MNIST where it is, small files of the same format everywhere."""

import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision import datasets

from torch_mlp import data

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(values: torch.Tensor) -> bytes:
    """The IDX format: two zero bytes, the type (8 is uint8), the number of dimensions, the sizes, the values."""
    return struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape) + values.numpy().tobytes()


def small_files() -> dict[str, bytes]:
    contents = {}
    for part, count in (("train", 50), ("t10k", 20)):
        contents[f"{part}-images-idx3-ubyte"] = idx(torch.randint(256, (count, 28, 28), dtype=torch.uint8))
        contents[f"{part}-labels-idx1-ubyte"] = idx(torch.randint(10, (count,), dtype=torch.uint8))
    return contents


@pytest.fixture
def fashion_dir(tmp_path: Path) -> Path:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in small_files().items():
        (raw / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mirror is a port where nobody answers: the download runs for real and fails."""
    for source in (datasets.MNIST, datasets.FashionMNIST, datasets.KMNIST):
        monkeypatch.setattr(source, "mirrors", ["http://127.0.0.1:9/"])


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of packed files, served on this machine, from which KMNIST is downloaded."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name, content in small_files().items():
        packed = gzip.compress(content)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(datasets.KMNIST, "resources", resources)
    yield folder
    server.shutdown()
    server.server_close()


def test_mnist(mnist_dir):
    mnist = data.load("mnist", mnist_dir)
    assert mnist.train_images.shape == (60_000, 28, 28)
    assert mnist.test_images.shape == (10_000, 28, 28)
    assert mnist.train_images.dtype == torch.uint8
    assert mnist.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (mnist.name, mnist.num_features, mnist.num_classes) == ("MNIST", 784, 10)
    # The mean 0.1307 and standard deviation 0.3081 of pixels from 0 to 1 that every MNIST script quotes.
    assert mnist.scale == pytest.approx(1 / (255 * 0.3081), rel=1e-3)
    assert mnist.shift == pytest.approx(-0.1307 / 0.3081, rel=1e-3)


def test_auto_finds_mnist(mnist_dir):
    said = []
    assert data.load("auto", mnist_dir, said.append).name == "MNIST"
    assert said == []


def test_digits():
    digits = data.load("digits", "nowhere")
    assert (digits.train_images.shape, digits.test_images.shape) == ((1437, 8, 8), (360, 8, 8))
    assert (digits.train_images.dtype, digits.train_labels.dtype) == (torch.uint8, torch.int64)
    pixels = digits.train_images.double() * digits.scale + digits.shift
    assert pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert pixels.std().item() == pytest.approx(1, abs=1e-5)
    assert digits.test_labels.unique().tolist() == list(range(10))


@pytest.mark.usefixtures("no_network")
def test_auto_falls_back_on_digits_and_says_why(tmp_path):
    said = []
    assert data.load("auto", tmp_path, said.append).name == "digits"
    assert len(said) == 2
    assert "MNIST is not in" in said[1]
    assert "cannot be downloaded" in said[1]
    assert "digits" in said[1]
    assert "\n" not in said[1]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "title"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_missing_data_is_an_error_that_says_what_to_do(tmp_path, name, title):
    with pytest.raises(data.DataError, match=rf"{title} is not in .*{title}.raw and cannot be downloaded .*--data-dir"):
        data.load(name, tmp_path, lambda _: None)


def test_download(tmp_path, mirror):
    """torchvision's own download, unpacking and checksums."""
    said = []
    first = data.load("kmnist", tmp_path / "root", said.append)
    assert (first.train_images.shape, first.test_images.shape) == ((50, 28, 28), (20, 28, 28))
    assert said == [f"Downloading KMNIST to {tmp_path / 'root' / 'KMNIST' / 'raw'}"]
    again = data.load("kmnist", tmp_path / "root", said.append)
    assert torch.equal(first.train_images, again.train_images)
    assert len(said) == 1


def test_download_of_a_file_with_another_checksum(tmp_path, mirror):
    (mirror / f"{FILES[2]}.gz").write_bytes(gzip.compress(small_files()[FILES[2]]))
    with pytest.raises(data.DataError, match=r"KMNIST is not in .* and cannot be downloaded"):
        data.load("kmnist", tmp_path, lambda _: None)


def test_download_beside_a_corrupt_file(tmp_path, mirror):
    """What is there already is unpacked anew with the rest."""
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / FILES[0]).write_bytes(b"damaged")
    assert len(data.load("kmnist", tmp_path, lambda _: None).train_images) == 50


def test_small_files_are_read(fashion_dir):
    fashion = data.load("fashion-mnist", fashion_dir)
    assert (len(fashion.train_images), len(fashion.test_labels)) == (50, 20)
    assert fashion.train_labels.dtype == torch.int64


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(FILES), keep=st.integers(0, 39_000))
def test_a_truncated_file_is_named(fashion_dir, file, keep):
    path = fashion_dir / "FashionMNIST" / "raw" / file
    content = path.read_bytes()
    path.write_bytes(content[: min(keep, len(content) - 1)])
    try:
        with pytest.raises(data.DataError, match=rf"{file} is (truncated or )?corrupt"):
            data.load("fashion-mnist", fashion_dir)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["longer", "magic", "swapped", "html"])
def test_a_corrupt_file_is_named(fashion_dir, file, damage):
    path = fashion_dir / "FashionMNIST" / "raw" / file
    content = path.read_bytes()
    other = path.with_name(
        file.replace("images-idx3", "x").replace("labels-idx1", "images-idx3").replace("x-", "labels-idx1-")
    )
    path.write_bytes(
        {
            "longer": content + b"\0",
            "magic": b"\0\0\x0d\x03" + content[4:],
            "swapped": other.read_bytes(),
            "html": b"<!DOCTYPE html><html><body>404</body></html>",
        }[damage]
    )
    with pytest.raises(data.DataError, match=rf"{file} is truncated or corrupt"):
        data.load("fashion-mnist", fashion_dir)


def test_labels_that_are_no_classes(fashion_dir):
    path = fashion_dir / "FashionMNIST" / "raw" / FILES[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(data.DataError, match=rf"{FILES[1]} is corrupt"):
        data.load("fashion-mnist", fashion_dir)


def test_images_and_labels_of_different_number(fashion_dir):
    path = fashion_dir / "FashionMNIST" / "raw" / FILES[3]
    path.write_bytes(idx(torch.zeros(19, dtype=torch.uint8)))
    with pytest.raises(data.DataError, match=rf"{FILES[3]} is damaged: it holds 19 labels for 20 images"):
        data.load("fashion-mnist", fashion_dir)


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_in_mnist_is_noticed_and_never_replaced_by_digits(tmp_path, mnist_dir, file):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        (raw / name).symlink_to(mnist_dir.resolve() / "MNIST" / "raw" / name)
    content = bytearray((raw / file).read_bytes())
    content[-1] ^= 1
    (raw / file).unlink()
    (raw / file).write_bytes(content)
    for name in ("mnist", "auto"):
        with pytest.raises(data.DataError, match=rf"{file} is corrupt \(its MD5 checksum is wrong\)"):
            data.load(name, tmp_path)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"load: expected name to be one of auto, mnist, .*, got 'cifar'"):
        data.load("cifar", "nowhere")


def test_first_takes_that_many_of_each_part():
    digits = data.load("digits", "nowhere").first(30)
    assert [len(part) for part in digits[1:5]] == [30] * 4
