"""The ops ``binary_cross_entropy_with_logits`` and ``linear_binary_cross_entropy``, the first after a linear map.

With s = sigmoid(x), target y, weights w and p (pos_weight), each 1 where it is not given, an element has

    l     = w ((1 - y) softplus(x) + p y softplus(-x))
    dl/dx = w a,  a = (1 - y) s - p y (1 - s)
    dl/dy = w b,  b = p softplus(-x) - softplus(x)
    da/dx = (1 - y + p y) s (1 - s)      da/dy = db/dx = -(s + p (1 - s))      db/dy = 0

and "mean" divides by the number of elements. The second op may add weight_decay / 2 * ||W||^2 to the reduced loss, W
being the matrix of the linear map, and so weight_decay * W to the gradient of W. (Bishop, Pattern Recognition and
Machine Learning, 2006, section 4.3.2; the penalty: section 3.1.4.)
"""

from typing import Any

import torch
from torch import Tensor

from torch_mlp.ops.fake import register_fake
from torch_mlp.ops.linear_act import backward as linear_backward
from torch_mlp.ops.linear_act import forward_op as linear_op
from torch_mlp.ops.linear_act import only_needed
from torch_mlp.ops.transforms import in_transform, is_composed

forward_op = torch.ops.torch_mlp.binary_cross_entropy_with_logits.default
backward_op = torch.ops.torch_mlp._binary_cross_entropy_with_logits_backward.default


@register_fake("torch_mlp::binary_cross_entropy_with_logits")
def _(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str) -> Tensor:
    return input.new_empty(input.shape if reduction == "none" else ())


@register_fake("torch_mlp::_binary_cross_entropy_with_logits_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    needs_grad_input: bool,
    needs_grad_target: bool,
) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(input.shape if needs_grad_input else 0),
        input.new_empty(input.shape if needs_grad_target else 0),
    )


def reference(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    """The op composed of ATen calls."""
    return torch.nn.functional.binary_cross_entropy_with_logits(
        input, target, weight, pos_weight=pos_weight, reduction=reduction
    )


def _factor(input: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """By what a and b are multiplied, but for the incoming gradient, in the dtype of computation."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    factor = input.new_ones((), dtype=dtype) if weight is None else weight.to(dtype)
    return factor / input.numel() if reduction == "mean" and input.numel() else factor


def _derivatives(
    input: Tensor, target: Tensor, pos_weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, da/dx and da/dy = db/dx."""
    x, y = input.to(dtype), target.to(dtype)
    p = x.new_ones(()) if pos_weight is None else pos_weight.to(dtype)
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    positive, negative = p * y, 1 - y
    log_sigmoid = torch.nn.functional.logsigmoid
    b = -x if pos_weight is None else log_sigmoid(-x) - p * log_sigmoid(x)
    return negative * s - positive * rest, b, (negative + positive) * s * rest, -(s + p * rest)


def reference_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    needs_grad_input: bool,
    needs_grad_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward op composed of ATen calls; None for gradients that are not needed."""
    factor = _factor(input, weight, reduction)
    a, b, _, _ = _derivatives(input, target, pos_weight, factor.dtype)
    scale = grad_output.to(factor.dtype) * factor
    return (
        (scale * a).to(input.dtype) if needs_grad_input else None,
        (scale * b).to(input.dtype) if needs_grad_target else None,
    )


class BinaryCrossEntropyBackward(torch.autograd.Function):
    """The backward pass as a differentiable function of its own, so that double backward works."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        reduction: str,
        *needs_grad: bool,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of input and target; None for one not needed."""
        ctx.save_for_backward(grad_output, input, target, weight, pos_weight)
        ctx.reduction = reduction
        ctx.set_materialize_grads(False)
        grads = backward_op(grad_output, input, target, weight, pos_weight, reduction, *needs_grad)
        return only_needed(grads, needs_grad)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of grad_output g, input and target.

        With u, v the gradients that come in for g f a and g f b, f being the factor, the pass computes
        <u, g f a> + <v, g f b>.
        """
        grad_output, input, target, weight, pos_weight = ctx.saved_tensors
        if all(grad is None for grad in grad_grads):
            return (None,) * 8
        factor = _factor(input, weight, ctx.reduction)
        a, b, a_by_x, a_by_y = _derivatives(input, target, pos_weight, factor.dtype)
        u, v = (factor.new_zeros(()) if grad is None else grad.to(factor.dtype) for grad in grad_grads)
        scale = grad_output.to(factor.dtype) * factor
        by_grad_output = factor * (u * a + v * b)
        grads = (
            by_grad_output if grad_output.shape == input.shape else by_grad_output.sum(),
            scale * (u * a_by_x + v * a_by_y),
            scale * u * a_by_y,
        )
        needed = only_needed(grads, ctx.needs_input_grad[:3])
        return *(None if grad is None else grad.to(input.dtype) for grad in needed), *(None,) * 5


def backward(grad_output: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """The backward pass; only where its result is to be differentiated again need its computation be recorded."""
    if torch.is_grad_enabled() or in_transform():
        return (reference_backward if in_transform() else BinaryCrossEntropyBackward.apply)(grad_output, *saved)
    grad_input, grad_target = backward_op(grad_output, *saved)
    # As only_needed, which takes as long as the op on a few logits.
    return grad_input if saved[-2] else None, grad_target if saved[-1] else None


class BinaryCrossEntropy(torch.autograd.Function):
    """The fused forward pass; its backward pass is BinaryCrossEntropyBackward."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
    ) -> Tensor:
        """Loss of the shape of input for reduction "none", else ()."""
        ctx.save_for_backward(input, target, weight, pos_weight)
        ctx.reduction = reduction
        return forward_op(input, target, weight, pos_weight, reduction)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input and target, each only where it is needed."""
        return *backward(grad_output, *ctx.saved_tensors, ctx.reduction, *ctx.needs_input_grad[:2]), None, None, None


def add_l2_penalty(loss: Tensor, linear_weight: Tensor, weight_decay: float) -> Tensor:
    """loss + weight_decay / 2 * ||W||^2, the squares of dtypes of 16 bits in float32, where none overflows."""
    if not weight_decay:
        return loss
    dtype = torch.float64 if linear_weight.dtype == torch.float64 else torch.float32
    total = loss + weight_decay / 2 * linear_weight.to(dtype).square().sum()
    # Not .to alone, which returns total itself where there is nothing to do: of what is returned so from the forward
    # pass of an autograd.Function, torch.compile of torch 2.11 takes the gradient to be 0.
    return total if total.dtype == loss.dtype else total.to(loss.dtype)


class LinearBinaryCrossEntropy(torch.autograd.Function):
    """The loss of the logits of a linear map, with the penalty of its matrix: loss, then the logits.

    The logits are an output of the node, although nobody sees them: the backward pass can then be differentiated again,
    for what it saves is part of the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        reduction: str,
        weight_decay: float,
    ) -> tuple[Tensor, Tensor]:
        """Loss of the shape of target for reduction "none", else (); the logits (*, out_features)."""
        logits = linear_op(input, linear_weight, linear_bias, "identity")
        loss = forward_op(logits.view(target.shape), target, weight, pos_weight, reduction)
        loss = add_l2_penalty(loss, linear_weight, weight_decay)
        ctx.save_for_backward(input, linear_weight, logits, target, weight, pos_weight)
        ctx.reduction, ctx.weight_decay = reduction, weight_decay
        ctx.set_materialize_grads(False)
        return loss, logits

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias of the linear map, and target, each only where it is needed."""
        input, linear_weight, logits, *saved = ctx.saved_tensors
        target, needs_linear = saved[0], ctx.needs_input_grad[:3]
        grad_target = None
        if grad_loss is not None:
            by_logits, grad_target = backward(
                grad_loss,
                logits.view(target.shape),
                *saved,
                ctx.reduction,
                any(needs_linear),
                ctx.needs_input_grad[3],
            )
            if by_logits is not None:
                by_logits = by_logits.view(logits.shape)
                grad_logits = by_logits if grad_logits is None else grad_logits + by_logits
        if grad_logits is None:
            return None, None, None, grad_target, *(None,) * 4
        by_input, by_weight, by_bias = linear_backward(
            grad_logits, input, linear_weight, logits, "identity", needs_linear
        )
        if ctx.weight_decay and by_weight is not None and grad_loss is not None:
            by_weight = torch.addcmul(by_weight, grad_loss, linear_weight, value=ctx.weight_decay)
        return by_input, by_weight, by_bias, grad_target, *(None,) * 4


def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    """The one entry: the reference inside functional transforms and of DTensors, else the fused op."""
    if is_composed(input):
        return reference(input, target, weight, pos_weight, reduction)
    return BinaryCrossEntropy.apply(input, target, weight, pos_weight, reduction)


def linear_binary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    weight_decay: float,
) -> Tensor:
    """The one entry of the loss with its linear map."""
    if is_composed(input):
        logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
        loss = reference(logits.reshape(target.shape), target, weight, pos_weight, reduction)
        return add_l2_penalty(loss, linear_weight, weight_decay)
    return LinearBinaryCrossEntropy.apply(
        input, linear_weight, linear_bias, target, weight, pos_weight, reduction, weight_decay
    )[0]
