"""Fused losses."""

import torch
from torch import Tensor

from torch_mlp import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    r"""Softmax cross-entropy of logits and class indices: :class:`torch.nn.CrossEntropyLoss` in one op.

    Arguments, buffers and state_dict are torch's; see :func:`torch_mlp.functional.cross_entropy` for shapes, dtypes,
    errors and the formula.

    Example:
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(2, 10), torch.tensor([3, 7]))
        tensor(2.3026)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (batch, num_classes) and class indices (batch,)."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


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
