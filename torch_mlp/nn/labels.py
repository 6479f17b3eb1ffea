"""The labels of two classes, as the models of this package take them."""

import torch
from torch import Tensor

from torch_mlp.functional.arguments import check_tensors
from torch_mlp.ops.transforms import in_transform


def zero_one(op: str, target: Tensor, rows: torch.Size, dtype: torch.dtype) -> Tensor:
    """Labels in {0, 1} or {-1, +1}, of shape (*rows) or (*rows, 1), as 0 and 1 of shape (*rows) and the given dtype.

    Looking at the labels waits for the device once. Where they cannot be looked at, under torch.compile, in
    torch.func and on the meta device, one that is none of -1, 0 and 1 becomes NaN, and so does the loss.

    Raises:
        TypeError: if target is no tensor.
        ValueError: if a shape does not fit, or a label is none of these, or there are 0 and -1.
    """
    check_tensors(op, target=target)
    if target.shape not in (rows, (*rows, 1)):
        raise ValueError(f"{op}: expected target of shape {tuple(rows)}, got {tuple(target.shape)}")
    if target.is_complex():
        raise ValueError(f"{op}: expected target of an integer, floating-point or bool dtype, got {target.dtype}")
    labels = target.reshape(rows).to(torch.float64)  # in which 255 of uint8 is not -1
    is_one, is_zero, is_minus_one = labels == 1, labels == 0, labels == -1
    if torch.compiler.is_compiling() or in_transform() or target.is_meta:
        return is_one.to(dtype).where(is_one | is_zero | is_minus_one, torch.nan)
    if not (is_one | is_zero).all() | (is_one | is_minus_one).all():
        found = labels.unique()
        values = ", ".join(f"{label:g}" for label in found[:4].tolist()) + ", ..." * (len(found) > 4)
        raise ValueError(f"{op}: expected every target in {{0, 1}}, or every one in {{-1, +1}}, got {values}")
    return is_one.to(dtype)
