"""The ops with the signatures of ``torch.nn.functional``: values, gradients of any order, ``torch.compile``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction

from torch_mlp import ops
from torch_mlp.ops import ACTIVATIONS

__all__ = ["ACTIVATIONS", "cross_entropy", "linear_act", "linear_sigmoid"]


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


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Softmax cross-entropy of logits and class indices: ``torch.nn.functional.cross_entropy`` in one op.

    Softmax and loss are computed in one visit of each row and the gradient in another; the probabilities are never
    stored. Logits of any size are handled, since each row is shifted by its maximum.

    Args:
        input: logits.
        target: for each row the index of its class, or ``ignore_index``.
        weight: a factor for each class, if given.
        size_average: deprecated, see ``reduction``.
        ignore_index: rows with this target have loss 0 and gradient 0.
        reduce: deprecated, see ``reduction``.
        reduction: "none" gives each row's loss, "sum" their sum, "mean" their sum divided by the sum of the weights of
            the targets (which is NaN where every row is ignored, as in torch).
        label_smoothing: the share, from 0 to 1, of each target that is spread evenly over all classes.

    Shape:
        - input: :math:`(N, C)`, batch and classes, float64, float32, bfloat16 or float16
        - target: :math:`(N)`, int64 or uint8, values in :math:`[0, C)`
        - weight: :math:`(C)`, of the dtype and device of input

    Returns:
        A tensor of the dtype of input and of shape :math:`(N)` for reduction "none", otherwise :math:`()`.

    Raises:
        IndexError: if a target is neither a class nor ``ignore_index`` (on CUDA a device-side assertion, as in torch).
        NotImplementedError: for class probabilities as target, and for inputs that are not of shape (N, C).
        RuntimeError: if a dtype, a device or the shape of weight does not fit.
        ValueError: if the reduction is not known or target and input differ in batch size.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> loss = cross_entropy(logits, torch.tensor([0]))
        >>> loss.backward()
        >>> loss.detach(), logits.grad
        (tensor(0.2395), tensor([[-0.2130,  0.1065,  0.1065]]))

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.4; label smoothing: Szegedy et al.,
    2015, arXiv:1512.00567.
    """
    if size_average is not None or reduce is not None:
        reduction = torch_reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"cross_entropy: expected reduction to be one of none, mean, sum, got {reduction!r}")
    if target.is_floating_point():
        raise NotImplementedError(
            f"cross_entropy: expected class indices of dtype torch.int64 as target, got {target.dtype}: class "
            "probabilities are not supported yet, use torch.nn.functional.cross_entropy"
        )
    if input.dim() != 2:
        raise NotImplementedError(
            f"cross_entropy: expected input of shape (batch, num_classes), got {tuple(input.shape)}: other numbers of "
            "dimensions are not supported yet, use torch.nn.functional.cross_entropy"
        )
    if weight is not None and weight.requires_grad:
        raise RuntimeError("cross_entropy: expected weight not to require grad, for the loss has no gradient by it")
    if _is_autocasting(input):
        input, weight = _autocast(torch.float32, input, weight)
    if target.dtype == torch.uint8:
        target = target.long()
    return ops.cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)


def _is_autocasting(input: Tensor) -> bool:
    # What input.device.type would say takes as long as all the rest of a call.
    return torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu") and not input.is_meta


def _autocast(dtype: torch.dtype | None, input: Tensor, *others: Tensor | None) -> list[Any]:
    """The tensors as torch.autocast hands them to an op: float32 and below in dtype, None being autocast's own."""
    dtype = dtype or torch.get_autocast_dtype(input.device.type)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return [t if t is None or t.dtype not in eligible else t.to(dtype) for t in (input, *others)]
