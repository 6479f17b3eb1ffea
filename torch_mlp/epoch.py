"""A whole epoch of minibatch SGD in one call."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torch_mlp import functional, ops
from torch_mlp.engine import choose_engine, layers_of

_OPERATIONS_PER_CALL = 6e10  # of the compiled op, 0.2 to 0.6 seconds: between calls Ctrl-C is noticed
_STEPS_PER_CHECK = 20  # of autograd


class _Epoch(NamedTuple):
    """What the engines train, and how."""

    model: torch.nn.Module
    criterion: torch.nn.Module | None
    optimizer: torch.optim.SGD
    images: Tensor  # (N, features)
    labels: Tensor
    order: Tensor
    batch_size: int
    rates: Tensor  # the learning rate of each minibatch
    scale: float
    shift: float
    precision: str


_optimizers: WeakKeyDictionary[torch.nn.Module, torch.optim.SGD] = WeakKeyDictionary()


def optimizer_of(model: torch.nn.Module) -> torch.optim.SGD:
    """The optimizer that keeps the momentum of a model which :func:`train_epoch` trained without being given one.

    Its ``state_dict()`` loads into any ``torch.optim.SGD`` of the same parameters, and the other way round.

    Raises:
        KeyError: if there is none.

    Example:
        >>> import torch_mlp
        >>> images, labels = torch.randint(256, (100, 64), dtype=torch.uint8), torch.randint(10, (100,))
        >>> model = torch_mlp.nn.MLP(64, [32], 10)
        >>> loss = train_epoch(model, images, labels, batch_size=20, lr=0.1, momentum=0.9)
        >>> optimizer_of(model).param_groups[0]["momentum"]
        0.9
    """
    if model not in _optimizers:
        raise KeyError("optimizer_of: expected a model that train_epoch has trained without an optimizer of yours")
    return _optimizers[model]


def train_epoch(
    model: torch.nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    lr: float | Sequence[float] | Tensor | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    optimizer: torch.optim.SGD | None = None,
    criterion: torch.nn.Module | None = None,
    generator: torch.Generator | None = None,
    order: Tensor | None = None,
    scale: float = 1 / 255,
    shift: float = 0.0,
    precision: str = "full",
    engine: str = "auto",
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    r"""Train a model for one epoch of minibatch SGD, in place.

    For every minibatch B of images, in a random order, the parameters move as by ``torch.optim.SGD`` along the gradient
    of the mean softmax cross-entropy of ``model(scale * images[B] + shift)``. A network of linear layers in float32 or
    float64 is trained by one compiled op, which on the CPU in float32 visits only the pixels that are not 0 where most
    of them are; anything else step by step with autograd. Both give the same up to rounding.

    Args:
        model: maps (batch, features) to logits; what the compiled op can train,
            :func:`torch_mlp.engine.layers_of` says.
        images: the training images, in memory; each is flattened to its features.
        labels: the class of each image.
        batch_size: images in a minibatch; the last one may be smaller.
        lr: learning rate, or one for each minibatch; needed unless an optimizer is given.
        momentum: momentum, 0 for plain SGD. What it accumulates is kept from call to call: :func:`optimizer_of`.
        weight_decay: factor of the L2 penalty.
        optimizer: of the model's parameters; gives learning rate, momentum and weight decay in place of the arguments,
            and keeps the momentum.
        criterion: the loss of logits and labels, a mean; None for the softmax cross-entropy.
        generator: the source of the random order; None for torch's global one.
        order: the indices of the images in the order in which they are used, in place of a random one.
        scale: by which pixels are multiplied.
        shift: added to them after that.
        precision: "full" computes in the dtype of the parameters; "bf16" multiplies in bfloat16 where that saves time
            and sums in float32, of parameters that are kept and moved in float32: 1.5 to 2.5 times as fast where the
            processor has a matrix unit, or is AMD's and has bfloat16 products, and most pixels are not 0; on a GPU for
            large networks only.
        engine: "epoch" for the compiled op, "autograd" for single steps, "auto" for the first where it can be used.
        progress: called between minibatches with the number of images since the last call and the last mean loss.

    Shape:
        - images: :math:`(N, *)`, uint8 or floating-point
        - labels: :math:`(N)`, int64
        - order: :math:`(M)`, int64, values in :math:`[0, N)`; :math:`M = N` where it is random

    Returns:
        The mean loss over the epoch, while the parameters moved, as a tensor of shape () and dtype float64.

    Raises:
        FloatingPointError: if the loss of a minibatch is not finite, which the message names.
        IndexError: if a label or an index is out of range.
        KeyboardInterrupt: after Ctrl-C, between two minibatches; the model holds what it has learned so far.
        RuntimeError: if a shape or dtype does not fit.
        ValueError: if an option is not known or out of its range, or the engine cannot train this model, or an MLP with
            another head than "multiclass" comes without a criterion of its own.

    Example:
        >>> import torch_mlp
        >>> images, labels = torch.randint(256, (100, 8, 8), dtype=torch.uint8), torch.randint(10, (100,))
        >>> model = torch_mlp.nn.MLP(64, [32], 10)
        >>> losses = [train_epoch(model, images, labels, batch_size=20, lr=0.5).item() for epoch in range(20)]
        >>> losses[-1] < losses[0]
        True

    Source: Bottou, Large-Scale Machine Learning with Stochastic Gradient Descent, 2010; Bishop, Pattern Recognition and
    Machine Learning, 2006, section 5.3.
    """
    engine = choose_engine(model, criterion, engine, precision)
    images, order = _check_data(images, labels, batch_size, order, generator)
    optimizer = _prepare_optimizer(model, optimizer, lr, momentum, weight_decay)
    rates = _learning_rates(optimizer, lr, math.ceil(len(order) / batch_size))
    what = _Epoch(model, criterion, optimizer, images, labels, order, batch_size, rates, scale, shift, precision)
    losses: list[Tensor] = []
    done = 0  # images
    for part in _run_compiled(what) if engine == "epoch" else _run_autograd(what):
        losses.append(part)
        images_of_part = min(batch_size * len(part), len(order) - done)
        done += images_of_part
        if progress is not None:
            progress(images_of_part, part[-1])
    return _mean_loss(torch.cat(losses), batch_size, len(order))


def _check_data(
    images: Tensor, labels: Tensor, batch_size: int, order: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Images as rows of features, and the order in which they are used."""
    if images.dim() < 2 or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise RuntimeError(
            "train_epoch: expected images of shape (N, *) and labels of shape (N,) and dtype int64, got "
            f"{tuple(images.shape)} and {tuple(labels.shape)}, {labels.dtype}"
        )
    if not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise RuntimeError(f"train_epoch: expected uint8 or floating-point images, got {images.dtype}")
    if labels.device != images.device:
        raise RuntimeError(
            f"train_epoch: expected labels on the device of images, {images.device}, got {labels.device}"
        )
    if order is None:
        device = images.device if generator is None else generator.device
        order = torch.randperm(len(images), generator=generator, device=device)
    if order.dim() != 1 or order.dtype != torch.int64:
        raise RuntimeError(
            f"train_epoch: expected order of shape (M,) and dtype int64, got {tuple(order.shape)}, {order.dtype}"
        )
    if not 1 <= batch_size <= max(1, len(order)) or len(order) == 0:
        raise ValueError(
            f"train_epoch: expected batch_size from 1 to the number of images, got {batch_size} for {len(order)} images"
        )
    return images.flatten(1), order.to(images.device)


def _prepare_optimizer(
    model: torch.nn.Module,
    optimizer: torch.optim.SGD | None,
    lr: float | Sequence[float] | Tensor | None,
    momentum: float,
    weight_decay: float,
) -> torch.optim.SGD:
    """The optimizer whose state this epoch goes on with."""
    if optimizer is None:
        if lr is None:
            raise ValueError("train_epoch: expected lr or an optimizer, got neither")
        if model not in _optimizers or not _is_optimizer_of(_optimizers[model], model):  # it may have new parameters
            _optimizers[model] = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = _optimizers[model]
        optimizer.param_groups[0].update(momentum=momentum, weight_decay=weight_decay)
        if isinstance(lr, float | int):
            optimizer.param_groups[0]["lr"] = float(lr)
    elif momentum or weight_decay:
        raise ValueError(
            "train_epoch: expected momentum and weight_decay from the optimizer, got them as arguments too"
        )
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
        raise ValueError(f"train_epoch: expected a torch.optim.SGD with one group of parameters, got {optimizer}")
    group = optimizer.param_groups[0]
    for name in ("dampening", "nesterov", "maximize"):
        if group[name]:
            raise ValueError(f"train_epoch: expected an optimizer without {name}, got {name}={group[name]}")
    if not _is_optimizer_of(optimizer, model):
        raise ValueError("train_epoch: expected the optimizer of the model's parameters, got that of others")
    return optimizer


def _is_optimizer_of(optimizer: torch.optim.SGD, model: torch.nn.Module) -> bool:
    return [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def _learning_rates(optimizer: torch.optim.SGD, lr: float | Sequence[float] | Tensor | None, steps: int) -> Tensor:
    """The learning rate of each minibatch."""
    if lr is None:
        lr = float(optimizer.param_groups[0]["lr"])
    rates = torch.as_tensor(lr, dtype=torch.float64, device="cpu")
    if rates.dim() == 0:
        rates = rates.expand(steps)
    if rates.shape != (steps,):
        raise ValueError(
            f"train_epoch: expected one lr, or one for each of {steps} minibatches, got {tuple(rates.shape)}"
        )
    if not bool((rates >= 0).all()) or not bool(rates.isfinite().all()):
        raise ValueError("train_epoch: expected lr of at least 0 and finite, got others")
    return rates.contiguous()


def _mean_loss(losses: Tensor, batch_size: int, samples: int) -> Tensor:
    """The mean over the samples of the means over minibatches."""
    sizes = torch.full_like(losses, batch_size)
    sizes[-1] = samples - batch_size * (len(losses) - 1)
    return (losses * sizes).sum() / samples


def _check_losses(losses: Tensor, first: int) -> Tensor:
    finite = losses.isfinite()
    if not bool(finite.all()):
        wrong = int((~finite).nonzero()[0])
        raise FloatingPointError(
            f"train_epoch: the loss is {losses[wrong].item()} in minibatch {first + wrong} (counted from 0); a lower "
            "learning rate may help"
        )
    return losses


def _run_compiled(what: _Epoch) -> Iterator[Tensor]:
    """Yield the losses of some minibatches at a time, each time of one call of the op."""
    layers = layers_of(what.model)
    images, labels, order, batch_size = what.images, what.labels, what.order, what.batch_size
    if images.shape[1] != layers[0].linear.in_features:
        raise RuntimeError(
            f"train_epoch: expected images of {layers[0].linear.in_features} features, got {images.shape[1]}"
        )
    group, state = what.optimizer.param_groups[0], what.optimizer.state
    parameters = [p for layer in layers for p in (layer.linear.weight, layer.linear.bias)]
    none = layers[0].linear.weight.new_empty(0)
    velocities = []
    if group["momentum"]:
        for parameter in parameters:
            if parameter is not None and state[parameter].get("momentum_buffer") is None:
                state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            velocities.append(none if parameter is None else state[parameter]["momentum_buffer"])
    values = [none if p is None else p.detach() for p in parameters]
    images = images.contiguous() if images.dtype == torch.uint8 else images.to(none.dtype).contiguous()
    operations = 6 * batch_size * sum(value.numel() for value in values)
    steps_per_call = max(1, int(_OPERATIONS_PER_CALL / operations))
    for first in range(0, len(what.rates), steps_per_call):
        last = first + steps_per_call
        losses = ops.train_epoch(
            images,
            labels.contiguous(),
            order[first * batch_size : last * batch_size].contiguous(),
            values[::2],
            values[1::2],
            velocities,
            [layer.activation for layer in layers],
            batch_size,
            what.rates[first:last],
            group["momentum"],
            group["weight_decay"],
            what.scale,
            what.shift,
            what.precision == "bf16",
        )
        torch.autograd.graph.increment_version([p for p in parameters if p is not None])
        yield _check_losses(losses, first)


def _run_autograd(what: _Epoch) -> Iterator[Tensor]:
    """Yield the losses of some minibatches at a time, which are checked then: a GPU would wait at each."""
    loss_of = functional.cross_entropy if what.criterion is None else what.criterion
    dtype = next(what.model.parameters()).dtype
    autocast = torch.autocast(what.images.device.type, torch.bfloat16, enabled=what.precision == "bf16")
    group = what.optimizer.param_groups[0]
    before = group["lr"]
    losses: list[Tensor] = []
    first = 0
    try:
        for step, (index, rate) in enumerate(zip(what.order.split(what.batch_size), what.rates.tolist(), strict=True)):
            group["lr"] = rate
            input = what.images.index_select(0, index).to(dtype).mul_(what.scale).add_(what.shift)
            with autocast:
                loss = loss_of(what.model(input), what.labels.index_select(0, index))
            what.optimizer.zero_grad()
            loss.backward()
            what.optimizer.step()
            losses.append(loss.detach().double())
            if len(losses) == _STEPS_PER_CHECK or step == len(what.rates) - 1:
                yield _check_losses(torch.stack(losses), first)
                first, losses = step + 1, []
    finally:
        group["lr"] = before
