"""The op ``linear_cross_entropy``: :mod:`cross_entropy` of the logits x W^T + b, which are never there as a whole.

Where the loss is reduced, the forward op gives the gradients with it, for an upstream gradient of 1, and the backward
pass multiplies them by what comes in. Where it is not, or a gradient comes in for lse too, the backward op computes the
logits again; so it does in float16, in which small gradients vanish without the factor of a GradScaler. Both take some
rows at a time. For a second derivative the logits are kept as a whole. The loss of 16-bit dtypes is float32.
"""

from typing import Any

import torch
from torch import Tensor

from torch_mlp.ops.cross_entropy import backward as cross_entropy_backward
from torch_mlp.ops.cross_entropy import cross_entropy, cross_entropy_with_lse, log_sum_exp
from torch_mlp.ops.fake import register_fake
from torch_mlp.ops.linear_act import only_needed
from torch_mlp.ops.transforms import in_transform, is_composed, is_last_use

forward_op = torch.ops.torch_mlp.linear_cross_entropy.default
backward_op = torch.ops.torch_mlp._linear_cross_entropy_backward.default


def _new_grads(
    input: Tensor, linear_weight: Tensor, needs_grad: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = input.shape, linear_weight.shape, linear_weight.shape[:1]
    of_input, of_weight, of_bias = (
        input.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs_grad, strict=True)
    )
    return of_input, of_weight, of_bias


@register_fake("torch_mlp::linear_cross_entropy")
def _(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    *needs_grad: bool,
) -> tuple[Tensor, ...]:
    rows, is_none = input.shape[0], reduction == "none"
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    needs_input, needs_weight, needs_bias = (needed and not is_none for needed in needs_grad)
    return (
        input.new_empty((rows,) if is_none else (), dtype=compute),
        input.new_empty((2, rows), dtype=compute),
        input.new_empty((), dtype=compute),
        *_new_grads(input, linear_weight, (needs_input, needs_weight, needs_bias)),
    )


@register_fake("torch_mlp::_linear_cross_entropy_backward")
def _(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    total_weight: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    needs_grad_input: bool,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_grads(input, linear_weight, (needs_grad_input, needs_grad_weight, needs_grad_bias))


def _differentiable_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op made of differentiable ones, with all logits at once."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    grad = cross_entropy_backward(grad_output.to(input.dtype), grad_lse, logits, *rest)
    return grad @ linear_weight, grad.mT @ input, grad.sum(0)


class LinearCrossEntropy(torch.autograd.Function):
    """The fused forward pass, with the gradients of a reduced loss."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        returns_lse: bool,
        needs_grad: tuple[bool, bool, bool],
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Loss of shape (batch,) for reduction "none", else (); where asked for, lse (batch,) and the total weight."""
        options = reduction, ignore_index, label_smoothing
        # What comes in for lse is not known yet; nor the factor without which gradients vanish in float16.
        comes_later = returns_lse or reduction == "none" or input.dtype == torch.float16
        needs_now = (False, False, False) if comes_later else needs_grad
        loss, lse, total_weight, *grads = forward_op(
            input, linear_weight, linear_bias, target, weight, *options, *needs_now
        )
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, lse, total_weight, *grads)
        ctx.options, ctx.has_grads = options, any(needs_now)
        if not returns_lse:
            return loss
        ctx.mark_non_differentiable(total_weight)
        ctx.set_materialize_grads(False)
        return loss, log_sum_exp(lse, target, ignore_index), total_weight

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None = None, _: None = None) -> Any:
        """Gradients of input, linear_weight and linear_bias."""
        *saved, of_input, of_weight, of_bias = ctx.saved_tensors
        needs_grad, input = ctx.needs_input_grad[:3], saved[0]
        if grad_output is None:
            assert grad_lse is not None
            grad_output = grad_lse.new_zeros(input.shape[:1] if ctx.options[0] == "none" else ())
        if torch.is_grad_enabled() or in_transform():
            grads = _differentiable_backward(grad_output, grad_lse, *saved, *ctx.options)
        elif ctx.has_grads:
            scale = torch.Tensor.mul_ if is_last_use(grad_output) else torch.Tensor.mul
            grads = scale(of_input, grad_output), scale(of_weight, grad_output), scale(of_bias, grad_output)
            if needs_grad[0]:  # times inf or NaN it would be NaN for a row that is ignored
                grads[0].masked_fill_((saved[3] == ctx.options[1]).unsqueeze(1), 0)
        else:
            grads = backward_op(grad_output, grad_lse, *saved, *ctx.options, *needs_grad)
        return *only_needed(grads, needs_grad), *(None,) * 7


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    returns_lse: bool,
) -> Any:
    """The one entry: the ops it is made of inside functional transforms and of DTensors, else the fused op.

    Loss; where asked for with the lse of each row, differentiable too, and the total weight by which the mean divides.
    """
    options = reduction, ignore_index, label_smoothing
    if is_composed(input):
        logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
        return (cross_entropy_with_lse if returns_lse else cross_entropy)(logits, target, weight, *options)
    is_recorded = torch.is_grad_enabled()
    needs_grad = tuple(
        is_recorded and tensor is not None and tensor.requires_grad for tensor in (input, linear_weight, linear_bias)
    )
    return LinearCrossEntropy.apply(
        input, linear_weight, linear_bias, target, weight, *options, returns_lse, needs_grad
    )
