"""Whether a functional transform of torch is at work, in which an op is to be composed of ATen calls."""

from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether we are inside ``torch.func`` (vmap, grad, jvp, ...) or at a level of forward-mode AD.

    There the ops return their reference, which ATen batches and differentiates to any order and in any mode. A ``jvp``
    or ``vmap`` rule on an ``autograd.Function`` would do too, but ``torch.compile(fullgraph=True)`` rejects it.
    """
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0
