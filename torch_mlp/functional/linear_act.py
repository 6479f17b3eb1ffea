"""A linear map and its activation."""

from torch import Tensor

from torch_mlp import ops
from torch_mlp.functional.arguments import autocast, is_autocasting
from torch_mlp.ops import ACTIVATIONS


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "sigmoid") -> Tensor:
    r"""Apply a linear map and an activation in one op: ``activation(input @ weight.T + bias)``.

    Stands for ``torch.sigmoid(torch.nn.functional.linear(input, weight, bias))`` and the like. The backward pass needs
    the output, not the pre-activation, so the latter is never stored.

    Args:
        input: the values to map.
        weight: the matrix of the linear map.
        bias: added to every row of the product, if given.
        activation: "identity", "sigmoid", "tanh", "relu" (whose derivative at 0 is 0, as in torch) or "step": 1 where
            the product is 0 or more, 0 where it is less. Step has no gradient, as it is constant but for a jump.

    Shape:
        - input: :math:`(*, in\_features)`, any leading dimensions, float64, float32, bfloat16 or float16
        - weight: :math:`(out\_features, in\_features)`, of the dtype and device of input
        - bias: :math:`(out\_features)`, of the dtype and device of input

    Returns:
        A tensor of shape :math:`(*, out\_features)`, of the dtype of input. 16-bit dtypes are accumulated in float32.

    Raises:
        ValueError: if the activation is not known.
        RuntimeError: if a shape, dtype or device does not fit, or from ``backward`` through step.

    Example:
        >>> import torch
        >>> input, weight, bias = torch.randn(64, 784), torch.randn(512, 784), torch.randn(512)
        >>> linear_act(input, weight, bias, "tanh").shape
        torch.Size([64, 512])
        >>> linear_act(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.ones(1, 2), torch.tensor([-1.5]), "step")  # and
        tensor([[0.],
                [1.]])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 5.1.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear_act: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if is_autocasting(input):
        input, weight, bias = autocast(None, input, weight, bias)
    return ops.linear_act(input, weight, bias, activation)


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map and the sigmoid in one op: :func:`linear_act` with ``activation="sigmoid"``.

    Example:
        >>> import torch
        >>> linear_sigmoid(torch.zeros(1, 3), torch.ones(2, 3))
        tensor([[0.5000, 0.5000]])
    """
    return linear_act(input, weight, bias, "sigmoid")
