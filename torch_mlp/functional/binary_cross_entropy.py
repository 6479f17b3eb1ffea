"""Sigmoid and binary cross-entropy, of logits and of a linear layer's output."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction

from torch_mlp import ops
from torch_mlp.functional.arguments import autocast, check_reduction, is_autocasting
from torch_mlp.functional.linear_act import linear_act
from torch_mlp.ops.binary_cross_entropy import add_l2_penalty
from torch_mlp.ops.transforms import in_transform


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Sigmoid and binary cross-entropy: ``torch.nn.functional.binary_cross_entropy_with_logits`` in one op.

    Loss and gradient are each computed in one visit of the logits; the sigmoid is never stored, and weights are not
    written out to the shape of the logits. Logits of any size are handled, and losses near 0 to all their digits.

    Args:
        input: logits.
        target: for each logit the probability of the positive class, which is differentiated too where it requires
            grad.
        weight: a factor for each logit, if given.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: "none" gives each logit's loss, "sum" their sum, "mean" their sum divided by their number (which is
            NaN where there is none, as in torch).
        pos_weight: a factor for the positive class of each logit, if given.

    Shape:
        - input: :math:`(*)`, any shape, float64, float32, bfloat16 or float16
        - target: :math:`(*)`, of the shape and device of input, floating-point
        - weight, pos_weight: any that broadcast to :math:`(*)`, such as :math:`(C)` for :math:`(N, C)`

    Returns:
        A tensor of the dtype of target, as in torch, and of the shape of input for reduction "none", otherwise
        :math:`()`. Where dtypes differ, the wider one of input and target is computed in.

    Raises:
        NotImplementedError: if input is not floating-point or target or pos_weight are of dtype bool.
        RuntimeError: if another dtype, a device or the shape of a weight does not fit, or a weight requires grad.
        ValueError: if the reduction is not known or target and input differ in shape.

    Example:
        >>> logits = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> loss = binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]))
        >>> loss.backward()
        >>> loss.detach(), logits.grad
        (tensor(0.2201), tensor([-0.0596,  0.1345]))

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.2.
    """
    if size_average is not None or reduce is not None:
        reduction = torch_reduction.legacy_get_string(size_average, reduce)
    op = "binary_cross_entropy_with_logits"
    check_reduction(op, reduction)
    if target.shape != input.shape:
        raise ValueError(f"{op}: expected target of shape {tuple(input.shape)}, got {tuple(target.shape)}")
    _check_binary_cross_entropy(op, input, target, weight, pos_weight)
    if is_autocasting(input):
        input, target, weight, pos_weight = autocast(torch.float32, input, target, weight, pos_weight)
    if target.dtype is input.dtype and weight is None and pos_weight is None:
        return ops.binary_cross_entropy(input, target, None, None, reduction)
    input, same, weight, pos_weight = _in_one_dtype(input, target, weight, pos_weight)
    return ops.binary_cross_entropy(input, same, weight, pos_weight, reduction).to(target.dtype)


def linear_binary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    weight_decay: float = 0.0,
) -> Tensor:
    r"""The loss of a binary or multi-label classifier's last layer as one autograd node.

    Stands for :func:`binary_cross_entropy_with_logits` of ``torch.nn.functional.linear(input, linear_weight,
    linear_bias)``: logistic regression for one output, as many independent ones for several.

    Args:
        input: the values to map.
        linear_weight: the matrix of the linear map.
        target: for each logit the probability of the positive class.
        linear_bias: added to every row of the product, if given.
        weight: a factor for each logit, if given.
        pos_weight: a factor for the positive class of each logit, if given.
        reduction: "none", "mean" or "sum".
        weight_decay: this much times half the square of the norm of linear_weight (not of the bias) is added to the
            loss after it is reduced to its mean or sum: the negative logarithm of a Gaussian prior.

    Shape:
        - input: :math:`(*, in\_features)`, any leading dimensions, float64, float32, bfloat16 or float16
        - linear_weight: :math:`(out\_features, in\_features)`, of the dtype and device of input
        - target: :math:`(*, out\_features)`, or just :math:`(*)` where there is one output
        - linear_bias: :math:`(out\_features)`, of the dtype and device of input
        - weight, pos_weight: any that broadcast to the shape of target

    Returns:
        A tensor of the dtype of target, and of its shape for reduction "none", otherwise of shape :math:`()`.

    Raises:
        The errors of :func:`linear_act` and :func:`binary_cross_entropy_with_logits`.
        ValueError: if the weight decay is negative, not finite, or not 0 with reduction "none".

    Example:
        >>> input, target = torch.randn(64, 784), torch.randint(2, (64,)).float()
        >>> linear_binary_cross_entropy(input, torch.zeros(1, 784), target, linear_bias=torch.zeros(1))
        tensor(0.6931)

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.2; the penalty: section 3.1.4.
    """
    op = "linear_binary_cross_entropy"
    check_reduction(op, reduction)
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"{op}: expected weight_decay to be finite and at least 0, got {weight_decay}")
    if weight_decay and reduction == "none":
        raise ValueError(f"{op}: expected reduction mean or sum with weight_decay, which no one logit has, got none")
    if linear_weight.dim() != 2:
        shape = tuple(linear_weight.shape)
        raise RuntimeError(f"{op}: expected linear_weight of shape (out_features, in_features), got {shape}")
    rows, out_features = input.shape[:-1], linear_weight.shape[0]
    if target.shape != (*rows, out_features) and not (out_features == 1 and target.shape == rows):
        raise ValueError(f"{op}: expected target of shape {(*rows, out_features)}, got {tuple(target.shape)}")
    _check_binary_cross_entropy(op, input, target, weight, pos_weight)
    # Where dtypes differ, as in autocast, the loss is computed in another one than the linear map.
    if is_autocasting(input) or any(
        t is not None and (t.dtype != input.dtype or t.is_cuda != input.is_cuda) for t in (target, weight, pos_weight)
    ):
        logits = linear_act(input, linear_weight, linear_bias, "identity").reshape(target.shape)
        loss = binary_cross_entropy_with_logits(logits, target, weight, reduction=reduction, pos_weight=pos_weight)
        return add_l2_penalty(loss, linear_weight, weight_decay)
    return ops.linear_binary_cross_entropy(
        input, linear_weight, linear_bias, target, weight, pos_weight, reduction, weight_decay
    )


def _check_binary_cross_entropy(
    op: str, input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> None:
    """What the op itself does not check, and where torch's error is of another class."""
    if not input.is_floating_point():
        raise NotImplementedError(f"{op}: expected input of a floating-point dtype, got {input.dtype}")
    for name, self in (("target", target), ("weight", weight), ("pos_weight", pos_weight)):
        if self is None:
            continue
        if self.dtype is torch.bool and self is not weight:
            raise NotImplementedError(f"{op}: expected {name} of a floating-point dtype, got {self.dtype}")
        # Within torch.func the composed op is differentiated by weights too.
        if self is not target and self.requires_grad and torch.is_grad_enabled() and not in_transform():
            raise RuntimeError(f"{op}: expected {name} not to require grad, for the loss has no gradient by it")


def _in_one_dtype(input: Tensor, target: Tensor, *weights: Tensor | None) -> list[Any]:
    """Tensors that torch takes together, as an op takes them: in one dtype, scalars on the device of the others."""
    dtype = input.dtype
    if target.is_floating_point():  # what is not, the op refuses, and so complex weights
        dtype = torch.promote_types(dtype, target.dtype)
        target = target.to(dtype)
    factors = [
        w if w is None or w.is_complex() else w.to(w.device if w.dim() else input.device, dtype) for w in weights
    ]
    return [input.to(dtype), target, *factors]
