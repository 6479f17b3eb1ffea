"""The ops with the signatures of ``torch.nn.functional``: values, gradients of any order, ``torch.compile``."""

from torch_mlp.functional.binary_cross_entropy import binary_cross_entropy_with_logits, linear_binary_cross_entropy
from torch_mlp.functional.cross_entropy import cross_entropy, linear_cross_entropy
from torch_mlp.functional.linear_act import linear_act, linear_sigmoid
from torch_mlp.functional.mlp import mlp, mlp_cross_entropy
from torch_mlp.ops import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "linear_act",
    "linear_binary_cross_entropy",
    "linear_cross_entropy",
    "linear_sigmoid",
    "mlp",
    "mlp_cross_entropy",
]
