"""torch_mlp/plot.py."""

from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from torch_mlp import backprop, plot
from torch_mlp.descent import Record
from torch_mlp.nn import MLP
from torch_mlp.training import EpochMetrics


@pytest.mark.parametrize("wrong", [0, 3, 40])
def test_training_report(tmp_path, wrong):
    histories = {
        "torch_mlp": [EpochMetrics(1, 0.5, 0.4, 0.90, 1.0), EpochMetrics(2, 0.3, 0.2, 0.95, 1.0)],
        "torch": [EpochMetrics(1, 0.6, 0.5, 0.89, 2.0)],
    }
    images, labels = torch.randint(256, (50, 28, 28), dtype=torch.uint8), torch.randint(9, (50,))
    predictions = labels.clone()
    predictions[:wrong] += 1
    figure = plot.training_report(histories, images, labels, predictions)
    loss_axes, accuracy_axes = figure.subfigs[0].axes
    assert [list(line.get_ydata()) for line in loss_axes.lines] == [[0.5, 0.3], [0.4, 0.2], [0.6], [0.5]]
    assert [list(line.get_ydata()) for line in accuracy_axes.lines] == [[90.0, 95.0], [89.0]]
    shown = [axes for axes in figure.subfigs[1].axes if axes.images]
    assert len(shown) == min(wrong, 24)
    for place, axes in enumerate(shown):
        assert axes.get_title() == f"{labels[place]} taken for {labels[place] + 1}"
        assert torch.equal(torch.from_numpy(axes.images[0].get_array().data), images[place])
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_training_report_without_an_epoch():
    """After Ctrl-C in the first one."""
    images, labels = torch.zeros(2, 8, 8, dtype=torch.uint8), torch.tensor([1, 2])
    figure = plot.training_report({"torch_mlp": []}, images, labels, labels)
    assert figure.subfigs[0].axes[0].get_legend() is None


def curves():
    return {
        "gradient descent": [Record(0, 2.3), Record(1, 2.0), Record(2, 1.5)],
        "SGD": [Record(0, 2.3), Record(0.25, 0.5), Record(0.5, 0.25)],
    }


def test_descent_curves(tmp_path):
    figure = plot.descent_curves(curves(), {"gradient descent": 0.5, "SGD": 20.0})
    passes, seconds = figure.axes
    assert [list(line.get_xdata()) for line in passes.lines] == [[0, 1, 2], [0, 0.25, 0.5]]
    assert [list(line.get_xdata()) for line in seconds.lines] == [[0, 0.5, 1], [0, 5, 10]]
    for axes in figure.axes:
        assert [list(line.get_ydata()) for line in axes.lines] == [[2.3, 2.0, 1.5], [2.3, 0.5, 0.25]]
        assert axes.get_yscale() == "log"
    assert (passes.get_xlabel(), passes.get_ylabel()) == ("passes over the data", "loss over all of the data")
    assert seconds.get_xlabel() == "seconds of training"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gradient descent", "SGD"]
    colors = [line.get_color() for line in passes.lines]
    assert colors == [line.get_color() for line in seconds.lines]
    assert len(set(colors)) == 2
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_descent_curves_without_seconds_or_a_step(tmp_path):
    """Half a pass is too little for gradient descent, which stays where it is."""
    for records in (curves(), {"gradient descent": [Record(0, 2.3)]}, {}):
        figure = plot.descent_curves(records)
        assert [axes.get_xlabel() for axes in figure.axes] == ["passes over the data"]
        figure.savefig(tmp_path / "curves.png")


@pytest.mark.parametrize("points", [4, 5])
def test_loss_landscape(tmp_path, points):
    steps = torch.linspace(-1, 1, points)
    losses = 0.1 + steps**2 + 3 * steps[:, None] ** 2
    lines = {"network": torch.tensor([0.1, 1.0, 0.3]), "regression": torch.tensor([0.5, 0.4, 0.5])}
    figure = plot.loss_landscape(steps, losses, lines)
    contour, surface, line, bar = figure.axes
    assert [list(mark.get_data()[0]) for mark in contour.lines] == [[0]]
    _, _, (height,) = surface.lines[0].get_data_3d()
    assert height == losses.min()
    assert contour.get_xlim() == (-1, 1)
    # Three times as steep in the second direction: its contours are ellipses that are longer in the first.
    path = contour.collections[0].get_paths()[0].get_extents()
    assert path.width > path.height
    assert surface.get_zlim()[1] > 4
    drawn = {drawn.get_label(): list(drawn.get_ydata()) for drawn in line.lines if drawn.get_label() in lines}
    assert drawn == {name: values.tolist() for name, values in lines.items()}
    chords = [list(drawn.get_ydata()) for drawn in line.lines if drawn.get_linestyle() == "--"]
    assert chords == [[values[0], values[-1]] for values in lines.values()]
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in (contour, surface, line)]
    assert labels == [("direction 1", "direction 2")] * 2 + [("position on the line", "loss")]
    assert (surface.get_zlabel(), bar.get_ylabel()) == ("loss", "loss")
    figure.savefig(tmp_path / "landscape.png")
    assert (tmp_path / "landscape.png").read_bytes().startswith(b"\x89PNG")


def test_weight_norms(tmp_path):
    figure = plot.weight_norms({0.0: [0.5, 1.0, 1.5], 0.01: [0.5, 0.8]})
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3], [1, 2]]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 1.0, 1.5], [0.5, 0.8]]
    assert [line.get_label() for line in axes.lines] == ["0", "0.01"]
    assert axes.lines[0].get_color() != axes.lines[1].get_color()
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("step", r"$\|w\|$", "log")
    figure.savefig(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")


def texts(figure):
    """Every text that is drawn, and the rectangle that it fills."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    artists = [*axes.texts, *axes.get_legend().get_texts()]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in artists]


@pytest.mark.parametrize("widths", [(1, 1), (2, 2, 1), (3, 4, 3, 1), (1, 5, 1)], ids=str)
def test_computation_graph(widths):
    model = MLP(widths[0], widths[1:-1], 1, "tanh", dtype=torch.float64, head="binary")
    graph = backprop.trace(model, torch.randn(widths[0]).double(), 0.0)
    figure = plot.computation_graph(graph)
    (axes,) = figure.axes
    drawn = [text for text, _ in texts(figure)]
    for node in graph.nodes.values():
        assert f"{node.value:.3g}" in drawn
        assert f"{node.gradient:.3g}" in drawn
    for edge in graph.edges:
        assert any(text.endswith(f"{edge.derivative:.3g}") for text in drawn)
        assert not edge.weight or f"{edge.gradient:.3g}" in drawn
    circles = [patch for patch in axes.patches if hasattr(patch, "center")]
    assert len(circles) == len(graph.nodes)
    assert len(axes.patches) == len(circles) + len(graph.edges)
    assert r"$\hat{y}$" in drawn
    assert "$z^{1}_{1}$" in drawn
    # A value has one colour and a gradient another.
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    loss = graph.nodes["loss"].value
    assert colors[f"{loss:.3g}"] != colors["1"]


@pytest.mark.parametrize("widths", [(1, 1), (2, 2, 1), (3, 4, 3, 1), (1, 5, 1), (6, 6, 1)], ids=str)
def test_no_text_of_a_computation_graph_covers_another(widths):
    model = MLP(widths[0], widths[1:-1], 1, dtype=torch.float64, head="regression")
    figure = plot.computation_graph(backprop.trace(model, torch.randn(widths[0]).double(), -1.25))
    for (one, place), (other, elsewhere) in combinations(texts(figure), 2):
        assert not place.overlaps(elsewhere), f"{one} and {other}"
    width, height = figure.get_size_inches() * figure.dpi
    for text, place in texts(figure):
        assert 0 <= place.x0 < place.x1 <= width, text
        assert 0 <= place.y0 < place.y1 <= height, text


def test_decision_regions():
    input = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    target = torch.tensor([0, 1, 1, 0])
    predictors = {
        "right": lambda points: (points.round().sum(-1) == 1).long(),
        "x1": lambda points: (points[:, 0] > 0.5).long(),
    }
    figure = plot.decision_regions(predictors, input, target)
    assert [axes.get_title() for axes in figure.axes] == ["right: 100 %", "x1: 50 %"]
    for axes, predict in zip(figure.axes, predictors.values(), strict=True):
        assert axes.get_xlabel() == "$x_1$"
        assert (axes.get_ylabel() == "$x_2$") == (axes is figure.axes[0])
        regions, zero, one, wrong = axes.collections
        # The colour at each corner of the grid and at each sample is that of the class there.
        colors = torch.as_tensor(regions.get_array()).reshape(300, 300)
        for x in (-0.4, 1.4):
            for y in (-0.4, 1.4):
                place = colors[-1 if y > 0 else 0, -1 if x > 0 else 0]
                assert place == predict(torch.tensor([[x, y]])).item()
        assert zero.get_offsets().tolist() == input[target == 0].tolist()
        assert one.get_offsets().tolist() == input[target == 1].tolist()
        assert len(zero.get_paths()[0]) != len(one.get_paths()[0])  # another marker, not only another colour
        assert wrong.get_offsets().tolist() == input[predict(input) != target].tolist()


def test_decision_regions_of_many_classes_and_one_model():
    input, target = torch.randn(60, 2), torch.arange(60) % 5
    figure = plot.decision_regions({"nearest": lambda points: points[:, 0].clamp(0, 4).long()}, input, target)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*(f"class {label}" for label in range(5)), "wrong"]
