"""The op ``linear_act``: output = activation(input @ weight.T + bias).

With z = x W^T + b, y = act(z) and an incoming gradient gy:

    gz = gy * act'(z)      gx = gz W      gW = gz^T x      gb = sum of gz over the batch

act'(z) is expressed through y, so the backward pass keeps x, W and y, never z. (Bishop, Pattern Recognition and Machine
Learning, 2006, section 5.3.)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from torch_mlp.ops.fake import register_fake
from torch_mlp.ops.transforms import in_transform, is_composed

forward_op = torch.ops.torch_mlp.linear_act.default
backward_op = torch.ops.torch_mlp._linear_act_backward.default


class Activation(NamedTuple):
    """An activation in ATen calls: what csrc/activation.h computes, and the second derivative it does not need."""

    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor] | None  # dy/dz, as a function of y; None where descent has no use for it
    curvature: Callable[[Tensor], Tensor] | None  # d(dy/dz)/dy, as a function of y


def _refuse_gradient(*_: Any) -> NoReturn:
    """The sentence is also in csrc/activation.h."""
    raise RuntimeError(
        "linear_act: expected an activation with a derivative, got step, which is constant but for a jump at 0: its "
        "derivative is 0 wherever it has one, so that gradient descent cannot use it; use sigmoid, tanh or relu"
    )


class Step(torch.autograd.Function):
    """1 where z >= 0, 0 where z < 0, NaN where z is; asked for a derivative of any mode, it says why there is none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        """Of a function that torch cannot differentiate either, for a compiler inlines it and never gets to jvp."""
        return torch.where(z.isnan(), z, torch.heaviside(z, z.new_ones(())))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        """Refused, as is the derivative in forward mode."""
        _refuse_gradient()

    jvp = backward


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda z: z, torch.ones_like, torch.zeros_like),
    "sigmoid": Activation(torch.sigmoid, lambda y: y * (1 - y), lambda y: 1 - 2 * y),
    "tanh": Activation(torch.tanh, lambda y: 1 - y * y, lambda y: -2 * y),
    "relu": Activation(torch.relu, lambda y: (y > 0).to(y.dtype), torch.zeros_like),
    "step": Activation(Step.apply, None, None),
}


def _derivatives(activation: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The derivative and the curvature; of an activation without them, what says so when it is called."""
    _, derivative, curvature = ACTIVATIONS[activation]
    return derivative or _refuse_gradient, curvature or _refuse_gradient


@register_fake("torch_mlp::linear_act")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@register_fake("torch_mlp::_linear_act_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    activation: str,
    needs_grad_input: bool,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if needs_grad_input else 0),
        input.new_empty(weight.shape if needs_grad_weight else 0),
        input.new_empty(weight.shape[0] if needs_grad_bias else 0),
    )


def reference(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The op composed of ATen calls."""
    return ACTIVATIONS[activation].forward(torch.nn.functional.linear(input, weight, bias))


def _as_matrix(self: Tensor) -> Tensor:
    return self.reshape(math.prod(self.shape[:-1]), self.shape[-1])


def reference_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    activation: str,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The backward op composed of ATen calls; None for gradients that are not needed."""
    grad_z = grad_output * _derivatives(activation)[0](output)
    return (
        grad_z @ weight if needs_grad[0] else None,
        _as_matrix(grad_z).mT @ _as_matrix(input) if needs_grad[1] else None,
        _as_matrix(grad_z).sum(0) if needs_grad[2] else None,
    )


def only_needed(grads: Sequence[Tensor], needs_grad: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """None in place of gradients that are not needed, which an op gives as empty tensors."""
    return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True))


class LinearActBackward(torch.autograd.Function):
    """The backward pass as a differentiable function of its own, so that double backward works."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        output: Tensor,
        activation: str,
        needs_grad: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias; None for those not needed."""
        ctx.save_for_backward(grad_output, input, weight, output)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return only_needed(backward_op(grad_output, input, weight, output, activation, *needs_grad), needs_grad)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of grad_output, input, weight and output.

        With u, V, t the gradients that come in for gx, gW and gb, the pass computes <u, gz W> + <V, gz^T x> + <t, gb>,
        whose derivative by gz is v = u W^T + x V^T + t.
        """
        grad_grad_input, grad_grad_weight, grad_grad_bias = grad_grads
        grad_output, input, weight, output = ctx.saved_tensors
        derivative_at, curvature_at = _derivatives(ctx.activation)
        if all(grad is None for grad in grad_grads):
            return (None,) * 6
        derivative = derivative_at(output)
        grad_z = grad_output * derivative

        grad_grad_z = torch.zeros_like(grad_z)
        grad_of_input = grad_of_weight = grad_of_output = None
        if grad_grad_input is not None:
            grad_grad_z = grad_grad_z + torch.nn.functional.linear(grad_grad_input, weight)
            if ctx.needs_input_grad[2]:
                grad_of_weight = _as_matrix(grad_z).mT @ _as_matrix(grad_grad_input)
        if grad_grad_weight is not None:
            grad_grad_z = grad_grad_z + torch.nn.functional.linear(input, grad_grad_weight)
            if ctx.needs_input_grad[1]:
                grad_of_input = grad_z @ grad_grad_weight
        if grad_grad_bias is not None:
            grad_grad_z = grad_grad_z + grad_grad_bias
        if ctx.needs_input_grad[3]:
            grad_of_output = grad_grad_z * grad_output * curvature_at(output)
        return grad_grad_z * derivative, grad_of_input, grad_of_weight, grad_of_output, None, None


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    activation: str,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The backward pass; only where its result is to be differentiated again need its computation be recorded."""
    if torch.is_grad_enabled() or in_transform():
        differentiable = reference_backward if in_transform() else LinearActBackward.apply
        return differentiable(grad_output, input, weight, output, activation, needs_grad)
    grads = backward_op(grad_output, input, weight, output, activation, *needs_grad)
    return grads if all(needs_grad) else only_needed(grads, needs_grad)


class LinearAct(torch.autograd.Function):
    """The fused forward pass; its backward pass is LinearActBackward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """Output of shape (*, out_features)."""
        output = forward_op(input, weight, bias, activation)
        ctx.save_for_backward(input, weight, output)
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias, each only where it is needed."""
        input, weight, output = ctx.saved_tensors
        return *backward(grad_output, input, weight, output, ctx.activation, ctx.needs_input_grad[:3]), None


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The one entry: the reference inside functional transforms and of DTensors, else the fused op."""
    if is_composed(input):
        return reference(input, weight, bias, activation)
    return LinearAct.apply(input, weight, bias, activation)
