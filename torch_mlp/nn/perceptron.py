"""Rosenblatt's perceptron and its learning rule."""

import math
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from torch_mlp.nn.labels import zero_one
from torch_mlp.nn.linear import LinearAct

_BLOCK = 128  # samples among which the next mistake is looked for at once


class NotSeparableWarning(UserWarning):
    """Perceptron.fit still made mistakes in its last epoch."""


class Perceptron(LinearAct):
    r"""The perceptron: 1 where w.x + b >= 0, else 0, with a learning rule that needs no gradient.

    A :class:`LinearAct` of one output and the activation step, whose parameters are 0 at first. The step has no
    gradient that could be descended, so :meth:`fit` learns from mistakes.

    Args:
        in_features: size of each input sample.
        bias: whether there is a bias b; without it the line goes through the origin.
        device: device of the parameters.
        dtype: dtype of the parameters: float64, float32, bfloat16 or float16.

    Shape:
        - input: :math:`(*, in\_features)`
        - output: :math:`(*, 1)`, 0 or 1

    Example:
        >>> input = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> model = Perceptron(2)
        >>> mistakes = model.fit(input, torch.tensor([0, 1, 1, 1]))  # OR
        >>> mistakes[-1], model.predict(input)
        (0, tensor([0, 1, 1, 1]))

    Source: Rosenblatt, The perceptron, 1958; Bishop, Pattern Recognition and Machine Learning, 2006, section 4.1.7.
    """

    def __init__(
        self,
        in_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, 1, bias, device, dtype, "step")

    def reset_parameters(self) -> None:
        """Set weights and bias to 0."""
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)

    @torch.no_grad()
    def predict(self, input: Tensor) -> Tensor:
        r"""The class of each sample, 0 or 1: :math:`(*, in\_features)` to :math:`(*)`, int64.

        Example:
            >>> Perceptron(2).predict(torch.rand(8, 2)).shape
            torch.Size([8])
        """
        return (self(input) > 0).squeeze(-1).long()

    def fit(
        self,
        input: Tensor,
        target: Tensor,
        *,
        lr: float = 1.0,
        max_epochs: int = 100,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> list[int]:
        r"""Learn from mistakes: for one sample after the other, w += lr (y - y_hat) x and b += lr (y - y_hat).

        Each epoch visits all samples in a new random order, and learning ends after one without a mistake. Where a line
        separates the classes it does end, after no more than (R / gamma)^2 mistakes from parameters of 0, R being the
        largest norm of a sample and gamma the smallest distance of one to the line, in the space in which the bias is
        the weight of a feature that is always 1 (Novikoff's theorem). Where none does, as for XOR, it never ends, and
        the parameters are those of the last mistake, not the best that there were: to keep the best is another
        algorithm (the pocket algorithm). A second call goes on from where the first one ended.

        Args:
            input: :math:`(N, in\_features)`, of the dtype and device of the parameters.
            target: the label of each sample, :math:`(N)` or :math:`(N, 1)`, all in {0, 1} or all in {-1, +1}, of any
                integer or floating-point dtype, or bool.
            lr: learning rate. From parameters of 0 it changes their scale only, and not the mistakes.
            max_epochs: epochs after which to give up.
            generator: the source of the random orders; None for torch's global one.
            progress: whether to show a progress bar, where there is a terminal; needs tqdm.

        Returns:
            The number of mistakes of each epoch; the last one is 0 where learning converged.

        Warns:
            NotSeparableWarning: if the last epoch still had mistakes.

        Raises:
            KeyboardInterrupt: after Ctrl-C; the parameters hold what was learned so far.
            RuntimeError: if the dtype or device of input does not fit.
            ValueError: if a shape or a label does not fit, input is not finite, or lr or max_epochs is not positive.

        Example:
            >>> Perceptron(4).fit(torch.eye(4), torch.tensor([+1, -1, -1, +1]))[-1]
            0
        """
        if not 0 < lr < math.inf or max_epochs < 1:
            raise ValueError(f"Perceptron.fit: expected lr and max_epochs above 0, got {lr} and {max_epochs}")
        if input.dim() != 2 or input.shape[1] != self.in_features:
            raise ValueError(
                f"Perceptron.fit: expected input of shape (N, {self.in_features}), got {tuple(input.shape)}"
            )
        if not input.isfinite().all():
            raise ValueError("Perceptron.fit: expected input to be finite, got a NaN or an infinity")
        target = zero_one("Perceptron.fit", target, input.shape[:1], self.weight.dtype)
        device = input.device if generator is None else generator.device
        mistakes: list[int] = []
        with _progress_bar(max_epochs) if progress else nullcontext() as bar:
            while len(mistakes) < max_epochs and mistakes[-1:] != [0]:
                order = torch.randperm(len(input), generator=generator, device=device).to(input.device)
                mistakes.append(self._learn(input, target, order, lr))
                if bar is not None:
                    bar.set_postfix(mistakes=mistakes[-1], refresh=False)
                    bar.update()
        if mistakes[-1]:
            warnings.warn(
                f"Perceptron.fit: {mistakes[-1]} of {len(input)} samples still mistaken in the last of "
                f"{max_epochs} epochs. Either no line separates the classes, as none does those of XOR, or it takes "
                "more epochs to find it.",
                NotSeparableWarning,
                stacklevel=2,
            )
        return mistakes

    @torch.no_grad()
    def _learn(self, input: Tensor, target: Tensor, order: Tensor, lr: float) -> int:
        """The mistakes of one epoch. Up to the next one nothing moves: it is looked for among many samples at once."""
        mistakes = 0
        for block in order.split(_BLOCK):
            samples, labels = input[block], target[block]
            while len(wrong := (errors := labels - self(samples).squeeze(1)).nonzero()):
                first = int(wrong[0])
                self.weight.add_(lr * errors[first] * samples[first])
                if self.bias is not None:
                    self.bias.add_(lr * errors[first])
                samples, labels = samples[first + 1 :], labels[first + 1 :]
                mistakes += 1
        return mistakes


def _progress_bar(epochs: int) -> Any:
    from tqdm import tqdm  # which the package does without otherwise

    return tqdm(total=epochs, desc="perceptron", unit=" epochs", disable=None)
