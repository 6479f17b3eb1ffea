"""Logistic regression."""

import math

import torch
from torch import Tensor

from torch_mlp import functional
from torch_mlp.nn.labels import zero_one
from torch_mlp.nn.linear import has_hooks
from torch_mlp.ops.binary_cross_entropy import add_l2_penalty


class LogisticRegression(torch.nn.Linear):
    r"""Logistic regression: a linear layer of one output, whose sigmoid is the probability of the positive class.

    With a label y of -1 or +1, and w.x standing for w.x + b where there is a bias,

        p(y | x) = 1 / (1 + exp(-y w.x))

    so that the negative log-likelihood of the data, which maximum likelihood minimises, is the sum over the samples of
    log(1 + exp(-y w.x)). A Gaussian prior of the weights (maximum a posteriori, MAP) adds lambda / 2 ||w||^2 to it. On
    data that a line separates, the weights grow without bound unless there is one.

    The lecture's lambda is ``weight_decay`` where the loss is a sum (``reduction="sum"``). Where it is the mean over N
    samples, everything is divided by N: there ``weight_decay = lambda / N`` has the same minimum.

    A :class:`torch.nn.Linear` in all else: same parameters, initialisation and state_dict keys.

    Args:
        in_features: size of each input sample.
        bias: whether there is a bias b, which the prior leaves alone.
        weight_decay: the factor of the prior.
        device: device of the parameters.
        dtype: dtype of the parameters: float64, float32, bfloat16 or float16.

    Shape:
        - input: :math:`(*, in\_features)`
        - output: :math:`(*, 1)`, the logits w.x

    Raises:
        ValueError: if the weight decay is negative or not finite.

    Example:
        >>> input = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> target = torch.tensor([-1, -1, -1, +1])
        >>> model = LogisticRegression(2, weight_decay=0.01)
        >>> optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model.loss(input, target)
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> model.predict(input)
        tensor([0, 0, 0, 1])

    Formula: Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.2; of the prior, section 4.5.1.
    """

    def __init__(
        self,
        in_features: int,
        bias: bool = True,
        weight_decay: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 <= weight_decay < math.inf:
            raise ValueError(
                f"LogisticRegression: expected weight_decay to be finite and at least 0, got {weight_decay}"
            )
        super().__init__(in_features, 1, bias, device, dtype)
        self.weight_decay = weight_decay

    def forward(self, input: Tensor) -> Tensor:
        """Logits of shape (*, 1) of input of shape (*, in_features)."""
        return functional.linear_act(input, self.weight, self.bias, "identity")

    def loss(self, input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        r"""The mean or sum of log(1 + exp(-y w.x)), plus ``weight_decay / 2 ||w||^2``: one autograd node.

        Args:
            input: :math:`(*, in\_features)`.
            target: the label of each sample, :math:`(*)` or :math:`(*, 1)`, all in {0, 1} or all in {-1, +1}, of any
                integer or floating-point dtype, or bool. On a GPU looking at them waits for it; under torch.compile, in
                torch.func and on the meta device nobody looks, and any other label makes the loss NaN.
            reduction: "mean" or "sum"; also "none" where there is no weight decay.

        Raises:
            ValueError: if a label is another one, or a shape, the reduction or its weight decay does not fit.

        Example:
            >>> model = LogisticRegression(3)
            >>> model.loss(torch.randn(8, 3), torch.ones(8)).backward()
        """
        target = zero_one("LogisticRegression.loss", target, input.shape[:-1], self.weight.dtype)
        if has_hooks(self) and not (self.weight_decay and reduction == "none"):  # which the function refuses
            logits = self(input).squeeze(-1)
            loss = functional.binary_cross_entropy_with_logits(logits, target, reduction=reduction)
            return add_l2_penalty(loss, self.weight, self.weight_decay)
        return functional.linear_binary_cross_entropy(
            input,
            self.weight,
            target,
            linear_bias=self.bias,
            reduction=reduction,
            weight_decay=self.weight_decay,
        )

    @torch.no_grad()
    def predict_proba(self, input: Tensor) -> Tensor:
        r"""The probability p(y = 1 | x) of each sample: :math:`(*, in\_features)` to :math:`(*)`.

        Example:
            >>> LogisticRegression(3).predict_proba(torch.rand(8, 3)).shape
            torch.Size([8])
        """
        return torch.sigmoid(self(input)).squeeze(-1)

    @torch.no_grad()
    def predict(self, input: Tensor) -> Tensor:
        r"""1 where the probability is at least one half, else 0: :math:`(*, in\_features)` to :math:`(*)`, int64.

        Example:
            >>> LogisticRegression(3).predict(torch.rand(8, 3)).dtype
            torch.int64
        """
        return (self(input) >= 0).squeeze(-1).long()

    def extra_repr(self) -> str:
        """The arguments of the layer."""
        return f"in_features={self.in_features}, bias={self.bias is not None}, weight_decay={self.weight_decay}"
