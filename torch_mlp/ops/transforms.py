"""Where an op is to be composed of ATen calls: in functional transforms of torch and for distributed tensors."""

import sys

from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether we are inside ``torch.func`` (vmap, grad, jvp, ...) or at a level of forward-mode AD.

    There the ops return their reference, which ATen batches and differentiates to any order and in any mode. A ``jvp``
    or ``vmap`` rule on an ``autograd.Function`` would do too, but ``torch.compile(fullgraph=True)`` rejects it.
    """
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_composed(input: Tensor) -> bool:
    """Whether an op of this input is its reference: in a transform, and for a DTensor, which ATen can split."""
    return in_transform() or (type(input) is not Tensor and _is_dtensor(input))


def _is_dtensor(input: Tensor) -> bool:
    # Importing the module takes most of a second, and where nobody has done so there is no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(input, module.DTensor)
