"""setup.py, the source distribution, and what an import says when something is wrong."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import torch_mlp

ROOT = Path(__file__).parent.parent


def python(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 60


def test_library_is_of_the_stable_abis():
    """One file for every Python from 3.10, and no symbol of torch's C++ interface, which changes with each release."""
    (library,) = Path(torch_mlp.__file__).parent.glob("_C.*")
    assert library.name == "_C.abi3.so"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in symbols
    assert not re.findall(r"_ZNK?(?:3c10|2at|5torch)\w+", symbols)


def test_import_of_an_unbuilt_tree(tmp_path):
    shutil.copytree(ROOT / "torch_mlp", tmp_path / "torch_mlp", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    finished = python("import torch_mlp", tmp_path)
    assert finished.returncode != 0
    assert finished.stderr.splitlines()[-1].startswith(
        "ImportError: torch_mlp is not built here: type `pip install -e . --no-build-isolation` in its source folder"
    )


def test_import_with_a_library_that_does_not_fit(tmp_path):
    shutil.copytree(ROOT / "torch_mlp", tmp_path / "torch_mlp", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "torch_mlp" / "_C.abi3.so").write_bytes(b"\x7fELF of another machine")
    finished = python("import torch_mlp", tmp_path)
    assert finished.returncode != 0
    sentence = finished.stderr.splitlines()[-1]
    assert f"cannot be loaded with torch {torch.__version__}: type `pip install" in sentence


def test_old_torch_is_refused(tmp_path):
    """Before anything is loaded, whatever the library would say."""
    finished = python("import torch; torch.__version__ = '2.9.1'; import torch_mlp", tmp_path)
    assert finished.returncode != 0
    assert "torch_mlp needs torch >= 2.10, got torch 2.9.1: type `pip install" in finished.stderr.splitlines()[-1]


def test_source_distribution_holds_all_that_a_build_needs(tmp_path):
    command = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "data", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    subprocess.run([sys.executable, "-c", command, tmp_path], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("torch_mlp-*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "torch_mlp").rglob("*.py")}
    needed = sources | modules | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "torch_mlp/py.typed"}
    assert needed <= packed


def test_version():
    assert torch_mlp.__version__ == "0.1.0"


@pytest.mark.skipif(not torch_mlp.ops.has_cuda_kernels(), reason="needs the CUDA kernels: torch_mlp was built without")
@pytest.mark.skipif("TORCH_CUDA_ARCH_LIST" in os.environ, reason="TORCH_CUDA_ARCH_LIST chooses other architectures")
def test_cuda_kernels_are_compiled_for_sm_80_and_sm_90():
    (library,) = Path(torch_mlp.__file__).parent.glob("_C.*")
    content = library.read_bytes()
    for name in (b"sm_80", b"sm_90"):
        assert name in content
