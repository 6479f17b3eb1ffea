"""Pictures of a training run, and of the lecture's demonstrations."""

from collections.abc import Mapping, Sequence

import matplotlib.style
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from torch_mlp.descent import Record
from torch_mlp.training import EpochMetrics

_COLORS = matplotlib.style.library["tableau-colorblind10"]["axes.prop_cycle"].by_key()["color"]
_MARKERS = "osD^vPX*"
_LEVELS = 20  # of the contours of a landscape, about
_ROWS, _COLUMNS = 3, 8  # of the grid of misclassified images


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


def descent_curves(
    curves: Mapping[str, Sequence[Record]], seconds_per_pass: Mapping[str, float] | None = None
) -> Figure:
    """Draw the loss of each descent over its passes over the data, and over its seconds beside that.

    The axis of the passes is logarithmic, but for the start at 0: the methods differ by powers of ten.

    Args:
        curves: for the name of each descent its records.
        seconds_per_pass: what a pass took each of them; None leaves the second panel out.

    Returns:
        A figure.

    Example:
        >>> curves = {"gradient descent": [Record(0, 2.3), Record(1, 2.1)], "SGD": [Record(0, 2.3), Record(0.1, 0.9)]}
        >>> figure = descent_curves(curves, {"gradient descent": 0.1, "SGD": 12.0})
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['passes over the data', 'seconds of training']
    """
    scales: dict[str, Mapping[str, float]] = {"passes over the data": dict.fromkeys(curves, 1.0)}
    if seconds_per_pass is not None:
        scales["seconds of training"] = seconds_per_pass
    figure = Figure(figsize=(6.5 * len(scales), 4.8), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for axes, (label, scale) in zip(panels, scales.items(), strict=True):
        for place, (name, records) in enumerate(curves.items()):
            axes.plot(
                [record.passes * scale[name] for record in records],
                [record.loss for record in records],
                color=_COLORS[place % len(_COLORS)],
                marker=_MARKERS[place % len(_MARKERS)],
                markersize=4,
                label=name,
            )
        axes.set(xlabel=label, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    first = min((record.passes for records in curves.values() for record in records if record.passes), default=1.0)
    panels[0].set_xscale("symlog", linthresh=first, linscale=0.3)
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].set_xlim(left=0)
    panels[0].set_ylabel("loss over all of the data")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(scales))
    return figure


def loss_landscape(steps: Tensor, losses: Tensor, lines: Mapping[str, Tensor]) -> Figure:
    """Draw the loss on a plane through a network, as contours and as a surface, and on lines between two networks.

    Args:
        steps: the coordinates of the plane in either direction, (P,); the network is at 0.
        losses: those of :func:`torch_mlp.landscape.losses_on_plane`, (P, P).
        lines: for the name of each line its losses, those of :func:`torch_mlp.landscape.losses_between`. The chord
            between its ends, above which no convex function rises, is dashed.

    Returns:
        A figure.

    Example:
        >>> steps = torch.linspace(-1, 1, 5)
        >>> figure = loss_landscape(steps, steps**2 + steps[:, None] ** 2, {"network": torch.tensor([0.1, 1.0, 0.2])})
    """
    figure = Figure(figsize=(17, 5), layout=ConstrainedLayoutEngine(wspace=0.06))
    contour = figure.add_subplot(1, 3, 1)
    surface = figure.add_subplot(1, 3, 2, projection="3d")
    line = figure.add_subplot(1, 3, 3)
    x, y = torch.meshgrid(steps, steps, indexing="xy")
    filled = contour.contourf(x, y, losses, _LEVELS, cmap="cividis")
    contour.contour(x, y, losses, _LEVELS, colors="white", linewidths=0.4)
    contour.plot(0, 0, "*", color="white", markeredgecolor="black", markersize=16)
    contour.set(title="around the trained network", xlabel="direction 1", ylabel="direction 2", aspect="equal")
    figure.colorbar(filled, ax=contour, label="loss", shrink=0.8)
    surface.plot_surface(x.numpy(), y.numpy(), losses.numpy(), cmap="cividis", rcount=len(steps), ccount=len(steps))
    middle = steps.abs().argmin()
    here = losses[middle, middle].item()
    surface.plot([0], [0], [here], "*", color="white", markeredgecolor="black", markersize=16, zorder=10)
    surface.set(title="the same as a surface", zlabel="loss")
    surface.set_xlabel("direction 1", labelpad=8)
    surface.set_ylabel("direction 2", labelpad=8)
    for place, (name, values) in enumerate(lines.items()):
        color, t = _COLORS[place % len(_COLORS)], torch.linspace(0, 1, len(values))
        line.plot(t, values, color=color, marker=_MARKERS[place % len(_MARKERS)], markersize=4, label=name)
        line.plot([0, 1], [values[0], values[-1]], "--", color=color, label="its chord")
    line.set(title="from one trained network straight to another", xlabel="position on the line", ylabel="loss")
    line.set_ylim(bottom=0)
    line.grid(alpha=0.3)
    line.legend()
    return figure
