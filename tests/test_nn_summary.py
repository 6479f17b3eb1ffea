"""torch_mlp/nn/summary.py."""

import pytest
import torch

import torch_mlp
from torch_mlp.nn import MLP, LinearSigmoid, summary


def rows_of(model):
    """The cells of each row, which are two spaces or more apart, without the header."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in summary(model).splitlines()[1:]]


def test_the_network_of_the_lecture():
    assert rows_of(MLP(2, [1024, 512], 3)) == [
        ["0", "LinearAct, sigmoid", "(1024, 2)", "1024", "3,072"],
        ["2", "LinearAct, sigmoid", "(512, 1024)", "512", "524,800"],
        ["4", "LinearAct, identity", "(3, 512)", "3", "1,539"],
        ["total", "529,411"],
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [[], [7], [30, 2000, 5]], ids=str)
def test_total_of_a_perceptron_of_any_depth(hidden, bias):
    model = MLP(1000, hidden, 10, "relu", bias)
    assert rows_of(model)[-1] == ["total", f"{model.num_parameters():,}"]


def test_lines_fit_a_page_and_columns_are_aligned():
    lines = summary(MLP(10**6, [2**17, 2**14], 10**5, device="meta")).splitlines()
    assert max(map(len, lines)) <= 100
    assert len({len(line) for line in lines}) == 1
    assert lines == [line.rstrip() for line in lines]


def test_layers_of_other_kinds():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.BatchNorm1d(32), LinearSigmoid(32, 3)
    )
    assert rows_of(model) == [
        ["0", "Conv2d", "(8, 1, 5, 5)", "208"],
        ["1", "ReLU", "0"],
        ["2", "Flatten", "0"],
        ["3", "BatchNorm1d", "(32,)", "64"],
        ["4", "LinearSigmoid, sigmoid", "(3, 32)", "3", "99"],
        ["total", "371"],
    ]


class Tied(torch.nn.Module):
    """A parameter of its own, a layer in two places, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(16))
        self.embedding = torch.nn.Embedding(100, 16)
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh())
        self.again = self.body[0]
        self.head = torch.nn.Linear(16, 100)
        self.head.weight = self.embedding.weight


def test_shared_parameters_count_once_and_it_is_said():
    model = Tied()
    assert rows_of(model) == [
        ["(the model)", "Tied", "16"],
        ["embedding", "Embedding", "(100, 16)", "1,600"],
        ["body.0", "Linear", "(16, 16)", "16", "272"],
        ["body.1", "Tanh", "0"],
        ["again", "Linear", "(16, 16)", "16", "0", "shares body.0.weight, body.0.bias"],
        ["head", "Linear", "(100, 16)", "100", "100", "shares embedding.weight"],
        ["total", "1,988", "each shared one counted once"],
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == 1988


@pytest.mark.parametrize("fuse", [False, True])
def test_a_stock_model_and_what_fuse_makes_of_it(fuse):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    if fuse:
        torch_mlp.fuse(model)
    assert rows_of(model) == [
        ["0", "LinearAct, tanh" if fuse else "Linear", "(4, 5)", "4", "24"],
        ["1", "FusedActivation" if fuse else "Tanh", "0"],
        ["2", "Linear", "(3, 4)", "3", "15"],
        ["total", "39"],
    ]


def test_models_of_one_layer_or_none():
    assert rows_of(torch.nn.Linear(5, 3)) == [["(the model)", "Linear", "(3, 5)", "3", "18"], ["total", "18"]]
    assert rows_of(torch.nn.Sequential()) == [["(the model)", "Sequential", "0"], ["total", "0"]]


def test_parameters_without_a_shape():
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LazyLinear(3))
    with pytest.raises(
        ValueError, match=r"summary: expected parameters that have a shape, got a lazy one in 1\.weight"
    ):
        summary(model)
