"""Pictures of a training run, and of the lecture's demonstrations."""

from collections.abc import Mapping, Sequence

import matplotlib.style
import torch
from matplotlib.figure import Figure
from torch import Tensor

from torch_mlp.training import EpochMetrics

_ROWS, _COLUMNS = 3, 8  # of the grid of misclassified images
_COLORS = matplotlib.style.library["tableau-colorblind10"]["axes.prop_cycle"].by_key()["color"]


def training_report(
    histories: Mapping[str, Sequence[EpochMetrics]], images: Tensor, labels: Tensor, predictions: Tensor
) -> Figure:
    """Draw losses and test accuracy over the epochs, and the first misclassified test images.

    Args:
        histories: for the name of each run the figures of its epochs.
        images: uint8 (N, height, width), the test images.
        labels: int64 (N,), their true classes.
        predictions: int64 (N,), the classes that the model gave them.

    Returns:
        A figure; ``figure.savefig("report.png")`` writes it.

    Example:
        >>> history = [EpochMetrics(1, 0.5, 0.4, 0.9, 1.0), EpochMetrics(2, 0.3, 0.3, 0.92, 1.0)]
        >>> images, labels = torch.zeros(4, 8, 8, dtype=torch.uint8), torch.arange(4)
        >>> figure = training_report({"torch_mlp": history}, images, labels, torch.tensor([0, 1, 2, 9]))
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    places = figure.add_gridspec(2, 1, height_ratios=(3, 2.6))
    curves, grid = figure.add_subfigure(places[0]), figure.add_subfigure(places[1])
    loss_axes, accuracy_axes = curves.subplots(1, 2)
    for name, history in histories.items():
        if not history:
            continue
        epochs = [metrics.epoch for metrics in history]
        (line,) = loss_axes.plot(epochs, [m.train_loss for m in history], "--", label=f"{name}, train")
        loss_axes.plot(epochs, [m.test_loss for m in history], "o-", color=line.get_color(), label=f"{name}, test")
        accuracy_axes.plot(epochs, [100 * m.test_accuracy for m in history], "o-", label=name)
    loss_axes.set(title="cross-entropy", xlabel="epoch", yscale="log")
    accuracy_axes.set(title="test accuracy, %", xlabel="epoch")
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()

    wrong = torch.nonzero(predictions != labels).flatten()
    grid.suptitle(
        f"{len(wrong)} of {len(labels)} test images misclassified" + (", the first of them:" if len(wrong) else "")
    )
    for place, axes in enumerate(grid.subplots(_ROWS, _COLUMNS).flat):
        axes.axis("off")
        if place < len(wrong):
            index = wrong[place]
            axes.imshow(images[index].numpy(), cmap="gray_r")
            axes.set_title(f"{labels[index]} taken for {predictions[index]}", fontsize=8)
    return figure


def weight_norms(histories: Mapping[float, Sequence[float]]) -> Figure:
    """Draw how the norm of the weights moves in the steps of a descent, a line for each weight decay.

    Where a line separates two classes, logistic regression without weight decay has no minimum: the norm grows for
    ever, as the logarithm of the steps. On the logarithmic axis that is a straight line.

    Args:
        histories: for each weight decay the norm ||w|| after each step.

    Returns:
        A figure.

    Example:
        >>> figure = weight_norms({0.0: [0.5, 1.0, 1.5], 0.1: [0.5, 0.8, 0.9]})
        >>> figure.axes[0].get_legend().get_title().get_text()
        'weight decay'
    """
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=_COLORS)
    for weight_decay, norms in histories.items():
        axes.plot(range(1, len(norms) + 1), norms, label=f"{weight_decay:g}")
    axes.set(title="norm of the weights", xlabel="step", ylabel=r"$\|w\|$", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(title="weight decay")
    return figure
