"""The compiled ops and their autograd, one module per op.

Importing this package loads the compiled library, which registers every op in ``torch.ops.torch_mlp``.
"""

from importlib.machinery import PathFinder
from pathlib import Path

import torch


def _load_library() -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise ImportError(
            f"torch_mlp needs torch >= 2.10, got torch {torch.__version__}: type `pip install --upgrade torch`"
        )
    # Beside this file and nowhere else: an editable install elsewhere has a library of its own.
    spec = PathFinder.find_spec("torch_mlp._C", [str(Path(__file__).parent.parent)])
    if spec is None or spec.origin is None:
        raise ImportError(
            "torch_mlp is not built here: type `pip install -e . --no-build-isolation` in its source folder, "
            "or import it from another folder if it is installed"
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"torch_mlp's library cannot be loaded with torch {torch.__version__}: type `pip install --force-reinstall "
            f"--no-build-isolation --no-deps .` in its source folder to build it for this torch ({error})"
        ) from error


_load_library()

from torch_mlp.ops.binary_cross_entropy import (  # noqa: E402 - the library comes first
    binary_cross_entropy,
    linear_binary_cross_entropy,
)
from torch_mlp.ops.cross_entropy import cross_entropy, cross_entropy_with_lse  # noqa: E402
from torch_mlp.ops.cross_entropy_probabilities import cross_entropy_probabilities  # noqa: E402
from torch_mlp.ops.linear_act import ACTIVATIONS, linear_act  # noqa: E402
from torch_mlp.ops.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from torch_mlp.ops.mlp import mlp, mlp_cross_entropy  # noqa: E402
from torch_mlp.ops.train_epoch import train_epoch  # noqa: E402


def has_cuda_kernels() -> bool:
    """Whether the compiled library holds the CUDA kernels, not only the CPU's."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("torch_mlp::linear_act", "CUDA")


def cpu_capability() -> str:
    """The instruction set of the CPU's kernels: "default", "avx2", "avx512" or "avx512_bf16"."""
    return torch.ops.torch_mlp._cpu_capability()


__all__ = [
    "ACTIVATIONS",
    "binary_cross_entropy",
    "cpu_capability",
    "cross_entropy",
    "cross_entropy_probabilities",
    "cross_entropy_with_lse",
    "has_cuda_kernels",
    "linear_act",
    "linear_binary_cross_entropy",
    "linear_cross_entropy",
    "mlp",
    "mlp_cross_entropy",
    "train_epoch",
]
