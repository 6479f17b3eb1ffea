"""In what surroundings an op is called: a functional transform, a distributed tensor, a graph that is freed."""

import sys

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._autograd import _get_current_graph_task_keep_graph as graph_is_kept
from torch._C._functorch import is_legacy_batchedtensor
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


def is_last_use(grad_output: Tensor) -> bool:
    """Whether the graph is freed behind the backward pass that runs, so that what it saved can become its result.

    A gradient that the forward pass has computed is often as much memory as all the rest of the pass. A pass that a
    CUDA graph records is run again as often as the graph is, without a forward pass before it if need be.
    """
    return not (
        torch.compiler.is_compiling()
        or is_legacy_batchedtensor(grad_output)
        or graph_is_kept()
        or (grad_output.is_cuda and torch.cuda.is_current_stream_capturing())
    )
