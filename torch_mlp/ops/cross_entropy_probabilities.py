"""The op ``cross_entropy_probabilities``: softmax and cross-entropy with a number for each class as target, reduced.

With p = softmax(x), a row of target t has

    l       = sum_c t_c (lse(x) - x_c)
    dl/dx_c = p_c sum_k t_k - t_c        dl/dt_c = lse(x) - x_c

Mostly t are probabilities, whose sum is 1, but class weights and label smoothing, which the caller has put into them,
change it. "mean" divides by the number of rows. lse(x) is a result of its own. (Bishop, Pattern
Recognition and Machine Learning, 2006, section 4.3.4.)
"""

from typing import Any

import torch
from torch import Tensor

from torch_mlp.ops.fake import register_fake
from torch_mlp.ops.linear_act import only_needed
from torch_mlp.ops.transforms import in_transform, is_composed

forward_op = torch.ops.torch_mlp.cross_entropy_probabilities.default
backward_op = torch.ops.torch_mlp._cross_entropy_probabilities_backward.default


def _compute(input: Tensor) -> Tensor:
    return input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)


@register_fake("torch_mlp::cross_entropy_probabilities")
def _(input: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    loss = input.new_empty(input.shape[:1] if reduction == "none" else ())
    return loss, _compute(input).new_empty((2, input.shape[0]))


@register_fake("torch_mlp::_cross_entropy_probabilities_backward")
def _(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    reduction: str,
    needs_grad_input: bool,
    needs_grad_target: bool,
) -> tuple[Tensor, Tensor]:
    of_input = input.new_empty(input.shape if needs_grad_input else (0,))
    return of_input, input.new_empty(input.shape if needs_grad_target else (0,))


def reference(input: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The op composed of ATen calls: loss, and the lse of each row."""
    logits = _compute(input)
    lse = logits.logsumexp(1)
    loss = (target * (lse.unsqueeze(1) - logits)).sum(1)
    return _reduce(loss, reduction).to(input.dtype), lse


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / loss.shape[0]


def reference_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    lse: Tensor,
    reduction: str,
    *needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The backward op composed of ATen calls, so that autograd differentiates it."""
    logits, weights = _compute(input), _compute(target)
    scale = _compute(grad_output).reshape(-1, 1) / (input.shape[0] if reduction == "mean" else 1)
    factor = scale * weights.sum(1, keepdim=True)
    if grad_lse is not None:
        factor = factor + grad_lse.unsqueeze(1)
    by_input = factor * torch.softmax(logits, 1) - scale * weights
    by_target = scale * (logits.logsumexp(1, keepdim=True) - logits)
    return by_input.to(input.dtype), by_target.to(input.dtype)


class CrossEntropyProbabilities(torch.autograd.Function):
    """The fused forward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
        """Loss of shape (batch,) for reduction "none", else (); and lse (batch,)."""
        loss, lse = forward_op(input, target, reduction)
        ctx.save_for_backward(input, target, lse)
        ctx.reduction = reduction
        ctx.set_materialize_grads(False)
        return loss, lse[0] + lse[1].log()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of input and target; only where they are to be differentiated again are they made of ATen calls."""
        input, target, lse = ctx.saved_tensors
        if grad_output is None:
            grad_output = input.new_zeros(input.shape[:1] if ctx.reduction == "none" else ())
        needs_grad = ctx.needs_input_grad[:2]
        backward = reference_backward if torch.is_grad_enabled() or in_transform() else backward_op
        grads = backward(grad_output, grad_lse, input, target, lse, ctx.reduction, *needs_grad)
        return *only_needed(grads, needs_grad), None


def cross_entropy_probabilities(input: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The one entry, loss and lse: the reference in transforms and of DTensors, else the fused op."""
    return (reference if is_composed(input) else CrossEntropyProbabilities.apply)(input, target, reduction)
