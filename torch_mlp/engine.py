"""Which engine trains a model: the compiled op for whole epochs, or single steps with autograd."""

import itertools
from typing import NamedTuple

import torch

from torch_mlp import nn, ops

ENGINES = ("auto", "epoch", "autograd")
PRECISIONS = ("full", "bf16")

_ACTIVATIONS = {
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh",
    torch.nn.ReLU: "relu",
}
_CRITERIA = (nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss)


class Layer(NamedTuple):
    """A linear layer of a network and the name of the activation behind it."""

    linear: torch.nn.Linear
    activation: str


def layers_of(model: torch.nn.Module) -> list[Layer]:
    """The layers of a network that the compiled op can train: linear layers, each with an activation or none.

    Args:
        model: an :class:`torch_mlp.nn.MLP`, or a :class:`torch.nn.Sequential` of ``LinearAct``, ``LinearSigmoid``, or
            ``torch.nn.Linear`` followed by ``Sigmoid``, ``Tanh``, ``ReLU`` or nothing; a ``Flatten`` may come first.

    Raises:
        ValueError: for any other model; the message names the layer and says why.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        >>> [layer.activation for layer in layers_of(model)]
        ['tanh', 'identity']
    """
    if type(model) not in (nn.MLP, torch.nn.Sequential):
        raise ValueError(f"train_epoch: expected an MLP or a Sequential of linear layers, got {type(model).__name__}")
    layers: list[Layer] = []
    can_follow = False  # whether the last layer has no activation yet
    for name, module in [("the model itself", model), *model.named_children()]:
        kind = type(module)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise ValueError(f"train_epoch: expected layers without hooks, got some on {name} ({kind.__name__})")
        is_identity = kind.forward is torch.nn.Identity.forward  # behind a fused layer too, see torch_mlp/fuse.py
        if module is model or is_identity or (kind is torch.nn.Flatten and module.start_dim == 1 and not layers):
            continue
        if isinstance(module, nn.LinearAct) and kind in (nn.LinearAct, nn.LinearSigmoid):
            layers.append(Layer(module, module.activation))
        elif isinstance(module, torch.nn.Linear) and kind is torch.nn.Linear:
            layers.append(Layer(module, "identity"))
        elif kind in _ACTIVATIONS and can_follow:
            layers[-1] = layers[-1]._replace(activation=_ACTIVATIONS[kind])
        else:
            raise ValueError(
                f"train_epoch: expected linear layers, each with one activation or none, got {kind.__name__} as layer "
                f"{name}"
            )
        can_follow = kind is torch.nn.Linear
    if not layers:
        raise ValueError("train_epoch: expected a network of at least one linear layer, got none")
    if layers[-1].activation != "identity":
        raise ValueError(
            f"train_epoch: expected a last layer that gives logits, got a {layers[-1].activation} behind it"
        )
    return layers


def _check_parameters(layers: list[Layer]) -> None:
    """Raise ValueError where the compiled op cannot train these parameters."""
    parameters = {f"{i}.{name}": p for i, layer in enumerate(layers) for name, p in layer.linear.named_parameters()}
    dtype, device = layers[0].linear.weight.dtype, layers[0].linear.weight.device
    if device.type != "cpu" and not (device.type == "cuda" and ops.has_cuda_kernels()):
        raise ValueError(f"train_epoch: expected parameters on the CPU or a CUDA device, got some on {device}")
    for name, parameter in parameters.items():
        if type(parameter.data) is not torch.Tensor:
            kind = type(parameter.data).__name__
            raise ValueError(f"train_epoch: expected parameters that are plain tensors, got a {kind} in {name}")
        if parameter.dtype != dtype or parameter.device != device or dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "train_epoch: expected float32 or float64 parameters, all of one dtype on one device, got "
                f"{parameter.dtype} on {parameter.device} in {name}"
            )
        if not parameter.requires_grad or not parameter.is_contiguous():
            state = "is not contiguous" if parameter.requires_grad else "requires no grad"
            raise ValueError(
                f"train_epoch: expected contiguous parameters that require grad, got one in {name} that {state}"
            )
    ranges = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in parameters.items())
    for (_, end, name), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            raise ValueError(f"train_epoch: expected parameters of their own, got {name} and {other} that share memory")


def choose_engine(
    model: torch.nn.Module, criterion: torch.nn.Module | None = None, engine: str = "auto", precision: str = "full"
) -> str:
    """The engine of :func:`train_epoch` for this model: "epoch" where the compiled op can train it, else "autograd".

    Raises:
        ValueError: if engine is "epoch" and it cannot, if engine or precision is not known, if precision is "bf16" and
            the parameters are not float32, or if a layer that is to learn has an activation without a derivative;
            whatever the engine, if an :class:`torch_mlp.nn.MLP` with another head than "multiclass" is to be trained by
            the softmax cross-entropy.

    Example:
        >>> choose_engine(nn.MLP(64, [32], 10)), choose_engine(nn.MLP(64, [32], 10).half())
        ('epoch', 'autograd')
    """
    if precision not in PRECISIONS:
        raise ValueError(f"train_epoch: expected precision to be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "bf16" and any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("train_epoch: expected float32 parameters with precision bf16, got others")
    is_softmax = isinstance(criterion, torch.nn.CrossEntropyLoss | None)
    if is_softmax and isinstance(model, nn.MLP) and model.head != "multiclass":
        raise ValueError(
            "train_epoch: expected a model with head multiclass for the softmax cross-entropy, or a criterion of its "
            f"own, got head {model.head}"
        )
    if engine not in ENGINES:
        raise ValueError(f"train_epoch: expected engine to be one of {', '.join(ENGINES)}, got {engine!r}")
    for name, module in model.named_modules():
        learns = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if learns and isinstance(module, nn.LinearAct) and ops.ACTIVATIONS[module.activation].derivative is None:
            raise ValueError(
                f"train_epoch: expected activations with a derivative, got {module.activation} in layer {name}, which "
                "gradient descent cannot use; use sigmoid, tanh or relu, or freeze the layer"
            )
    if engine == "autograd":
        return engine
    try:
        _check_parameters(layers_of(model))
        if criterion is not None and not _is_plain_cross_entropy(criterion):
            raise ValueError(f"train_epoch: expected the plain mean cross-entropy as criterion, got {criterion}")
    except ValueError as error:
        if engine == "epoch":
            raise ValueError(f"{error}; use the engine autograd") from None
        return "autograd"
    return "epoch"


def _is_plain_cross_entropy(criterion: torch.nn.Module) -> bool:
    return (
        type(criterion) in _CRITERIA
        and criterion.weight is None
        and criterion.reduction == "mean"
        and criterion.label_smoothing == 0
        and criterion.ignore_index < 0
    )
