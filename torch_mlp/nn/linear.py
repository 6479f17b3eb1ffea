"""Fused linear layers."""

import torch
from torch import Tensor

from torch_mlp import functional


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling the module does more than its forward, such as to compute the weight of a pruned layer."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class LinearAct(torch.nn.Linear):
    r"""A linear layer and its activation in one op: ``activation(input @ weight.T + bias)``.

    A :class:`torch.nn.Linear` in everything but the activation: same parameters, initialisation and state_dict keys, so
    that checkpoints of ``Linear`` load here and the other way round.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has a bias.
        device: device of the parameters.
        dtype: dtype of the parameters: float64, float32, bfloat16 or float16.
        activation: "identity", "sigmoid", "tanh", "relu" or "step", which has no gradient.

    Shape:
        - input: :math:`(*, in\_features)`
        - output: :math:`(*, out\_features)`

    Raises:
        ValueError: if the activation is not known.

    Example:
        >>> layer = LinearAct(784, 512, activation="tanh")
        >>> layer
        LinearAct(in_features=784, out_features=512, bias=True, activation=tanh)
        >>> layer(torch.rand(64, 784)).shape
        torch.Size([64, 512])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 5.1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "sigmoid",
    ) -> None:
        if activation not in functional.ACTIVATIONS:
            names = ", ".join(functional.ACTIVATIONS)
            raise ValueError(f"{type(self).__name__}: expected activation to be one of {names}, got {activation!r}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Map input of shape (*, in_features) to (*, out_features)."""
        return functional.linear_act(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """The arguments of the layer, as torch prints them."""
        return f"{super().extra_repr()}, activation={self.activation}"


class LinearSigmoid(LinearAct):
    r"""A linear layer and the sigmoid in one op, with the signature of :class:`torch.nn.Linear`.

    Stands for ``torch.nn.Sequential(torch.nn.Linear(...), torch.nn.Sigmoid())``.

    Example:
        >>> LinearSigmoid(2, 1)
        LinearSigmoid(in_features=2, out_features=1, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, "sigmoid")

    def extra_repr(self) -> str:
        """The arguments of the layer, as torch prints those of Linear."""
        return torch.nn.Linear.extra_repr(self)
