"""Minibatch SGD on images that stay in memory, evaluation, and the figures of each epoch."""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torch_mlp.data import Dataset
from torch_mlp.epoch import train_epoch

SAMPLINGS = ("partition", "random")
LR_DECAYS = ("linear", "none")

_EVALUATION_BATCH = 4096


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


def sample_order(num_samples: int, sampling: str, generator: torch.Generator) -> Tensor:
    """Draw the order in which an epoch uses the samples: their indices, int64 of shape (num_samples,).

    Args:
        num_samples: number of samples to draw from.
        sampling: "partition" gives a random permutation, so that each sample comes once; "random" draws every one at
            random, with replacement.
        generator: the source of randomness, on the device where the indices are wanted.

    Raises:
        ValueError: if sampling is not known.

    Example:
        >>> sorted(sample_order(5, "partition", torch.Generator()).tolist())
        [0, 1, 2, 3, 4]
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sample_order: expected sampling to be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    if sampling == "partition":
        return torch.randperm(num_samples, generator=generator, device=generator.device)
    return torch.randint(num_samples, (num_samples,), generator=generator, device=generator.device)


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
    lr: float = 0.2,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    lr_decay: str = "linear",
    sampling: str = "partition",
    seed: int = 0,
    precision: str = "full",
    engine: str = "auto",
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
        sampling: see :func:`sample_order`.
        seed: of the order in which images are drawn.
        precision: see :func:`torch_mlp.train_epoch`.
        engine: see there.
        progress: whether to show a progress bar with loss and images per second, where there is a terminal.

    Yields:
        An :class:`EpochMetrics` after every epoch.

    Raises:
        FloatingPointError: if the loss is no longer finite. The message names epoch and minibatch, and the model is as
            it was before that epoch.
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
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    num_samples = len(data.train_images)
    steps = math.ceil(num_samples / batch_size)  # of an epoch
    # torch before 2.14 would leave 16 bits on the CPU as they are: https://github.com/pytorch/pytorch/issues/191763.
    fused = all(parameter.is_cuda or parameter.element_size() > 2 for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, fused=fused)
    hidden = None if progress else True  # None: shown on a terminal only
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        past = steps * (epoch - 1) + torch.arange(steps, dtype=torch.float64)
        rates = lr * (1 - past / (steps * epochs)) if lr_decay == "linear" else torch.full((steps,), lr)
        with tqdm(total=num_samples, desc=f"epoch {epoch}", unit=" images", leave=False, disable=hidden) as bar:

            def report(images: int, loss: Tensor, bar: tqdm = bar) -> None:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update(images)

            try:
                train_loss = train_epoch(
                    model,
                    data.train_images,
                    data.train_labels,
                    batch_size=min(batch_size, num_samples),
                    lr=rates,
                    optimizer=optimizer,
                    criterion=criterion,
                    order=sample_order(num_samples, sampling, generator),
                    scale=data.scale,
                    shift=data.shift,
                    precision=precision,
                    engine=engine,
                    progress=report if progress else None,
                ).item()
            except FloatingPointError as error:
                with torch.no_grad():
                    for parameter, value in zip(model.parameters(), before, strict=True):
                        parameter.copy_(value)
                raise FloatingPointError(f"epoch {epoch}: {error}") from None
        seconds = time.perf_counter() - start
        evaluation = evaluate(model, criterion, data)
        yield EpochMetrics(epoch, train_loss, evaluation.loss, evaluation.accuracy, seconds)
