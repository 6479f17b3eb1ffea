"""torch_mlp/plot.py."""

import pytest
import torch

from torch_mlp import plot
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
