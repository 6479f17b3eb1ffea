"""Minibatch SGD on images that stay in memory, evaluation, and the figures of each epoch."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torch_mlp.data import Dataset

SAMPLINGS = ("partition", "random")
LR_DECAYS = ("linear", "none")

_EVALUATION_BATCH = 4096
_STEPS_PER_REPORT = 20  # reading the loss makes a GPU wait


class EpochMetrics(NamedTuple):
    """What one epoch of training gave."""

    epoch: int
    train_loss: float  # mean over the epoch, while the parameters moved
    test_loss: float
    test_accuracy: float  # 0 to 1
    seconds: float  # of training, without the evaluation


class Evaluation(NamedTuple):
    """What a model makes of labelled images."""

    loss: float
    accuracy: float
    predictions: Tensor  # int64 (N,), on the CPU


def minibatches(num_samples: int, batch_size: int, sampling: str, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the sample indices of each minibatch of one epoch.

    Args:
        num_samples: number of samples to draw from.
        batch_size: samples in a batch; the last one of an epoch may be smaller.
        sampling: "partition" splits a random permutation, so that each sample comes once; "random" draws every batch at
            random, with replacement.
        generator: the source of randomness, on the device where the indices are wanted.

    Raises:
        ValueError: if sampling is not known or batch_size is not positive.

    Example:
        >>> [len(batch) for batch in minibatches(10, 4, "partition", torch.Generator())]
        [4, 4, 2]
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"minibatches: expected sampling to be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    if batch_size < 1:
        raise ValueError(f"minibatches: expected batch_size of at least 1, got {batch_size}")
    if sampling == "partition":
        order = torch.randperm(num_samples, generator=generator, device=generator.device)
    else:
        order = torch.randint(num_samples, (num_samples,), generator=generator, device=generator.device)
    yield from order.split(batch_size)


def to_input(images: Tensor, data: Dataset, dtype: torch.dtype) -> Tensor:
    """uint8 images (N, height, width) of a data set as normalised rows of pixels, (N, height * width)."""
    return images.flatten(1).to(dtype).mul_(data.scale).add_(data.shift)


@torch.no_grad()
def evaluate(model: torch.nn.Module, criterion: torch.nn.Module, data: Dataset) -> Evaluation:
    """Mean loss, accuracy and predictions of a model on the test images of a data set.

    Example:
        >>> from torch_mlp import data, nn
        >>> digits = data.load("digits", "data")
        >>> model, criterion = nn.MLP(digits.num_features, 32, 10), nn.CrossEntropyLoss()
        >>> evaluation = evaluate(model, criterion, digits)
        >>> evaluation.predictions.shape
        torch.Size([360])
    """
    was_training = model.training
    model.eval()
    like = next(model.parameters())
    loss = torch.zeros((), dtype=torch.float64, device=like.device)
    predictions = []
    labels = data.test_labels
    for part, target in zip(data.test_images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True):
        logits = model(to_input(part, data, like.dtype))
        loss += criterion(logits, target) * len(target)
        predictions.append(logits.argmax(1))
    model.train(was_training)
    predicted = torch.cat(predictions)
    accuracy = (predicted == labels).double().mean()
    return Evaluation(loss.item() / len(labels), accuracy.item(), predicted.cpu())


def train(
    model: torch.nn.Module,
    criterion: torch.nn.Module,
    data: Dataset,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    lr_decay: str = "linear",
    sampling: str = "partition",
    seed: int = 0,
    progress: bool = True,
) -> Iterator[EpochMetrics]:
    r"""Train a model with minibatch SGD and yield the figures of each epoch.

    Each step draws a minibatch B and moves the parameters by ``w -= lr * v`` with ``v = momentum * v + gradient``, the
    gradient being that of the mean loss over B plus ``weight_decay * w`` (torch.optim.SGD). The model is trained in
    place; stop asking for epochs, or press Ctrl-C, and it holds what it has learned so far.

    Args:
        model: any module from (N, features) to logits (N, classes); its parameters' device must be that of the data.
        criterion: the loss of logits and labels, a mean over the batch.
        data: uint8 images and labels, on one device.
        epochs: passes over the training images.
        batch_size: images in a minibatch.
        lr: learning rate.
        momentum: momentum, 0 for plain SGD.
        weight_decay: factor of the L2 penalty.
        lr_decay: "linear" lowers the learning rate at every step, to reach 0 after the last; "none" keeps it.
        sampling: see :func:`minibatches`.
        seed: of the order in which images are drawn.
        progress: whether to show a progress bar with loss and images per second, where there is a terminal.

    Yields:
        An :class:`EpochMetrics` after every epoch.

    Raises:
        FloatingPointError: if the loss is no longer finite.
        ValueError: if an option is not known or out of its range.

    Example:
        >>> from torch_mlp import data, nn
        >>> digits = data.load("digits", "data")
        >>> model, criterion = nn.MLP(digits.num_features, 64, 10), nn.CrossEntropyLoss()
        >>> history = list(train(model, criterion, digits, epochs=20, progress=False))
        >>> history[-1].test_accuracy > 0.9
        True

    Source: Bottou, Large-Scale Machine Learning with Stochastic Gradient Descent, 2010; Sutskever et al., On the
    importance of initialization and momentum in deep learning, 2013.
    """
    if lr_decay not in LR_DECAYS:
        raise ValueError(f"train: expected lr_decay to be one of {', '.join(LR_DECAYS)}, got {lr_decay!r}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"train: expected epochs and batch_size of at least 1, got {epochs} and {batch_size}")
    like = next(model.parameters())
    generator = torch.Generator(like.device).manual_seed(seed)
    num_samples = len(data.train_images)
    steps = epochs * math.ceil(num_samples / batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / steps if lr_decay == "linear" else 1.0
    )
    hidden = None if progress else True  # None: shown on a terminal only
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        loss_sum = torch.zeros((), dtype=torch.float64, device=like.device)
        model.train()
        with tqdm(total=num_samples, desc=f"epoch {epoch}", unit=" images", leave=False, disable=hidden) as bar:
            for step, index in enumerate(minibatches(num_samples, batch_size, sampling, generator)):
                input = to_input(data.train_images.index_select(0, index), data, like.dtype)
                loss = criterion(model(input), data.train_labels.index_select(0, index))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                loss_sum += loss.detach() * len(index)
                if progress and step % _STEPS_PER_REPORT == 0:
                    bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update(len(index))
        train_loss = loss_sum.item() / num_samples
        seconds = time.perf_counter() - start
        if not math.isfinite(train_loss):
            raise FloatingPointError(f"train: the loss is {train_loss} in epoch {epoch}; try a lower learning rate")
        evaluation = evaluate(model, criterion, data)
        yield EpochMetrics(epoch, train_loss, evaluation.loss, evaluation.accuracy, seconds)
