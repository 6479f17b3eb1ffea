"""The types of options that the scripts share, and the options of the lecture's demonstrations."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from matplotlib.figure import Figure


def demo_parser(description: str | None, picture: str) -> argparse.ArgumentParser:
    """A parser with what every demonstration of the lecture takes: where its picture goes, and a seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs") / picture,
        metavar="FILE",
        help="the picture, in the format it names",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of all that is random")
    return parser


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


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


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture, and name it in a last line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # With the format said, matplotlib adds no ending to a name that has none.
        figure.savefig(path, dpi=150, format=path.suffix[1:] or "png")
    except OSError as error:
        fail(f"--output {path} cannot be written: {error.strerror}")
    except ValueError as error:  # a format that matplotlib does not know
        fail(f"--output {path} cannot be written: {error}")
    print(f"picture: {path}")
