"""What several test files share: the devices, the real data, and how an error is measured."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported, see scripts/train_mnist.py

# Some virtual machines announce AMX and then kill who uses it, as oneDNN does for products of bfloat16.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
import torch

import torch_mlp

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# The activations in torch's own words, and those of them that have gradients to compare: step has none.
EAGER = {
    "identity": lambda z: z,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "step": lambda z: torch.where(z.isnan(), z, (z >= 0).to(z.dtype)),
}
DIFFERENTIABLE = [name for name, activation in torch_mlp.functional.ACTIVATIONS.items() if activation.derivative]

# Numbers of threads that give the same bits: a matrix unit multiplies for one thread, or, at a forced level, for all.
IS_ONE_UNLIKE = torch_mlp.ops.cpu_capability() == "amx" and "TORCH_MLP_CPU_CAPABILITY" not in os.environ
ALIKE_THREADS = (2, 3, 4) if IS_ONE_UNLIKE else (1, 2, 3)


def why_no_cuda() -> str | None:
    """The reason to skip a CUDA test, None where it can run."""
    if not torch.cuda.is_available():
        return "needs a GPU: torch finds no CUDA device"
    if not torch_mlp.ops.has_cuda_kernels():
        return "needs the CUDA kernels: torch_mlp was built without them"
    return None


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and (reason := why_no_cuda()):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def compiler() -> str:
    """The C++ compiler, for tests that are written in C++."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("needs g++ or clang++")
    return found


def compile_objects(command: list[str], sources: Iterable[Path], folder: Path) -> list[Path]:
    """What a compiler, called so, makes of each source, in the folder."""

    def compile_one(source: Path) -> Path:
        result = folder / f"{source.stem}.o"
        finished = subprocess.run([*command, "-c", source, "-o", result], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder that holds MNIST/raw."""
    if "TORCH_MLP_DATA" not in os.environ:
        pytest.skip("needs real MNIST: set TORCH_MLP_DATA to the folder that holds MNIST/raw")
    return Path(os.environ["TORCH_MLP_DATA"]).resolve()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def assert_no_less_accurate(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """Our root mean square error against float64 truth is at most 1.5 times that of eager torch.

    A tenth of a unit in the last place is allowed in any case: below that the comparison is one of luck, as it is of
    few elements, for which there is more. In float64 the truth has errors of its own, and 128 units are allowed.
    """
    assert ours.dtype == eager.dtype
    assert ours.shape == eager.shape == truth.shape
    assert truth.dtype == torch.float64
    units = 128 if ours.dtype == torch.float64 else 0.1 + max(1, ours.numel()) ** -0.5
    floor = units * torch.finfo(ours.dtype).eps * truth.square().mean().sqrt()
    error, eager_error = ((value.double() - truth).square().mean().sqrt() for value in (ours, eager))
    assert error <= 1.5 * eager_error + floor, f"error {error:.3g}, eager's {eager_error:.3g}"


def clones(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def assert_same_bits(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    for left, right in zip(before, after, strict=True):
        assert torch.equal(left, right.detach())
