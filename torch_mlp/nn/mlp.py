"""The multilayer perceptron."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from torch_mlp import functional
from torch_mlp.functional.arguments import check_tensors
from torch_mlp.nn.linear import LinearAct, has_hooks

# What the outputs stand for, and the loss of outputs and targets that goes with it.
HEADS: dict[str, Callable[..., Tensor]] = {
    "regression": torch.nn.functional.mse_loss,
    "binary": functional.binary_cross_entropy_with_logits,
    "multiclass": functional.cross_entropy,
}


class MLP(torch.nn.Module):
    r"""A multilayer perceptron: fused hidden layers, then a linear layer, and a head that says what its outputs mean.

    With hidden layers of widths h1, h2, ... it computes ``h = activation(x @ W1.T + b1)``, the same again for each
    further layer, and ``z = h @ W.T + b``. Calling the model gives z whatever the head; :meth:`loss`,
    :meth:`predict_proba` and :meth:`predict` go by it:

    - "regression": z is the prediction, its loss the squared error;
    - "binary": each output is a yes or no of its own, with probability sigmoid(z) and binary cross-entropy as loss; one
      output for two classes, several for labels of which any number may be right;
    - "multiclass": the outputs are classes of which one is right, with probabilities softmax(z) and cross-entropy.

    The state_dict has the keys of ``torch.nn.Sequential(Linear, Sigmoid, Linear, ...)``, in which the activations take
    a place but have no parameters: "0.weight", "0.bias", "2.weight", ... Checkpoints move both ways.

    Args:
        in_features: number of inputs.
        hidden_features: width of each hidden layer; one int for one layer, an empty sequence for none (softmax
            regression).
        out_features: number of outputs; for "multiclass" one for each class.
        activation: of the hidden layers: "identity", "sigmoid", "tanh", "relu" or "step", which has no gradient: for
            networks whose weights are chosen by hand.
        bias: whether the layers have biases.
        device: device of the parameters.
        dtype: dtype of the parameters.
        head: "regression", "binary" or "multiclass".

    Shape:
        - input: :math:`(*, in\_features)`
        - output: :math:`(*, out\_features)`, logits or, for "regression", predictions

    Raises:
        ValueError: if the activation or the head is not known or a width is not positive.

    Example:
        >>> model = MLP(2, [1024, 512], 3)
        >>> model.num_parameters()
        529411
        >>> model
        MLP(
          head=multiclass
          (0): LinearAct(in_features=2, out_features=1024, bias=True, activation=sigmoid)
          (2): LinearAct(in_features=1024, out_features=512, bias=True, activation=sigmoid)
          (4): LinearAct(in_features=512, out_features=3, bias=True, activation=identity)
        )

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, sections 5.1 and 5.2.
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
        head: str = "multiclass",
    ) -> None:
        super().__init__()
        hidden = list(hidden_features) if isinstance(hidden_features, Iterable) else [hidden_features]
        widths = [in_features, *hidden, out_features]
        if any(width < 1 for width in widths):
            raise ValueError(f"MLP: expected every layer to have at least 1 feature, got {widths}")
        if activation not in functional.ACTIVATIONS:
            names = ", ".join(functional.ACTIVATIONS)
            raise ValueError(f"MLP: expected activation to be one of {names}, got {activation!r}")
        if head not in HEADS:
            raise ValueError(f"MLP: expected head to be one of {', '.join(HEADS)}, got {head!r}")
        activations = [activation] * len(hidden) + ["identity"]
        for place, ((ins, outs), act) in enumerate(zip(pairwise(widths), activations, strict=True)):
            self.add_module(str(2 * place), LinearAct(ins, outs, bias, device, dtype, act))
        self.in_features = in_features
        self.hidden_features = tuple(hidden)
        self.out_features = out_features
        self.activation = activation
        self.head = head

    def forward(self, input: Tensor) -> Tensor:
        """The output before the head, of shape (*, out_features), of input of shape (*, in_features)."""
        if (parameters := self._plain_parameters()) is not None:
            return functional.mlp(input, *parameters, self.activation)
        for layer in self.children():
            input = layer(input)
        return input

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        r"""The loss that belongs to the head, a mean unless the options say otherwise.

        For "multiclass" network and loss are one op: the fastest step there is with autograd.

        Args:
            input: :math:`(N, in\_features)`; for "regression" and "binary" any leading dimensions.
            target: for "multiclass" the class of each row, :math:`(N)`; otherwise :math:`(*, out\_features)`, or
                :math:`(*)` where there is one output. For "binary" 0 or 1, or the probability of 1. Integers will do.
            options: those of :func:`torch.nn.functional.mse_loss`,
                :func:`torch_mlp.functional.binary_cross_entropy_with_logits` or
                :func:`torch_mlp.functional.cross_entropy`, such as ``reduction``; "none" gives a loss for each target.

        Raises:
            TypeError: if input or target is no tensor.
            ValueError: if the shape of target does not fit; and the errors of these functions.

        Example:
            >>> MLP(784, [512], 10).loss(torch.rand(64, 784), torch.randint(10, (64,))).backward()
            >>> MLP(784, [512], 1, head="binary").loss(torch.rand(64, 784), torch.randint(2, (64,))).backward()
        """
        if self.head == "multiclass":
            # Hooks of the model itself, as those with which FSDP fetches its parameters, run where it is called.
            if not has_hooks(self) and (parameters := self._plain_parameters()) is not None:
                return functional.mlp_cross_entropy(input, *parameters, target, self.activation, **options)
            return functional.cross_entropy(self(input), target, **options)
        check_tensors("MLP.loss", input=input, target=target)
        # Broadcasting would make a loss of N * N pairs of outputs (N, 1) and targets (N).
        rows, outs = input.shape[:-1], self.out_features
        if target.shape != (*rows, outs) and not (outs == 1 and target.shape == rows):
            raise ValueError(f"MLP.loss: expected target of shape {(*rows, outs)}, got {tuple(target.shape)}")
        output = self(input)
        if target.dim() < output.dim():
            output = output.squeeze(-1)
        if not target.is_floating_point():
            target = target.to(output.dtype)
        return HEADS[self.head](output, target, **options)

    def _plain_parameters(self) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Weights and biases, where calling the layers one by one would do no more than multiply by them."""
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for layer in self.children():
            is_last = len(weights) == len(self.hidden_features)
            if (
                type(layer) is not LinearAct
                or layer.activation != ("identity" if is_last else self.activation)
                or has_hooks(layer)
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
        r"""Probabilities: of each class, or for "binary" that each output is 1.

        Shape:
            - input: :math:`(*, in\_features)`
            - output: :math:`(*, out\_features)`, for "binary" with one output :math:`(*)`

        Raises:
            ValueError: if the head is "regression".

        Example:
            >>> MLP(784, [512], 10).predict_proba(torch.rand(64, 784)).sum(-1).allclose(torch.ones(64))
            True
            >>> MLP(784, [512], 1, head="binary").predict_proba(torch.rand(64, 784)).shape
            torch.Size([64])
        """
        if self.head == "multiclass":
            return torch.softmax(self(input), dim=-1)
        if self.head == "binary":
            return torch.sigmoid(self._without_single_output(self(input)))
        raise ValueError(
            "MLP.predict_proba: expected a head that gives probabilities, binary or multiclass, got "
            f"{self.head}; use predict"
        )

    @torch.no_grad()
    def predict(self, input: Tensor) -> Tensor:
        r"""The most probable class of each sample, for "binary" 0 or 1 for each output, for "regression" the outputs.

        Shape:
            - input: :math:`(*, in\_features)`
            - output: :math:`(*)`, int64, for "multiclass"; otherwise :math:`(*, out\_features)`, or :math:`(*)` where
              there is one output, int64 for "binary"

        Example:
            >>> MLP(784, [512], 10).predict(torch.rand(64, 784)).shape
            torch.Size([64])
            >>> MLP(784, [512], 28, head="binary").predict(torch.rand(64, 784)).shape
            torch.Size([64, 28])
        """
        output = self(input)
        if self.head == "multiclass":
            return output.argmax(dim=-1)
        output = self._without_single_output(output)
        return (output >= 0).long() if self.head == "binary" else output  # sigmoid(0) = 1/2

    def _without_single_output(self, output: Tensor) -> Tensor:
        return output.squeeze(-1) if self.out_features == 1 else output

    def num_parameters(self) -> int:
        """Number of parameters of the model, weights and biases.

        Example:
            >>> MLP(784, [512], 10).num_parameters()
            407050
        """
        return sum(parameter.numel() for parameter in self.parameters())

    def extra_repr(self) -> str:
        """What the layers do not show."""
        return f"head={self.head}"
