"""How the CUDA kernels' work is split, by csrc/cuda/launch.h: on the CPU, for no GPU is needed to count."""

import subprocess
from pathlib import Path

from torch.utils import cpp_extension

TESTS = Path(__file__).parent


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
