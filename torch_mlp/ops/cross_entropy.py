"""The op ``cross_entropy``: softmax and negative log-likelihood of class indices, reduced.

With p = softmax(x), label smoothing e, class weights w (1 where none are given) and C classes, a row of target y has

    l    = (1 - e) w_y (lse(x) - x_y) + e / C * sum_c w_c (lse(x) - x_c)
    dl/dx_c = a p_c - b_c,  a = (1 - e) w_y + e / C * sum_k w_k,  b_c = (1 - e) w_y [c = y] + e / C * w_c

and a row whose target is ignore_index has loss and gradient 0. "mean" divides by the sum of w_y. (Bishop, Pattern
Recognition and Machine Learning, 2006, section 4.3.4; label smoothing: Szegedy et al., 2015, arXiv:1512.00567.)
"""

from typing import Any

import torch
from torch import Tensor

from torch_mlp.ops.transforms import in_transform

forward_op = torch.ops.torch_mlp.cross_entropy.default
backward_op = torch.ops.torch_mlp._cross_entropy_backward.default


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("torch_mlp::cross_entropy")
def _(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute = _compute_dtype(input.dtype)
    return (
        input.new_empty(input.shape[:1] if reduction == "none" else ()),
        input.new_empty((2, input.shape[0]), dtype=compute),
        input.new_empty((), dtype=compute),
    )


@torch.library.register_fake("torch_mlp::_cross_entropy_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    total_weight: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return input.new_empty(input.shape)


def reference(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The op composed of ATen calls."""
    return torch.nn.functional.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


class CrossEntropyBackward(torch.autograd.Function):
    """The backward pass as a differentiable function of its own, so that double backward works."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        lse: Tensor,
        total_weight: Tensor,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        """Gradient of input."""
        ctx.save_for_backward(grad_output, input, target, weight, total_weight)
        ctx.options = reduction, ignore_index, label_smoothing
        return backward_op(
            grad_output, input, target, weight, lse, total_weight, reduction, ignore_index, label_smoothing
        )

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of grad_output and input: of g (a p - b) by g, and by x with dp_c/dx_k = p_c ([c = k] - p_k)."""
        grad_output, input, target, weight, total_weight = ctx.saved_tensors
        reduction, ignore_index, label_smoothing = ctx.options
        num_classes = input.shape[1]
        weight = torch.ones_like(input[0]) if weight is None else weight
        counts = (target != ignore_index).to(input.dtype).unsqueeze(1)
        index = target.where(target != ignore_index, 0).unsqueeze(1)
        at_target = (1 - label_smoothing) * weight[index] * counts
        of_softmax = at_target + label_smoothing / num_classes * weight.sum() * counts
        offset = (label_smoothing / num_classes * weight * counts).scatter_add(1, index, at_target)

        p = torch.softmax(input, dim=1)
        scale = grad_output / total_weight.to(input.dtype) if reduction == "mean" else grad_output
        by_scale = (grad_grad_input * (of_softmax * p - offset)).sum(1)
        if reduction == "mean":
            by_scale = by_scale.sum() / total_weight.to(input.dtype)
        elif reduction == "sum":
            by_scale = by_scale.sum()
        centred = grad_grad_input - (p * grad_grad_input).sum(1, keepdim=True)
        by_input = scale.reshape(-1, 1) * of_softmax * p * centred
        return by_scale, by_input, *(None,) * 7


class CrossEntropy(torch.autograd.Function):
    """The fused forward pass; its backward pass is CrossEntropyBackward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        """Loss of shape (batch,) for reduction "none", else ()."""
        loss, lse, total_weight = forward_op(input, target, weight, reduction, ignore_index, label_smoothing)
        ctx.save_for_backward(input, target, weight, lse, total_weight)
        ctx.options = reduction, ignore_index, label_smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of input."""
        input, target, weight, lse, total_weight = ctx.saved_tensors
        grad_input = CrossEntropyBackward.apply(grad_output, input, target, weight, lse, total_weight, *ctx.options)
        return grad_input, *(None,) * 5


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The one entry: the reference inside functional transforms, the fused op everywhere else."""
    if in_transform():
        return reference(input, target, weight, reduction, ignore_index, label_smoothing)
    return CrossEntropy.apply(input, target, weight, reduction, ignore_index, label_smoothing)
