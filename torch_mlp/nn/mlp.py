"""The multilayer perceptron."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from torch_mlp import functional
from torch_mlp.nn.linear import LinearAct


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class MLP(torch.nn.Module):
    r"""A multilayer perceptron: fused hidden layers, then a linear layer that gives logits.

    With hidden layers of widths h1, h2, ... it computes ``h = activation(x @ W1.T + b1)``, the same again for each
    further layer, and ``logits = h @ W.T + b``.

    The state_dict has the keys of ``torch.nn.Sequential(Linear, Sigmoid, Linear, ...)``, in which the activations take
    a place but have no parameters: "0.weight", "0.bias", "2.weight", ... Checkpoints move both ways.

    Args:
        in_features: number of inputs.
        hidden_features: width of each hidden layer; one int for one layer, an empty sequence for none (softmax
            regression).
        out_features: number of outputs, one for each class.
        activation: of the hidden layers: "identity", "sigmoid", "tanh", "relu" or "step", which has no gradient: for
            networks whose weights are chosen by hand.
        bias: whether the layers have biases.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: :math:`(*, in\_features)`
        - output: :math:`(*, out\_features)`, logits

    Raises:
        ValueError: if the activation is not known or a width is not positive.

    Example:
        >>> model = MLP(2, [1024, 512], 3)
        >>> model.num_parameters()
        529411
        >>> model
        MLP(
          (0): LinearAct(in_features=2, out_features=1024, bias=True, activation=sigmoid)
          (2): LinearAct(in_features=1024, out_features=512, bias=True, activation=sigmoid)
          (4): LinearAct(in_features=512, out_features=3, bias=True, activation=identity)
        )

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 5.1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int,
        activation: str = "sigmoid",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = list(hidden_features) if isinstance(hidden_features, Iterable) else [hidden_features]
        widths = [in_features, *hidden, out_features]
        if any(width < 1 for width in widths):
            raise ValueError(f"MLP: expected every layer to have at least 1 feature, got {widths}")
        if activation not in functional.ACTIVATIONS:
            names = ", ".join(functional.ACTIVATIONS)
            raise ValueError(f"MLP: expected activation to be one of {names}, got {activation!r}")
        activations = [activation] * len(hidden) + ["identity"]
        for place, ((ins, outs), act) in enumerate(zip(pairwise(widths), activations, strict=True)):
            self.add_module(str(2 * place), LinearAct(ins, outs, bias, device, dtype, act))
        self.in_features = in_features
        self.hidden_features = tuple(hidden)
        self.out_features = out_features
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Logits of shape (*, out_features) of input of shape (*, in_features)."""
        if (parameters := self._plain_parameters()) is not None:
            return functional.mlp(input, *parameters, self.activation)
        for layer in self.children():
            input = layer(input)
        return input

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        r"""Softmax cross-entropy of the logits, network and loss being one op: the fastest step there is with autograd.

        Args:
            input: :math:`(N, in\_features)`.
            target: the class of each row, :math:`(N)`.
            options: ``weight``, ``ignore_index``, ``reduction``, ``label_smoothing`` of
                :func:`torch_mlp.functional.cross_entropy`.

        Example:
            >>> MLP(784, [512], 10).loss(torch.rand(64, 784), torch.randint(10, (64,))).backward()
        """
        # Hooks of the model itself, as those with which FSDP fetches its parameters, run where it is called.
        if not _has_hooks(self) and (parameters := self._plain_parameters()) is not None:
            return functional.mlp_cross_entropy(input, *parameters, target, self.activation, **options)
        return functional.cross_entropy(self(input), target, **options)

    def _plain_parameters(self) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Weights and biases, where calling the layers one by one would do no more than multiply by them."""
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for layer in self.children():
            is_last = len(weights) == len(self.hidden_features)
            if (
                type(layer) is not LinearAct
                or layer.activation != ("identity" if is_last else self.activation)
                or _has_hooks(layer)
            ):
                return None
            weights.append(layer.weight)
            biases.append(layer.bias)
        return None if _has_any_global_hook() else (weights, biases)

    def init_gaussian_(self, std: float = 0.1, generator: torch.Generator | None = None) -> "MLP":
        """Draw every weight from a Gaussian of mean 0 and the given standard deviation, and set every bias to 0.

        The initialisation of the lecture; without this call the layers have that of :class:`torch.nn.Linear`. Returns
        the model, so that ``MLP(784, 512, 10).init_gaussian_()`` works.

        Example:
            >>> model = MLP(784, 512, 10).init_gaussian_(std=0.05)
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
            else:
                torch.nn.init.normal_(parameter, std=std, generator=generator)
        return self

    @torch.no_grad()
    def predict_proba(self, input: Tensor) -> Tensor:
        r"""Class probabilities, the softmax of the logits: :math:`(*, in\_features)` to :math:`(*, out\_features)`.

        Example:
            >>> MLP(784, [512], 10).predict_proba(torch.rand(64, 784)).sum(-1).allclose(torch.ones(64))
            True
        """
        return torch.softmax(self(input), dim=-1)

    @torch.no_grad()
    def predict(self, input: Tensor) -> Tensor:
        r"""The most probable class of each sample: :math:`(*, in\_features)` to :math:`(*)`, int64.

        Example:
            >>> MLP(784, [512], 10).predict(torch.rand(64, 784)).shape
            torch.Size([64])
        """
        return self(input).argmax(dim=-1)

    def num_parameters(self) -> int:
        """Number of parameters of the model, weights and biases.

        Example:
            >>> MLP(784, [512], 10).num_parameters()
            407050
        """
        return sum(parameter.numel() for parameter in self.parameters())
