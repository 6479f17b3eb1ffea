"""The op ``cross_entropy``: softmax and negative log-likelihood of class indices, reduced.

With p = softmax(x), label smoothing e, class weights w (1 where none are given) and C classes, a row of target y has

    l    = (1 - e) w_y (lse(x) - x_y) + e / C * sum_c w_c (lse(x) - x_c)
    dl/dx_c = a p_c - b_c,  a = (1 - e) w_y + e / C * sum_k w_k,  b_c = (1 - e) w_y [c = y] + e / C * w_c

and a row whose target is ignore_index has loss and gradient 0. "mean" divides by the sum of w_y. lse(x) is the
logarithm of the sum of exp(x_c), and a result of its own where it is asked for: dlse/dx_c = p_c. (Bishop, Pattern
Recognition and Machine Learning, 2006, section 4.3.4; label smoothing: Szegedy et al., 2015, arXiv:1512.00567.)

Where exponentials and memory are what takes the time, a reduced loss that is to be differentiated comes with its
gradient, for an upstream gradient of 1. If another one comes in, the backward pass multiplies by it on the CPU; on
CUDA, where the host does not know it, a kernel looks and then computes the gradient anew in its place. Otherwise, and
where a gradient comes in for lse too, the backward op computes the softmax again.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from torch_mlp.ops.fake import register_fake
from torch_mlp.ops.transforms import in_transform, is_composed, is_last_use

forward_op = torch.ops.torch_mlp.cross_entropy.default
with_gradient_op = torch.ops.torch_mlp._cross_entropy_with_gradient.default
backward_op = torch.ops.torch_mlp._cross_entropy_backward.default
rescale_op = torch.ops.torch_mlp._cross_entropy_rescale_.default

_FEW_LOGITS = 1 << 22  # on CUDA: they stay in the cache until the backward pass, and launches are what takes the time


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _new_results(input: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    compute = _compute_dtype(input.dtype)
    return (
        input.new_empty(input.shape[:1] if reduction == "none" else ()),
        input.new_empty((2, input.shape[0]), dtype=compute),
        input.new_empty((), dtype=compute),
    )


@register_fake("torch_mlp::cross_entropy")
def _(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_results(input, reduction)


@register_fake("torch_mlp::_cross_entropy_with_gradient")
def _(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_new_results(input, reduction), input.new_empty(input.shape)


@register_fake("torch_mlp::_cross_entropy_backward")
def _(
    grad_output: Tensor,
    grad_lse: Tensor | None,
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


@register_fake("torch_mlp::_cross_entropy_rescale_")
def _(
    gradient: Tensor,
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    total_weight: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    return None


def reference(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The op composed of ATen calls."""
    if reduction == "mean" and weight is not None and label_smoothing > 0:
        # torch's function selects the targets that count, as many as there are, which cannot be batched.
        kept = target != ignore_index
        total_weight = (weight[target.where(kept, 0)] * kept).sum()
        return reference(input, target, weight, "sum", ignore_index, label_smoothing) / total_weight
    return torch.nn.functional.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def reference_lse(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The other results composed of ATen calls: the lse of each row, 0 where it is ignored, and the total weight."""
    is_kept = target != ignore_index
    logits = input.to(_compute_dtype(input.dtype)).where(is_kept.unsqueeze(1), 0)
    weights = logits.new_ones(input.shape[1]) if weight is None else weight.to(logits.dtype)
    return logits.logsumexp(1).where(is_kept, 0), (weights[target.where(is_kept, 0)] * is_kept).sum()


class _Gradient(NamedTuple):
    """What the gradient g (a p - b) + h p of a row is made of, composed of ATen calls in the dtype of computation."""

    scale: Tensor  # g, (batch, 1) or (1, 1)
    of_lse: Tensor | float  # h, (batch, 1), or 0
    of_softmax: Tensor  # a, (batch, 1)
    softmax: Tensor  # p, (batch, num_classes)
    offset: Tensor  # b, (batch, num_classes)
    divisor: Tensor  # by which the mean divides, (), else 1
    is_kept: Tensor  # whether a row is not ignored, (batch, 1)


def _gradient(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> _Gradient:
    num_classes = input.shape[1]
    is_kept = (target != ignore_index).unsqueeze(1)
    # An ignored row may hold anything, and has no label to look up.
    logits = input.to(total_weight.dtype).where(is_kept, 0)
    index = target.unsqueeze(1).where(is_kept, 0)
    weight = logits.new_ones(num_classes) if weight is None else weight.to(logits.dtype)
    at_target = (1 - label_smoothing) * weight[index] * is_kept
    smoothing = label_smoothing / num_classes * is_kept.to(logits.dtype)
    divisor = total_weight if reduction == "mean" else torch.ones_like(total_weight)
    divisor = divisor.where(divisor != 0, 1)  # no weight, no gradient: every row is ignored or weighs nothing
    return _Gradient(
        scale=grad_output.to(logits.dtype).reshape(-1, 1) / divisor,
        of_lse=0.0 if grad_lse is None else grad_lse.unsqueeze(1),
        of_softmax=at_target + smoothing * weight.sum(),
        softmax=torch.softmax(logits, dim=1),
        offset=(smoothing * weight).scatter_add(1, index, at_target),
        divisor=divisor,
        is_kept=is_kept,
    )


def reference_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    total_weight: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The backward op composed of ATen calls."""
    of = _gradient(grad_output, grad_lse, input, target, weight, total_weight, reduction, ignore_index, label_smoothing)
    grad = of.scale * (of.of_softmax * of.softmax - of.offset) + of.of_lse * of.softmax
    return grad.where(of.is_kept, 0).to(input.dtype)


class CrossEntropyBackward(torch.autograd.Function):
    """The backward pass as a differentiable function of its own, so that double backward works."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        grad_lse: Tensor | None,
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
        ctx.save_for_backward(grad_output, grad_lse, input, target, weight, total_weight)
        ctx.options = reduction, ignore_index, label_smoothing
        return backward_op(
            grad_output, grad_lse, input, target, weight, lse, total_weight, reduction, ignore_index, label_smoothing
        )

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of grad_output, grad_lse and input: of g (a p - b) + h p by g, by h, and by x with
        dp_c/dx_k = p_c ([c = k] - p_k)."""
        grad_output, grad_lse, input, target, weight, total_weight = ctx.saved_tensors
        of = _gradient(grad_output, grad_lse, input, target, weight, total_weight, *ctx.options)
        incoming = grad_grad_input.to(of.softmax.dtype).where(of.is_kept, 0)
        by_scale = (incoming * (of.of_softmax * of.softmax - of.offset)).sum(1) / of.divisor
        by_grad_output = by_scale if grad_output.dim() else by_scale.sum()
        by_lse = (of.softmax * incoming).sum(1, keepdim=True)
        by_input = (of.scale * of.of_softmax + of.of_lse) * of.softmax * (incoming - by_lse)
        return (
            by_grad_output.to(input.dtype),
            None if grad_lse is None else by_lse.squeeze(1),
            by_input.where(of.is_kept, 0).to(input.dtype),
            *(None,) * 7,
        )


def backward(grad_output: Tensor, *saved: Any) -> Tensor:
    """The backward pass; only where its result is to be differentiated again need its computation be recorded."""
    differentiable = CrossEntropyBackward.apply if torch.is_grad_enabled() else backward_op
    return (reference_backward if in_transform() else differentiable)(grad_output, *saved)


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
        returns_lse: bool,
        keeps_gradient: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Loss of shape (batch,) for reduction "none", else (); where asked for, lse (batch,) and the total weight."""
        op = with_gradient_op if keeps_gradient else forward_op
        loss, *saved = op(input, target, weight, reduction, ignore_index, label_smoothing)
        ctx.save_for_backward(input, target, weight, *saved)
        ctx.options = reduction, ignore_index, label_smoothing
        if not returns_lse:
            return loss
        lse, total_weight = saved
        ctx.mark_non_differentiable(total_weight)
        ctx.set_materialize_grads(False)
        return loss, log_sum_exp(lse, target, ignore_index), total_weight

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None = None, _: None = None) -> Any:
        """Gradient of input."""
        input, target, weight, lse, total_weight, *gradient = ctx.saved_tensors
        if gradient and not torch.is_grad_enabled() and type(grad_output) is Tensor and not in_transform():
            if input.is_cpu and _is_factor(grad_output):
                return _scaled(gradient[0], grad_output), *(None,) * 7
            if input.is_cuda and is_last_use(grad_output):
                rescale_op(gradient[0], grad_output, input, target, weight, lse, total_weight, *ctx.options)
                return gradient[0], *(None,) * 7
        if grad_output is None:
            grad_output = input.new_zeros(input.shape[:1] if ctx.options[0] == "none" else ())
        saved = target, weight, lse, total_weight
        return backward(grad_output, grad_lse, input, *saved, *ctx.options), *(None,) * 7


def _keeps_gradient(input: Tensor, reduction: str) -> bool:
    """Whether the forward pass computes the gradient too.

    A compiler does not know whether a graph is freed, nor a CUDA graph how often the backward pass is run. On the CPU
    16 bits would be rounded twice, and small ones vanish without the factor of a GradScaler. With one, a gradient in
    float16 would always be computed again.
    """
    if not input.requires_grad or not torch.is_grad_enabled() or reduction == "none" or torch.compiler.is_compiling():
        return False
    if input.is_cpu:
        return input.dtype in (torch.float32, torch.float64)
    return (
        input.is_cuda
        and input.dtype != torch.float16
        and input.numel() >= _FEW_LOGITS
        and not torch.cuda.is_current_stream_capturing()
    )


def _is_factor(grad_output: Tensor) -> bool:
    """Whether a gradient can be multiplied by it. By inf and NaN it cannot: that of rows that are ignored stays 0."""
    return not is_legacy_batchedtensor(grad_output) and math.isfinite(grad_output.item())


def _scaled(gradient: Tensor, factor: Any) -> Tensor:
    if not is_last_use(factor):
        return gradient * factor
    return gradient if factor.item() == 1 else gradient.mul_(factor)


def log_sum_exp(lse: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """One number for each row, (batch,), of the two that the op gives; 0 where the row is ignored."""
    maximum, sum = lse
    return (maximum + sum.log()).where(target != ignore_index, 0)


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The one entry: the reference inside functional transforms and of DTensors, else the fused op."""
    if is_composed(input):
        return reference(input, target, weight, reduction, ignore_index, label_smoothing)
    keeps_gradient = _keeps_gradient(input, reduction)
    return CrossEntropy.apply(input, target, weight, reduction, ignore_index, label_smoothing, False, keeps_gradient)


def cross_entropy_with_lse(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the lse of each row, differentiable too, and the total weight by which the mean divides."""
    if is_composed(input):
        loss = reference(input, target, weight, reduction, ignore_index, label_smoothing)
        return loss, *reference_lse(input, target, weight, ignore_index)
    return CrossEntropy.apply(input, target, weight, reduction, ignore_index, label_smoothing, True, False)
