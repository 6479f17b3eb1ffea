"""Pictures of a training run, and of the lecture's demonstrations."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib.style
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch
from torch import Tensor

from torch_mlp import backprop
from torch_mlp.descent import Record
from torch_mlp.training import EpochMetrics

_COLORS = matplotlib.style.library["tableau-colorblind10"]["axes.prop_cycle"].by_key()["color"]
_MARKERS = "o^sDvP*X"  # of the classes, and of the curves
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


def weight_norms(histories: Mapping[float, Sequence[float]]) -> Figure:
    """Draw how the norm of the weights moves in the steps of a descent, a curve for each lambda of the prior.

    Where a line separates two classes, logistic regression without a prior has no minimum: the norm grows for ever, in
    the end as the logarithm of the steps. On the logarithmic axis the curve becomes a straight line.

    Args:
        histories: for each lambda the norm ||w|| after each step.

    Returns:
        A figure.

    Example:
        >>> figure = weight_norms({0.0: [0.5, 1.0, 1.5], 0.1: [0.5, 0.8, 0.9]})
        >>> figure.axes[0].get_legend().get_title().get_text()
        'lambda of the prior'
    """
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=_COLORS)
    for strength, norms in histories.items():
        axes.plot(range(1, len(norms) + 1), norms, label=f"{strength:g}")
    axes.set(title="norm of the weights", xlabel="step", ylabel=r"$\|w\|$", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(title="lambda of the prior")
    return figure


def decision_regions(predictors: Mapping[str, Callable[[Tensor], Tensor]], input: Tensor, target: Tensor) -> Figure:
    r"""Draw which class each model gives to every point of the plane, and the samples on top.

    Args:
        predictors: for the name of each model its ``predict``: points :math:`(*, 2)` to classes :math:`(*)`.
        input: the samples.
        target: their classes, from 0.

    Shape:
        - input: :math:`(N, 2)`
        - target: :math:`(N)`, int64

    Returns:
        A figure with a panel for each model, whose title has the accuracy. Each class has a colour and a marker.

    Example:
        >>> input, target = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1])
        >>> figure = decision_regions({"x1 > 1/2": lambda points: (points[..., 0] > 0.5).long()}, input, target)
        >>> figure.axes[0].get_title()
        'x1 > 1/2: 100 %'
    """
    figure = Figure(figsize=(3.3 * len(predictors) + 0.3, 4.5), layout="constrained")
    classes = range(int(target.max()) + 1)
    low, high = input.min(0).values, input.max(0).values
    margin = 0.4 * (high - low)
    x, y = (torch.linspace(a, b, 300).to(input) for a, b in zip(low - margin, high + margin, strict=True))
    grid = torch.cartesian_prod(x, y)
    panels = figure.subplots(1, len(predictors), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, predict) in zip(panels, predictors.items(), strict=True):
        regions = predict(grid).view(len(x), len(y)).T
        axes.pcolormesh(
            *(tensor.cpu().numpy() for tensor in (x, y, regions)),
            cmap=ListedColormap(_COLORS[: len(classes)]),
            vmin=classes[0] - 0.5,
            vmax=classes[-1] + 0.5,
            alpha=0.35,
            linewidth=0,
            rasterized=True,
        )
        wrong = predict(input) != target
        for label in classes:
            axes.scatter(
                *input[target == label].T.cpu().numpy(),
                s=130,
                color=_COLORS[label],
                marker=_MARKERS[label % len(_MARKERS)],
                edgecolors="black",
                label=f"class {label}",
                zorder=3,
            )
        axes.scatter(*input[wrong].T.cpu().numpy(), s=420, marker="x", color="black", label="wrong", zorder=4)
        accuracy = 100 * (1 - wrong.double().mean().item())
        axes.set(title=f"{name}: {accuracy:.0f} %", xlabel="$x_1$", aspect="equal")
    panels[0].set_ylabel("$x_2$")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), markerscale=0.7, frameon=False)
    return figure


def computation_graph(graph: backprop.Graph) -> Figure:
    """Draw a computation with its numbers: values and weights in one colour, gradients of the loss in another.

    Args:
        graph: what :func:`torch_mlp.backprop.trace` gives.

    Returns:
        A figure that grows with the network, so that every number can be read.

    Example:
        >>> from torch_mlp.nn import MLP
        >>> figure = computation_graph(backprop.trace(MLP(2, 2, 1, head="binary"), torch.ones(2), 1.0))
    """
    forward, backward, local = _COLORS[0], _COLORS[5], _COLORS[3]
    radius = 0.5  # of a node; inches, as all lengths here
    widths = [len(column.nodes) for column in graph.columns]
    fans = [min(pair) for pair in pairwise(widths)]
    pitch = max(4 * radius, 0.45 * (max(fans) + 1))  # between the nodes of a column

    weighted = {edge.target for edge in graph.edges if edge.weight}
    places: dict[str, tuple[float, float]] = {}
    shares: dict[str, float] = {}  # of the way to a node, where the number of an edge stands
    x = 0.0
    for number, column in enumerate(graph.columns):
        outs, ins = widths[number], widths[number - 1]
        is_linear = column.nodes[0].name in weighted
        if number:
            x += (radius + 0.6) * (fans[number - 1] + 1) if is_linear else 4.2 * radius
        for row, node in enumerate(column.nodes):
            places[node.name] = x, pitch * ((outs - 1) / 2 - row)
            # There the edges of n nodes to m are at even distances: the one from i to j at (m i + j) / (m + 1) of the
            # pitch, or (i + n j) / (n + 1).
            shares[node.name] = 0.5 if not is_linear else 1 / (outs + 1) if outs <= ins else ins / (ins + 1)

    half = pitch * (max(widths) - 1) / 2 + radius
    left, right, bottom, top = -radius - 0.25, x + radius + 0.5, -half - 1.5, half + 0.55
    figure = Figure(figsize=(right - left, top - bottom))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, top))
    axes.axis("off")

    def write(x: float, y: float, text: str, color: str, **options: Any) -> None:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(x, y, text, color=color, ha="center", **{"va": "center", "fontsize": 10, "bbox": box, **options})

    for edge in graph.edges:
        end = places[edge.target]
        is_bias = edge.source == backprop.ONE
        start = (end[0], end[1] - radius - 0.3) if is_bias else places[edge.source]
        shrink = 0 if is_bias else 72 * radius
        axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle="-|>", mutation_scale=12, color=_COLORS[6], shrinkA=shrink, shrinkB=72 * radius
            )
        )
        share = 0 if is_bias else shares[edge.target]
        x, y = ((1 - share) * a + share * b for a, b in zip(start, end, strict=True))
        if edge.weight:
            y -= 0.1 * is_bias
            write(x, y, f"{_math(edge.weight)} = {edge.derivative:.3g}", forward)
            write(x, y - 0.2, f"{edge.gradient:.3g}", backward)
        else:
            write(x, y, f"{edge.derivative:.3g}", local)
    for column in graph.columns:
        for node in column.nodes:
            x, y = places[node.name]
            axes.add_patch(Circle((x, y), radius, facecolor="white", edgecolor="black", zorder=3))
            write(x, y + 0.25, _math(node.name), "black", fontsize=13, bbox=None, zorder=4)
            write(x, y, f"{node.value:.3g}", forward, bbox=None, zorder=4)
            write(x, y - 0.22, f"{node.gradient:.3g}", backward, bbox=None, zorder=4)
        write(x, half + 0.3, column.title, "black", fontsize=11)
    legend = (
        ("forward: values and weights", forward),
        ("backward: gradient of the loss with respect to each of them", backward),
        ("derivative of a node with respect to the one before it", local),
    )
    handles = [Line2D([], [], linestyle="", label=text) for text, _ in legend]
    axes.legend(
        handles=handles,
        labelcolor=[color for _, color in legend],
        loc="lower left",
        handlelength=0,
        frameon=False,
    )
    return figure


def _math(name: str) -> str:
    """The name of a node or weight as mathematics."""
    indexed = re.sub(r"([_^])([\d,]+)", r"\1{\2}", name)
    return {"y_hat": r"$\hat{y}$", "loss": "loss"}.get(name, f"${indexed}$")
