"""What the functions do with their arguments alike."""

from typing import Any

import torch
from torch import Tensor


def check_tensors(op: str, *optional: str, **arguments: Any) -> None:
    """TypeError, as from torch, where an argument is no tensor; the optional ones may be None."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not (value is None and name in optional):
            raise TypeError(f"{op}: expected {name} to be a Tensor, got {type(value).__name__}")


def check_reduction(op: str, reduction: str) -> None:
    """ValueError where it is not one of torch's."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: expected reduction to be one of none, mean, sum, got {reduction!r}")


def is_autocasting(input: Tensor) -> bool:
    """Whether torch.autocast is at work on the device of input."""
    # What input.device.type would say takes as long as all the rest of a call.
    return torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu") and not input.is_meta


def autocast(dtype: torch.dtype | None, input: Tensor, *others: Tensor | None) -> list[Any]:
    """The tensors as torch.autocast hands them to an op: float32 and below in dtype, None being autocast's own."""
    dtype = dtype or torch.get_autocast_dtype(input.device.type)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return [t if t is None or t.dtype not in eligible else t.to(dtype) for t in (input, *others)]
