"""The ops ``mlp`` and ``mlp_cross_entropy``: all layers of a multilayer perceptron, and its loss, as one autograd node.

A layer is h_l = act(h_{l-1} W_l^T + b_l), the last one without activation; backwards each layer's pass (linear_act.py)
takes what the one above it gives. The outputs of the hidden layers are outputs of the node too, although nobody sees
them: the backward pass can then be differentiated again, for what it saves is part of the graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mlp.ops.cross_entropy import backward as cross_entropy_backward
from torch_mlp.ops.cross_entropy import forward_op as cross_entropy_op
from torch_mlp.ops.cross_entropy import reference as cross_entropy_reference
from torch_mlp.ops.fake import register_fake
from torch_mlp.ops.linear_act import LinearActBackward, only_needed
from torch_mlp.ops.linear_act import reference as linear_act_reference
from torch_mlp.ops.linear_act import reference_backward as linear_act_reference_backward
from torch_mlp.ops.transforms import in_transform, is_composed

forward_op = torch.ops.torch_mlp.mlp.default
backward_op = torch.ops.torch_mlp._mlp_backward.default

Parameters = tuple[Any, ...]  # weight, bias or None, weight, bias or None, ...


@register_fake("torch_mlp::mlp")
def _(input: Tensor, weights: list[Tensor], biases: list[Tensor | None], activation: str) -> list[Tensor]:
    return [input.new_empty((*input.shape[:-1], weight.shape[0])) for weight in weights]


@register_fake("torch_mlp::_mlp_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    activation: str,
    needs_grad: list[int],
) -> list[Tensor]:
    shapes = [input.shape, *(shape for weight in weights for shape in (weight.shape, weight.shape[:1]))]
    return [input.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs_grad, strict=True)]


def reference(input: Tensor, parameters: Parameters, activation: str) -> Tensor:
    """The op composed of ATen calls: the logits."""
    layers = len(parameters) // 2
    for layer in range(layers):
        name = "identity" if layer == layers - 1 else activation
        input = linear_act_reference(input, parameters[2 * layer], parameters[2 * layer + 1], name)
    return input


def _backward_by_layers(
    grad_outputs: tuple[Tensor | None, ...],
    input: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    activation: str,
    needs_grad: tuple[bool, ...],
) -> list[Tensor | None]:
    """The backward op layer by layer, differentiable; a gradient may come in for every layer's output."""
    grads: list[Tensor | None] = [None] * len(needs_grad)
    backward = linear_act_reference_backward if in_transform() else LinearActBackward.apply
    grad = None
    for layer in reversed(range(len(weights))):
        incoming = grad_outputs[layer]
        grad = incoming if grad is None else grad if incoming is None else grad + incoming
        needs = (any(needs_grad[: 1 + 2 * layer]), *needs_grad[1 + 2 * layer : 3 + 2 * layer])
        if grad is not None:
            name = "identity" if layer == len(weights) - 1 else activation
            below = outputs[layer - 1] if layer else input
            grad, *grads[1 + 2 * layer : 3 + 2 * layer] = backward(
                grad, below, weights[layer], outputs[layer], name, needs
            )
        if not needs[0]:
            return grads
    grads[0] = grad
    return grads


@torch.library.impl("torch_mlp::_mlp_backward", "Batched")
def _(
    grad_output: Tensor,
    input: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    activation: str,
    needs_grad: list[int],
) -> list[Tensor]:
    """Of many grad_outputs at once, for torch.autograd.grad(is_grads_batched=True): torch cannot batch lists itself."""
    incoming = (*[None] * (len(weights) - 1), grad_output)
    needed = tuple(map(bool, needs_grad))
    grads = _backward_by_layers(incoming, input, weights, outputs, activation, needed)
    return [input.new_empty(0) if grad is None else grad for grad in grads]


class MLP(torch.autograd.Function):
    """The forward pass: logits, then the outputs of the hidden layers."""

    @staticmethod
    def forward(ctx: Any, activation: str, input: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """The output of every layer, (*, outs)."""
        outputs = forward_op(input, parameters[::2], parameters[1::2], activation)
        ctx.save_for_backward(input, *parameters[::2], *outputs)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of input and parameters, each only where it is needed."""
        input, *saved = ctx.saved_tensors
        weights, outputs = saved[: len(grad_outputs)], saved[len(grad_outputs) :]
        return None, *_backward(grad_outputs, input, weights, outputs, ctx.activation, ctx.needs_input_grad[1:])


def _backward(
    grad_outputs: tuple[Tensor | None, ...],
    input: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    activation: str,
    needs_grad: tuple[bool, ...],
) -> Sequence[Tensor | None]:
    """By the op, unless the gradients are to be differentiated again or come in for hidden layers too."""
    *hidden, last = grad_outputs
    if torch.is_grad_enabled() or in_transform() or last is None or any(grad is not None for grad in hidden):
        return _backward_by_layers(grad_outputs, input, weights, outputs, activation, needs_grad)
    grads = backward_op(last, input, weights, outputs, activation, [int(needed) for needed in needs_grad])
    return only_needed(grads, needs_grad)


class MLPCrossEntropy(torch.autograd.Function):
    """The forward pass with the loss: loss, then the output of every layer."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: str,
        options: tuple[str, int, float],
        target: Tensor,
        weight: Tensor | None,
        input: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Loss of shape (batch,) for reduction "none", else (); the outputs (batch, outs)."""
        outputs = forward_op(input, parameters[::2], parameters[1::2], activation)
        loss, lse, total_weight = cross_entropy_op(outputs[-1], target, weight, *options)
        ctx.save_for_backward(target, weight, lse, total_weight, input, *parameters[::2], *outputs)
        ctx.activation, ctx.options = activation, options
        ctx.set_materialize_grads(False)
        return loss, *outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of input and parameters, each only where it is needed."""
        target, weight, lse, total_weight, input, *saved = ctx.saved_tensors
        weights, outputs = saved[: len(grad_outputs)], saved[len(grad_outputs) :]
        *hidden, last = grad_outputs
        if grad_loss is not None:
            grad_logits = cross_entropy_backward(
                grad_loss, None, outputs[-1], target, weight, lse, total_weight, *ctx.options
            )
            last = grad_logits if last is None else last + grad_logits
        grads = _backward((*hidden, last), input, weights, outputs, ctx.activation, ctx.needs_input_grad[4:])
        return (None,) * 4 + tuple(grads)


def mlp(input: Tensor, parameters: Parameters, activation: str) -> Tensor:
    """The one entry: logits, by the reference inside functional transforms and of DTensors, else by the fused op."""
    if is_composed(input):
        return reference(input, parameters, activation)
    return MLP.apply(activation, input, *parameters)[-1]


def mlp_cross_entropy(
    input: Tensor,
    parameters: Parameters,
    target: Tensor,
    activation: str,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The one entry of the network with its loss."""
    if is_composed(input):
        logits = reference(input, parameters, activation)
        return cross_entropy_reference(logits, target, weight, reduction, ignore_index, label_smoothing)
    options = (reduction, ignore_index, label_smoothing)
    return MLPCrossEntropy.apply(activation, options, target, weight, input, *parameters)[0]
