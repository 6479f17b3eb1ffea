"""Builds torch_mlp._C, the compiled ops; everything else is in pyproject.toml.

CUDA sources are compiled when a CUDA toolkit and a CUDA build of torch are there; FORCE_CUDA=0 or 1 overrides that, and
TORCH_CUDA_ARCH_LIST names the GPU architectures.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")) and (nvcc := shutil.which("nvcc")):
    # The nvcc on PATH may be a link or a wrapper, so that its folder is not the toolkit's: ask it for its own place.
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True).stderr
    if top := re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE):
        os.environ["CUDA_HOME"] = os.path.realpath(top[1])

from torch.utils import cpp_extension  # reads CUDA_HOME when it is imported


def nvcc_fits_torch() -> bool:
    """Whether a CUDA toolkit is there and has the major version that torch was built with."""
    if not torch.version.cuda or not cpp_extension.CUDA_HOME:
        return False
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc.exists() else ""
    return f"release {torch.version.cuda.split('.')[0]}." in version


force = os.environ.get("FORCE_CUDA", "")
if force not in ("", "0", "1"):
    sys.exit(f"setup.py: expected FORCE_CUDA to be 0 or 1, got {force!r}")
with_cuda = force == "1" or (force == "" and nvcc_fits_torch())
print(f"torch_mlp: building for torch {torch.__version__}, {'CPU and CUDA' if with_cuda else 'CPU only'}")

cxx = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
nvcc = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"]
macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # the stable ABI of torch 2.10
cuda_macros = [("TORCH_MLP_WITH_CUDA", None), ("USE_CUDA", None)]
extension = (cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension)(
    "torch_mlp._C",
    sorted(map(str, [*Path("csrc").rglob("*.cpp"), *(Path("csrc").rglob("*.cu") if with_cuda else [])])),
    depends=sorted(map(str, [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.cuh")])),
    define_macros=macros + (cuda_macros if with_cuda else []),
    extra_compile_args={"cxx": cxx, "nvcc": nvcc},
    py_limited_api=True,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
