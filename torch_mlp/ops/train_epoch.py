"""The op ``_train_epoch``: minibatch SGD of a multilayer perceptron on images in memory, many minibatches in one call.

It moves parameters in place and has no gradient. What it computes is in csrc/cpu/trainer.h.
"""

import torch
from torch import Tensor

train_epoch = torch.ops.torch_mlp._train_epoch.default


@torch.library.register_fake("torch_mlp::_train_epoch")
def _(
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    velocities: list[Tensor],
    activations: list[str],
    batch_size: int,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    scale: float,
    shift: float,
    bfloat16: bool,
) -> Tensor:
    return images.new_empty(lr.shape, dtype=torch.float64)  # lr is on the CPU
