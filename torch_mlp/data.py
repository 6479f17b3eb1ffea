"""Data sets of handwritten digits and the like, as tensors that stay in memory: uint8 images, int64 labels."""

import contextlib
import hashlib
import io
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DATASETS = ("auto", "mnist", "fashion-mnist", "kmnist", "digits")

_DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer

# MNIST's files as LeCun published them, unpacked. torchvision checks what it downloads, not what it finds on disk.
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class DataError(Exception):
    """A data set that is not there, cannot be downloaded or is damaged; the message says what to do."""


class Dataset(NamedTuple):
    """A data set in memory.

    Images are uint8 of shape (N, height, width), labels int64 of shape (N,) with values in [0, num_classes).
    ``image * scale + shift`` makes the training images' pixels, taken together, of mean 0 and standard deviation 1.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    scale: float
    shift: float
    num_classes: int = 10

    @property
    def num_features(self) -> int:
        """Pixels of an image."""
        return self.train_images[0].numel()

    def first(self, count: int) -> "Dataset":
        """The first ``count`` images of each of the two parts."""
        return self._map(lambda part: part[:count])

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on another device."""
        return self._map(lambda part: part.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Dataset":
        return self._replace(
            train_images=function(self.train_images),
            train_labels=function(self.train_labels),
            test_images=function(self.test_images),
            test_labels=function(self.test_labels),
        )


def load(name: str, root: str | Path, notify: Callable[[str], None] = print) -> Dataset:
    """Load a data set, downloading it into ``root`` where it is not there yet.

    Args:
        name: "mnist", "fashion-mnist" or "kmnist" (torchvision's, 28x28 pixels), "digits" (scikit-learn's bundled 1,797
            images of 8x8 pixels, no download), or "auto": MNIST if it is on disk or can be downloaded, else digits.
        root: the folder for torchvision's files, which lie in ``root/MNIST/raw`` and the like.
        notify: called with one line for the user: a download begins, or why "auto" chose digits.

    Returns:
        A :class:`Dataset`.

    Raises:
        DataError: if the data cannot be had, or a file is truncated or corrupt (the message names it).
        ValueError: if the name is not known.

    Example:
        >>> load("digits", "data").train_images.shape
        torch.Size([1437, 8, 8])
    """
    if name not in DATASETS:
        raise ValueError(f"load: expected name to be one of {', '.join(DATASETS)}, got {name!r}")
    if name == "digits":
        return _load_digits()
    if name != "auto":
        return _load_torchvision(name, Path(root), notify)
    try:
        return _load_torchvision("mnist", Path(root), notify)
    except _NotAvailableError as error:
        notify(f"{error} Training on scikit-learn's bundled 8x8 digits instead.")
        return _load_digits()


class _NotAvailableError(DataError):
    """The files are not on disk and cannot be downloaded; damaged files are never silently passed over."""


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=360, random_state=0, stratify=digits.target)
    train_images, test_images = (torch.from_numpy(images).to(torch.uint8) for images in split[:2])
    train_labels, test_labels = (torch.from_numpy(labels).to(torch.int64) for labels in split[2:])
    return Dataset("digits", train_images, train_labels, test_images, test_labels, *_normalisation(train_images))


def _normalisation(images: Tensor) -> tuple[float, float]:
    """The scale and shift of a :class:`Dataset` with these training images."""
    std, mean = torch.std_mean(images.float())
    scale = 1 / max(std.item(), 1e-6)  # images of one even grey have no spread
    return scale, -mean.item() * scale


def _load_torchvision(name: str, root: Path, notify: Callable[[str], None]) -> Dataset:
    from torchvision import datasets

    source = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}[name]
    folder = root / source.__name__ / "raw"
    names = [Path(archive).stem for archive, _ in source.resources]
    if not _all_exist(folder, names):
        notify(f"Downloading {source.__name__} to {folder}")
        _download(source, root, folder, names)
    train_images, train_labels, test_images, test_labels = (_read_idx(folder / file) for file in names)
    for images, labels, file in ((train_images, train_labels, names[1]), (test_images, test_labels, names[3])):
        if len(images) != len(labels):
            raise DataError(f"{folder / file} is damaged: it holds {len(labels)} labels for {len(images)} images.")
    normalisation = _normalisation(train_images)
    return Dataset(source.__name__, train_images, train_labels, test_images, test_labels, *normalisation)


def _all_exist(folder: Path, names: list[str]) -> bool:
    return all((folder / name).exists() for name in names)


def _download(source: type, root: Path, folder: Path, names: list[str]) -> None:
    with _socket_timeout(_DOWNLOAD_TIMEOUT), contextlib.redirect_stdout(io.StringIO()):
        try:
            source(root, download=True)
        except Exception as error:  # the network's, the disk's, or torchvision's own on what it found or got
            if _all_exist(folder, names):
                return  # it failed to read one of them: _read_idx names it
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise _NotAvailableError(
                f"{source.__name__} is not in {folder} and cannot be downloaded ({reason}); put its four files there, "
                "or name the folder above it with --data-dir."
            ) from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision's downloads have no timeout of their own: a network that drops packets would hang them."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read_idx(path: Path) -> Tensor:
    """Images or labels of one IDX file, checked: a damaged file is named, never trained on."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    try:
        values = (read_image_file if "images" in path.name else read_label_file)(str(path))
    except Exception as error:  # the reader asserts, indexes and reshapes: any of it can fail on damaged bytes
        raise DataError(
            f"{path} is truncated or corrupt ({type(error).__name__} while reading it); delete it and run again."
        ) from error
    if path.parts[-3] == "MNIST" and hashlib.md5(path.read_bytes()).hexdigest() != _MNIST_MD5[path.name]:
        raise DataError(f"{path} is corrupt (its MD5 checksum is wrong); delete it and run again.")
    if len(values) == 0 or ("labels" in path.name and int(values.max()) > 9):
        raise DataError(
            f"{path} is corrupt (it holds no images or labels, or labels above 9); delete it and run again."
        )
    return values
