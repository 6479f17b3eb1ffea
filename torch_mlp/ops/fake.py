"""Registers fake kernels, which say of what shape and dtype results are: for the compiler and the device meta."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def register_fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """``torch.library.register_fake`` of a kernel whose tensors have to be where its first one is, as everywhere.

    One tensor on meta among others makes torch call the fake kernel, whose results would hold whatever memory held.
    """

    def register(kernel: Callable[..., Any]) -> None:
        names = list(inspect.signature(kernel).parameters)

        @wraps(kernel)
        def checked(*args: Any) -> Any:
            device = args[0].device
            for name, arg in zip(names, args, strict=False):
                for tensor in arg if isinstance(arg, list | tuple) else (arg,):
                    if isinstance(tensor, Tensor) and tensor.device != device:
                        raise RuntimeError(
                            f"{op.removeprefix('torch_mlp::')}: expected {name} on the device of {names[0]}, {device}, "
                            f"got {tensor.device}"
                        )
            return kernel(*args)

        torch.library.register_fake(op, checked)

    return register
