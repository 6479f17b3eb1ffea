"""torch_mlp: fused, differentiable multilayer perceptron ops and layers for PyTorch.

>>> import torch, torch_mlp
>>> model = torch_mlp.nn.MLP(784, [512], 10)
>>> loss = torch_mlp.functional.cross_entropy(model(torch.rand(64, 784)), torch.randint(10, (64,)))
>>> loss.backward()
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from torch_mlp import functional, nn, ops
from torch_mlp.config import show_config
from torch_mlp.epoch import train_epoch
from torch_mlp.fuse import explain, fuse, unfuse  # torch_mlp.fuse is the function from here on, not its module

try:
    __version__ = _version("torch_mlp")
except _PackageNotFoundError:  # imported from a source tree that was built in place, not installed
    __version__ = "0+unknown"

__all__ = ["__version__", "explain", "functional", "fuse", "nn", "ops", "show_config", "train_epoch", "unfuse"]
