"""The threads and the memory of csrc/cpu/trainer.h, and the products' memory, under the compiler's sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import compile_objects
from torch.utils import cpp_extension

import torch_mlp

TESTS = Path(__file__).parent
CPU_SOURCES = TESTS.parent / "csrc" / "cpu"


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitized(sanitizer, compiler, tmp_path):
    flags = ["-std=c++17", "-g", "-w", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in cpp_extension.include_paths())]
    probe = ["-x", "c++", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run([compiler, *flags, *probe], input="int main() {}", text=True, capture_output=True).returncode:
        pytest.skip(f"needs the sanitizers {sanitizer} of {compiler}")
    # Checking addresses and undefined behaviour, the compiler takes minutes to optimize the kernels.
    level = "-O1" if sanitizer == "thread" else "-O0"
    kernels = [*CPU_SOURCES.glob("level_*.cpp"), CPU_SOURCES / "amx.cpp"]
    kernel_objects = compile_objects([compiler, *flags, level], kernels, tmp_path)
    programs = {"trained": [TESTS / "sanitized" / "trainer.cpp", CPU_SOURCES / "kernels.cpp"]}
    if sanitizer != "thread":  # this one has no threads
        programs["multiplied"] = [TESTS / "sanitized" / "products.cpp"]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += [f"-Wl,-rpath,{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10", "-pthread"]
    # What torch's libraries keep until the end is not ours.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    # By a matrix unit, where there is one, and then by products of pairs.
    best = torch_mlp.ops.cpu_capability()
    levels_of = {"trained": [best, "avx512_bf16"] if best == "amx" else [best], "multiplied": [best]}
    for output, sources in programs.items():
        program = tmp_path / output
        objects = compile_objects([compiler, *flags, "-O1"], sources, tmp_path)
        command = [compiler, *flags, *objects, *kernel_objects, "-o", program, *libraries]
        linked = subprocess.run(command, capture_output=True, text=True)
        assert linked.returncode == 0, linked.stderr
        for forced in levels_of[output]:
            environment["TORCH_MLP_CPU_CAPABILITY"] = forced
            finished = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600)
            assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]
            assert finished.stdout == f"{output}\n"
