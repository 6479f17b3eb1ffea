"""Fused losses."""

import math

import torch
from torch import Tensor

from torch_mlp import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    r"""Softmax cross-entropy of logits and classes: :class:`torch.nn.CrossEntropyLoss` in one op.

    Arguments, buffers and state_dict are torch's; see :func:`torch_mlp.functional.cross_entropy` for shapes, dtypes,
    errors and the formula.

    Example:
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 10), torch.tensor([3, 7]))
        tensor(2.3026)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (batch, num_classes) and class indices (batch,), or probabilities (batch, num_classes)."""
        loss: Tensor = functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        return loss


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    r"""Binary cross-entropy of logits: :class:`torch.nn.BCEWithLogitsLoss` in one op.

    Arguments, buffers and state_dict are torch's; see
    :func:`torch_mlp.functional.binary_cross_entropy_with_logits` for shapes, dtypes, errors and the formula.

    Example:
        >>> criterion = BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))
        >>> criterion(torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 0.0]))
        tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits and targets of one shape."""
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    r"""A linear layer and the softmax cross-entropy of its output: ``torch.nn.LinearCrossEntropyLoss`` in one op.

    Arguments, parameters, buffers and state_dict are torch's; see :func:`torch_mlp.functional.linear_cross_entropy` for
    shapes, dtypes, errors and the formula. There are no ``options``: the logits are never there as a whole.

    Args:
        in_features: size of each input sample.
        num_classes: number of classes.
        out_features: the places at each of which there are so many classes, mostly none.
        bias: whether the linear layer has a bias.
        device: device of the parameters.
        dtype: dtype of the parameters.
        reduction: "none", "mean" or "sum".
        weight: a factor for each class, if given.
        ignore_index: rows with this target have loss 0 and gradient 0; None stands for -100.
        label_smoothing: the share of each target that is spread evenly over all classes.

    Raises:
        RuntimeError: if the shape of weight or the label smoothing does not fit.

    Example:
        >>> criterion = LinearCrossEntropyLoss(512, 1000)
        >>> criterion(torch.randn(64, 512), torch.randint(1000, (64,))).shape
        torch.Size([])
        >>> list(criterion.state_dict())
        ['linear.weight']
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"{name}: expected weight of shape ({num_classes},), got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"{name}: expected label_smoothing in [0, 1], got {label_smoothing}")
        self.num_classes = num_classes
        self.out_features = out_features
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight)
        self.linear = torch.nn.Linear(in_features, num_classes * math.prod(out_features), bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of (batch, in_features) and class indices (batch, *out_features), or probabilities."""
        shape = (self.num_classes, *self.out_features)
        loss: Tensor = functional.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if self.linear.bias is None else self.linear.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        return loss

    def extra_repr(self) -> str:
        """The arguments that the linear layer does not show."""
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )
