"""The C++ sources as clang compiles them, for x86-64 and arm64 without a warning, and what its kernels compute."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import compile_objects
from torch.utils import cpp_extension

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"
CPU_SOURCES = SOURCES / "cpu"


@pytest.fixture(scope="module")
def clang():
    """The command; Zig's package has clang with the system headers of every target."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs clang with headers of other systems: pip install ziglang")
    # Zig would take what this processor can, and look for undefined behaviour.
    return [sys.executable, "-m", "ziglang", "c++", "-std=c++17", "-mcpu=baseline", "-fno-sanitize=all"]


@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "aarch64-linux-gnu", "aarch64-macos"])
def test_compiles(target, clang, tmp_path):
    flags = ["-target", target, "-O0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    assert len(compile_objects([*clang, *flags], SOURCES.rglob("*.cpp"), tmp_path)) >= 15


def test_products(clang, compiler, tmp_path):
    """Only the kernels are clang's: they call nothing of the standard library, whose copies differ."""
    kernels = compile_objects([*clang, "-O1"], CPU_SOURCES.glob("level_*.cpp"), tmp_path)
    program = tmp_path / "multiplied"
    others = [TESTS / "sanitized" / "products.cpp", CPU_SOURCES / "amx.cpp"]
    subprocess.run([compiler, "-std=c++17", "-O1", *others, *kernels, "-o", program], check=True)
    finished = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "multiplied\n"
