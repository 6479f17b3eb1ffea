"""What this installation of torch_mlp runs on."""

import platform

import torch

from torch_mlp import ops


def config() -> dict[str, str]:
    """Versions, the CPU's instruction set, threads and CUDA, by name."""
    from torch_mlp import __version__  # not yet there when this module is imported

    if not ops.has_cuda_kernels():
        cuda = "kernels not built"
    elif not torch.cuda.is_available():
        cuda = "kernels built, torch finds no GPU"
    else:
        cuda = f"kernels built, {torch.cuda.get_device_name()}"
    return {
        "torch_mlp": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "cpu kernels": f"{ops.cpu_capability()} (torch: {torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "cuda": cuda,
    }


def show_config() -> None:
    """Print the versions, the instruction set of the CPU kernels, the number of threads and the state of CUDA.

    The instruction set is the best one that the processor has: amx (avx512_bf16 and the matrix unit of Intel's
    processors), avx512_bf16 (AVX-512 with products of bfloat16), avx512, avx2 or default. The environment variable
    ``TORCH_MLP_CPU_CAPABILITY`` forces one of them; it is read once, at the first use. The matrix unit multiplies
    float32 where there is one thread, and with any number of threads where amx is forced.

    Raises:
        RuntimeError: if ``TORCH_MLP_CPU_CAPABILITY`` names an instruction set that the processor does not have.

    Example:
        >>> show_config()  # doctest: +ELLIPSIS
        torch_mlp    ...
        torch        ...
        python       ...
        machine      ...
        cpu kernels  ...
        threads      ...
        cuda         kernels ...
    """
    for name, value in config().items():
        print(f"{name:13s}{value}")
