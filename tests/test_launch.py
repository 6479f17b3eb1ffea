"""How the CUDA kernels' work is split, by csrc/cuda/launch.h: on the CPU, for no GPU is needed to count."""

import re
import subprocess
from pathlib import Path

from torch.utils import cpp_extension

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc" / "cuda"


def test_launch(compiler, tmp_path):
    """Every element once, within CUDA's limits and the integers' ranges: where a number may be cut off is an error."""
    program = tmp_path / "launch"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Wsign-conversion", "-Werror"]
    flags += ["-Wno-unknown-pragmas", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command = [compiler, *flags, TESTS / "launch" / "launch.cpp", "-o", program]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    finished = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "split\n"


def test_block_numbers_are_multiplied_in_64_bits():
    """They are of 32 bits themselves, and so would be a product of them, without a sign."""
    kernels = [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]
    assert len(kernels) >= 8
    narrow = re.compile(
        r"^.*(?:(?<!int64_t\()(?:blockIdx|gridDim)\.\w [*+]|[*+] (?:blockIdx|gridDim)\b).*$", re.MULTILINE
    )
    for path in kernels:
        assert not narrow.findall(path.read_text()), path.name
