"""Softmax cross-entropy, of logits and of a linear layer's output."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction

from torch_mlp import ops
from torch_mlp.functional.arguments import autocast, check_reduction, check_tensors, is_autocasting
from torch_mlp.functional.linear_act import linear_act


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    return_lse: bool = False,
    z_loss: float = 0.0,
) -> Any:
    r"""Softmax cross-entropy of logits and classes: ``torch.nn.functional.cross_entropy`` in one op.

    The probabilities are never stored. Softmax and loss are computed in one visit of each row and the gradient in
    another. Those of a reduced loss of classes are computed in the same visit on the CPU in float32 and float64, and on
    CUDA, where there are many logits, in all dtypes but float16; the gradient is then held until the backward pass.
    Logits of any size are handled, since each row is shifted by its maximum.

    Args:
        input: logits.
        target: for each row the index of its class, or ``ignore_index``; or the probability of every class, which may
            require grad.
        weight: a factor for each class, if given.
        size_average: deprecated, see ``reduction``.
        ignore_index: rows with this target have loss 0 and gradient 0, whatever they hold.
        reduce: deprecated, see ``reduction``.
        reduction: "none" gives each row's loss, "sum" their sum, "mean" their sum divided by the sum of the weights of
            the targets (which is NaN where every row is ignored, as in torch), or for probabilities by the number of
            rows.
        label_smoothing: the share, from 0 to 1, of each target that is spread evenly over all classes.
        return_lse: whether to return each row's log-sum-exp too, differentiable; 0 for rows that are ignored.
        z_loss: this much times the square of the log-sum-exp is added to the loss of each row that is not ignored,
            before it is reduced. It keeps logits from drifting.

    Shape:
        - input: :math:`(N, C)`, batch and classes, or :math:`(C)`, or :math:`(N, C, d_1, \ldots)`, which is copied so
          that the classes of a row lie side by side; float64, float32, bfloat16 or float16
        - target: :math:`(N)`, or :math:`()`, or :math:`(N, d_1, \ldots)`, int64, int32, int16 or uint8, values in
          :math:`[0, C)`; or probabilities of the shape of input, floating point
        - weight: :math:`(C)`, of the dtype and device of input

    Returns:
        A tensor of the dtype of input and of shape :math:`(N)`, :math:`()` or :math:`(N, d_1, \ldots)` for reduction
        "none", otherwise of shape :math:`()`. With ``return_lse``, it and the log-sum-exp of each row, float32 for
        dtypes of 16 bits.

    Raises:
        IndexError: if a target is neither a class nor ``ignore_index`` (on CUDA a device-side assertion, as in torch).
        RuntimeError: if a dtype, a device, the shape of weight or of a target (N, d1, ...) does not fit, or
            ``ignore_index`` comes with probabilities.
        TypeError: if input, target or weight is no tensor.
        ValueError: if the reduction is not known or target and input differ in batch size.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> loss = cross_entropy(logits, torch.tensor([0]))
        >>> loss.backward()
        >>> loss.detach(), logits.grad
        (tensor(0.2395), tensor([[-0.2130,  0.1065,  0.1065]]))
        >>> cross_entropy(logits.detach(), torch.tensor([[0.5, 0.5, 0.0]]))
        tensor(1.2395)

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.4; label smoothing: Szegedy et al.,
    2015, arXiv:1512.00567; z-loss: Chowdhery et al., 2022, arXiv:2204.02311, section 5.
    """
    if size_average is not None or reduce is not None:
        reduction = torch_reduction.legacy_get_string(size_average, reduce)
    check_reduction("cross_entropy", reduction)
    check_tensors("cross_entropy", "weight", input=input, target=target, weight=weight)
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: expected input of shape (C), (N, C) or (N, C, d1, ...), got ()")
    holds_probabilities = target.dim() == input.dim() and target.shape == input.shape
    if holds_probabilities:
        _check_probabilities("cross_entropy", target, ignore_index)
    else:
        target = check_classes("cross_entropy", input, target, weight)
    if is_autocasting(input):
        input, weight = autocast(torch.float32, input, weight)

    # Rows of classes, from (C) or (N, C, d1, ...), and their targets in the same order.
    rows, shape = input, input.shape[:1]
    if input.dim() != 2:
        dim = 0 if input.dim() == 1 else 1
        shape = input.shape[:dim] + input.shape[dim + 1 :]
        if holds_probabilities:
            target = target.movedim(dim, -1).reshape(math.prod(shape), input.shape[dim])
        elif target.shape != shape and not (input.dim() == 1 and target.shape == (1,)):
            # As in torch, another batch size is a ValueError, another shape behind it is not.
            error = ValueError if input.dim() == 1 or target.shape[:1] != shape[:1] else RuntimeError
            raise error(f"cross_entropy: expected target of shape {tuple(shape)}, got {tuple(target.shape)}")
        else:
            target = target.reshape(-1)
        rows = input.movedim(dim, -1).reshape(math.prod(shape), input.shape[dim])

    if holds_probabilities:
        loss, lse, total_weight = _of_probabilities(rows, target, weight, reduction, label_smoothing)
    elif return_lse or z_loss:
        loss, lse, total_weight = ops.cross_entropy_with_lse(
            rows, target, weight, reduction, ignore_index, label_smoothing
        )
    else:
        loss = ops.cross_entropy(rows, target, weight, reduction, ignore_index, label_smoothing)
    if z_loss:
        loss = loss + z_loss * _reduce(lse.square(), total_weight, reduction).to(loss.dtype)
    if reduction == "none" and input.dim() != 2:
        loss = loss.reshape(shape)
    return (loss, lse.reshape(shape)) if return_lse else loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    return_lse: bool = False,
    z_loss: float = 0.0,
) -> Any:
    r"""Softmax cross-entropy of a linear layer's output: ``torch.nn.functional.linear_cross_entropy`` in one op.

    Stands for ``cross_entropy(linear(input, linear_weight, linear_bias), target)``, but the logits are there for some
    rows at a time only: beside the results it takes the logits of 128 rows, of 512 with dtypes of 16 bits, or 1 MiB; on
    CUDA twice the logits of 2048 rows, or twice 128 MiB; with dtypes of 16 bits a float32 copy of linear_weight; and
    where the graph is retained a copy of the gradients. All logits are held for probabilities as targets, for a
    linear_weight of more than two dimensions, for class weights under autocast, and for second derivatives.

    Args:
        input: what the linear layer maps to logits.
        linear_weight: its weight.
        target: for each row the index of its class, or ``ignore_index``; or the probability of every class.
        linear_bias: its bias, if given.
        weight: a factor for each class, as all that follow see :func:`cross_entropy`.
        reduction: "none", "mean" or "sum".
        ignore_index: rows with this target have loss 0 and gradient 0; None stands for -100.
        label_smoothing: the share of each target that is spread evenly over all classes.
        return_lse: whether to return each row's log-sum-exp too. With it or z_loss, and in float16, the logits are
            computed twice.
        z_loss: this much times the square of the log-sum-exp is added to each row's loss.

    Shape:
        - input: :math:`(N, in\_features)` or :math:`(in\_features)`, float64, float32, bfloat16 or float16
        - linear_weight: :math:`(C, in\_features)`, or :math:`(C, d_1, \ldots, in\_features)` for C classes at each of
          several places
        - target: :math:`(N)`, :math:`()` or :math:`(N, d_1, \ldots)`; or probabilities :math:`(N, C)`, :math:`(C)` or
          :math:`(N, C, d_1, \ldots)`
        - linear_bias: :math:`(C)` or :math:`(C, d_1, \ldots)`
        - weight: :math:`(C)`

    Returns:
        A tensor of the dtype of input and of the shape of the indices for reduction "none", otherwise :math:`()`. With
        ``return_lse``, it and the log-sum-exp of each row, float32 for dtypes of 16 bits.

    Raises:
        The errors of :func:`cross_entropy`, and RuntimeError if a shape, dtype or device does not fit.

    Example:
        >>> hidden, weight = torch.randn(64, 512), torch.randn(32000, 512)
        >>> linear_cross_entropy(hidden, weight, torch.randint(32000, (64,))).shape
        torch.Size([])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.4.
    """
    op = "linear_cross_entropy"
    check_reduction(op, reduction)
    check_tensors(
        op,
        "linear_bias",
        "weight",
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
    )
    if input.dim() not in (1, 2):
        raise RuntimeError(f"{op}: expected input of shape (N, in_features) or (in_features), got {tuple(input.shape)}")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(
            f"{op}: expected linear_weight of shape (C, {input.shape[-1]}), got {tuple(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"{op}: expected linear_bias of shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(f"{op}: expected input of shape (N, in_features) with a linear_weight of more dimensions")
    logits_shape = input.shape[:-1] + linear_weight.shape[:-1]
    holds_probabilities = target.shape == logits_shape
    if holds_probabilities and ignore_index is not None:
        raise RuntimeError(f"{op}: expected no ignore_index with class probabilities, got {ignore_index}")
    ignore_index = -100 if ignore_index is None else ignore_index
    casts = is_autocasting(input)
    if holds_probabilities or linear_weight.dim() > 2 or (casts and weight is not None):
        matrix, bias = (
            linear_weight.flatten(0, -2),
            None if linear_bias is None else linear_bias.flatten(),
        )
        return cross_entropy(
            linear_act(input, matrix, bias, "identity").reshape(logits_shape),
            target,
            weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            return_lse=return_lse,
            z_loss=z_loss,
        )
    target = check_classes(op, input, target, weight)
    # Autocast computes the products in 16 bits and the loss in float32.
    dtype = torch.promote_types(input.dtype, torch.float32) if casts else input.dtype
    if casts:
        input, linear_weight, linear_bias = autocast(None, input, linear_weight, linear_bias)
    rows, of_rows = (input.unsqueeze(0), target.reshape(-1)) if input.dim() == 1 else (input, target)
    result = ops.linear_cross_entropy(
        rows,
        linear_weight,
        linear_bias,
        of_rows,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        bool(return_lse or z_loss),
    )
    if not (return_lse or z_loss):
        return result.to(dtype).reshape(input.shape[:-1] if reduction == "none" else ())
    loss, lse, total_weight = result
    if z_loss:
        loss = loss + z_loss * _reduce(lse.square(), total_weight, reduction)
    loss = loss.to(dtype).reshape(input.shape[:-1] if reduction == "none" else ())
    return (loss, lse.reshape(input.shape[:-1])) if return_lse else loss


def check_classes(op: str, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The classes as the ops take them."""
    if input.dim() == 2 and (target.dim() == 0 or target.shape[0] != input.shape[0]):
        # As in torch, another batch size is a ValueError, another number of dimensions is not.
        raise ValueError(f"{op}: expected target of shape {tuple(input.shape[:1])}, got {tuple(target.shape)}")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: expected weight not to require grad, for the loss has no gradient by it")
    if target.dtype is torch.int64:
        return target
    if target.dtype in (torch.int32, torch.int16, torch.uint8):
        return target.long()
    raise RuntimeError(
        f"{op}: expected target to hold class indices, int64, int32, int16 or uint8, or probabilities in the shape of "
        f"the logits, got {target.dtype} of shape {tuple(target.shape)}"
    )


def _check_probabilities(op: str, target: Tensor, ignore_index: int) -> None:
    if not target.is_floating_point():
        raise RuntimeError(
            f"{op}: expected class probabilities, since target has the shape of the logits, got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"{op}: expected no ignore_index with class probabilities, in which no class is left out, "
            f"got {ignore_index}"
        )


def _of_probabilities(
    rows: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Loss, the lse of each row, and what the mean divides by."""
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"cross_entropy: expected label_smoothing in [0, 1], got {label_smoothing}")
    num_classes, dtype = rows.shape[1], torch.promote_types(rows.dtype, target.dtype)
    op_dtype = dtype
    if weight is not None and weight.shape != (num_classes,):
        raise RuntimeError(f"cross_entropy: expected weight of shape ({num_classes},), got {tuple(weight.shape)}")
    if weight is not None or label_smoothing > 0:
        # Changed targets are not to be rounded to 16 bits.
        op_dtype = torch.promote_types(dtype, torch.float32)
        target = target.to(op_dtype)
    if label_smoothing > 0 and num_classes > 0:
        target = target * (1 - label_smoothing) + label_smoothing / num_classes
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
        target = target * weight
        op_dtype = torch.promote_types(op_dtype, target.dtype)
    loss, lse = ops.cross_entropy_probabilities(rows.to(op_dtype), target.to(op_dtype), reduction)
    return loss.to(dtype), lse, rows.shape[0]


def _reduce(of_rows: Tensor, total_weight: Tensor | float, reduction: str) -> Tensor:
    return of_rows if reduction == "none" else of_rows.sum() / (total_weight if reduction == "mean" else 1)
