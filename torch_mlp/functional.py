"""The ops with the signatures of ``torch.nn.functional``: values, gradients of any order, ``torch.compile``."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction

from torch_mlp import ops
from torch_mlp.ops import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "cross_entropy",
    "linear_act",
    "linear_cross_entropy",
    "linear_sigmoid",
    "mlp",
    "mlp_cross_entropy",
]


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "sigmoid") -> Tensor:
    r"""Apply a linear map and an activation in one op: ``activation(input @ weight.T + bias)``.

    Stands for ``torch.sigmoid(torch.nn.functional.linear(input, weight, bias))`` and the like. The backward pass needs
    the output, not the pre-activation, so the latter is never stored.

    Args:
        input: the values to map.
        weight: the matrix of the linear map.
        bias: added to every row of the product, if given.
        activation: "identity", "sigmoid", "tanh" or "relu" (whose derivative at 0 is 0, as in torch).

    Shape:
        - input: :math:`(*, in\_features)`, any leading dimensions, float64, float32, bfloat16 or float16
        - weight: :math:`(out\_features, in\_features)`, of the dtype and device of input
        - bias: :math:`(out\_features)`, of the dtype and device of input

    Returns:
        A tensor of shape :math:`(*, out\_features)`, of the dtype of input. 16-bit dtypes are accumulated in float32.

    Raises:
        ValueError: if the activation is not known.
        RuntimeError: if a shape, dtype or device does not fit.

    Example:
        >>> input, weight, bias = torch.randn(64, 784), torch.randn(512, 784), torch.randn(512)
        >>> linear_act(input, weight, bias, "tanh").shape
        torch.Size([64, 512])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 5.1.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear_act: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if _is_autocasting(input):
        input, weight, bias = _autocast(None, input, weight, bias)
    return ops.linear_act(input, weight, bias, activation)


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map and the sigmoid in one op: :func:`linear_act` with ``activation="sigmoid"``.

    Example:
        >>> linear_sigmoid(torch.zeros(1, 3), torch.ones(2, 3))
        tensor([[0.5000, 0.5000]])
    """
    return linear_act(input, weight, bias, "sigmoid")


def mlp(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str = "sigmoid"
) -> Tensor:
    r"""Apply all layers of a multilayer perceptron as one op and one autograd node; gives logits.

    Stands for :func:`linear_act` once for each layer, with the activation but for the last. The parameters' gradients
    come as usual, so that any optimizer works.

    Args:
        input: the values to map.
        weights: the weight of each layer.
        biases: the bias of each layer, or None.
        activation: of the hidden layers: "identity", "sigmoid", "tanh" or "relu".

    Shape:
        - input: :math:`(*, in\_features)`, any leading dimensions, float64, float32, bfloat16 or float16
        - weights: :math:`(out\_features, in\_features)` of each layer, of the dtype and device of input
        - biases: :math:`(out\_features)` of each layer

    Returns:
        A tensor of shape :math:`(*, out\_features)` of the last layer, of the dtype of input.

    Raises:
        ValueError: if the activation is not known, or there are not as many biases as weights, or none.
        RuntimeError: if a shape, dtype or device does not fit.

    Example:
        >>> input, weights = torch.rand(64, 784), [torch.randn(512, 784), torch.randn(10, 512)]
        >>> mlp(input, weights, [torch.zeros(512), None], "relu").shape
        torch.Size([64, 10])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 5.1.
    """
    input, parameters = _check_mlp("mlp", input, weights, biases, activation)
    return ops.mlp(input, parameters, activation)


def mlp_cross_entropy(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    activation: str = "sigmoid",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The loss of a multilayer perceptron as one autograd node: :func:`cross_entropy` of what :func:`mlp` gives.

    Args:
        input: the values to map, :math:`(N, in\_features)`.
        weights: see :func:`mlp`.
        biases: see :func:`mlp`.
        target: for each row the index of its class, or ``ignore_index``, :math:`(N)`; or probabilities :math:`(N, C)`.
        activation: see :func:`mlp`.
        weight: see :func:`cross_entropy`, as all that follow.
        ignore_index: rows with this target have loss 0 and gradient 0.
        reduction: "none", "mean" or "sum".
        label_smoothing: the share of each target that is spread over all classes.

    Returns:
        A tensor of the dtype of input and of shape :math:`(N)` for reduction "none", otherwise :math:`()`.

    Raises:
        The errors of :func:`mlp` and :func:`cross_entropy`.

    Example:
        >>> weights = [torch.randn(512, 784), torch.randn(10, 512)]
        >>> mlp_cross_entropy(torch.rand(64, 784), weights, [None, None], torch.randint(10, (64,))).shape
        torch.Size([])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, sections 5.1 and 5.2.
    """
    # Autocast computes the loss in float32, which is another dtype than that of the layers.
    if input.dim() != 2 or target.dim() == 2 or _is_autocasting(input):
        logits = mlp(input, weights, biases, activation)
        return cross_entropy(logits, target, weight, None, ignore_index, None, reduction, label_smoothing)
    input, parameters = _check_mlp("mlp_cross_entropy", input, weights, biases, activation)
    _check_reduction("mlp_cross_entropy", reduction)
    target = _check_classes("mlp_cross_entropy", target, weight)
    return ops.mlp_cross_entropy(
        input, parameters, target, activation, weight, reduction, ignore_index, label_smoothing
    )


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

    Softmax and loss are computed in one visit of each row and the gradient in another; the probabilities are never
    stored. Logits of any size are handled, since each row is shifted by its maximum.

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
    _check_reduction("cross_entropy", reduction)
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: expected input of shape (C), (N, C) or (N, C, d1, ...), got ()")
    holds_probabilities = target.dim() == input.dim() and target.shape == input.shape
    if holds_probabilities:
        _check_probabilities("cross_entropy", target, ignore_index)
    else:
        target = _check_classes("cross_entropy", target, weight)
    if _is_autocasting(input):
        input, weight = _autocast(torch.float32, input, weight)

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
    rows at a time only: beside the results it takes 1 KiB for each class, or 1 MiB, on CUDA twice the logits of 2048
    rows, or twice 128 MiB, and with dtypes of 16 bits a float32 copy of linear_weight. All logits are held for
    probabilities as targets, for a linear_weight of more than two dimensions, for class weights under autocast, and for
    second derivatives.

    Args:
        input: what the linear layer maps to logits.
        linear_weight: its weight.
        target: for each row the index of its class, or ``ignore_index``; or the probability of every class.
        linear_bias: its bias, if given.
        weight: a factor for each class, as all that follow see :func:`cross_entropy`.
        reduction: "none", "mean" or "sum".
        ignore_index: rows with this target have loss 0 and gradient 0; None stands for -100.
        label_smoothing: the share of each target that is spread evenly over all classes.
        return_lse: whether to return each row's log-sum-exp too. With it or z_loss the logits are computed twice.
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
    _check_reduction(op, reduction)
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
    is_autocasting = _is_autocasting(input)
    if holds_probabilities or linear_weight.dim() > 2 or (is_autocasting and weight is not None):
        matrix, bias = (
            linear_weight.reshape(-1, input.shape[-1]),
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
    target = _check_classes(op, target, weight)
    # Autocast computes the products in 16 bits and the loss in float32.
    dtype = torch.promote_types(input.dtype, torch.float32) if is_autocasting else input.dtype
    if is_autocasting:
        input, linear_weight, linear_bias = _autocast(None, input, linear_weight, linear_bias)
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


def _check_reduction(op: str, reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: expected reduction to be one of none, mean, sum, got {reduction!r}")


def _check_classes(op: str, target: Tensor, weight: Tensor | None) -> Tensor:
    """The classes as the ops take them."""
    if target.is_floating_point():
        raise RuntimeError(
            f"{op}: expected target to hold class indices, or probabilities in the shape of the logits, "
            f"got {target.dtype} of shape {tuple(target.shape)}"
        )
    if weight is not None and weight.requires_grad:
        raise RuntimeError(f"{op}: expected weight not to require grad, for the loss has no gradient by it")
    return target.long() if target.dtype in (torch.int32, torch.int16, torch.uint8) else target


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


def _check_mlp(
    op: str, input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The input and the parameters as the ops take them: weight, bias, weight, bias, ..."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"{op}: expected a weight and a bias, or None, for each layer, got {len(weights)} and {len(biases)}"
        )
    parameters = [parameter for layer in zip(weights, biases, strict=True) for parameter in layer]
    if _is_autocasting(input):
        input, *parameters = _autocast(None, input, *parameters)
    return input, tuple(parameters)


def _is_autocasting(input: Tensor) -> bool:
    # What input.device.type would say takes as long as all the rest of a call.
    return torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu") and not input.is_meta


def _autocast(dtype: torch.dtype | None, input: Tensor, *others: Tensor | None) -> list[Any]:
    """The tensors as torch.autocast hands them to an op: float32 and below in dtype, None being autocast's own."""
    dtype = dtype or torch.get_autocast_dtype(input.device.type)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return [t if t is None or t.dtype not in eligible else t.to(dtype) for t in (input, *others)]
