"""The types of options that the scripts share, and what the demonstrations of the lecture have in common."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from torch_mlp import data


def demo_parser(description: str | None, picture: str) -> argparse.ArgumentParser:
    """A parser with what every demonstration of the lecture takes: where its picture goes, and a seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output",
        type=picture_path,
        default=Path("runs") / picture,
        metavar="FILE",
        help="the picture, in the format it names",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of all that is random")
    return parser


def add_data_options(parser: argparse._ActionsContainer) -> None:
    """The options that say which data set, where it lies, and how much of it."""
    parser.add_argument("--dataset", choices=data.DATASETS, default="auto", help="auto: mnist, else digits")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("TORCH_MLP_DATA", "data")),
        metavar="DIR",
        help="where DIR/MNIST/raw is, or is downloaded to",
    )
    parser.add_argument("--limit", type=positive, default=None, metavar="N", help="use only the first N images")


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def picture_path(text: str) -> Path:
    """Where a picture can be written, as far as its name tells: not after all the work is done, but before."""
    path = Path(text)
    if path.suffix and path.suffix[1:].lower() not in FigureCanvasBase.filetypes:
        formats = ", ".join(sorted(FigureCanvasBase.filetypes))
        raise argparse.ArgumentTypeError(f"expected a file of one of the formats {formats}, got {text}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text}")
    return path


def seed(text: str) -> int:
    """A seed that torch takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^63 - 1, got {text}")
    return int(text)


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return value


def threads(text: str) -> int:
    """A number of threads that this machine can run at once."""
    if positive(text) > (cores := os.cpu_count() or 1):
        raise argparse.ArgumentTypeError(f"expected at most {cores}, the cores of this machine, got {text}")
    return int(text)


def fail(message: str) -> NoReturn:
    """Exit with code 2 and one sentence."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def load_demo_data(arguments: argparse.Namespace) -> data.Dataset:
    """The data set of :func:`add_data_options`; "auto" takes MNIST only if it is on disk. Exits where it is damaged."""
    name = arguments.dataset
    if name == "auto" and not (arguments.data_dir / "MNIST").is_dir():
        print(f"MNIST is not in {arguments.data_dir}; --dataset mnist downloads it. Taking the 8x8 digits instead.")
        name = "digits"
    try:
        dataset = data.load(name, arguments.data_dir)
    except data.DataError as error:
        fail(str(error))
    return dataset.first(arguments.limit) if arguments.limit else dataset


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture, and name it in a last line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # With the format said, matplotlib adds no ending to a name that has none.
        figure.savefig(path, dpi=150, format=path.suffix[1:] or "png")
    except OSError as error:
        fail(f"--output {path} cannot be written: {error.strerror}")
    print(f"picture: {path}")


def run_demo(main: Callable[[], int]) -> NoReturn:
    """Exit with what a demonstration returns, and after Ctrl-C with one sentence and 130, as a shell does."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C; no picture was drawn.", file=sys.stderr)
        sys.exit(130)
