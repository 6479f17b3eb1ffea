"""XOR and what neurons with weights by hand can do: scripts/xor.py, and the slides' AND, OR and NAND."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from torch_mlp import nn
from torch_mlp.functional import linear_act

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
SEEDS = range(20)
INPUT = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
XOR = torch.tensor([0, 1, 1, 0])


@pytest.fixture(scope="module")
def xor():
    """The script, whose choice of network and learning rate is to be tested."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        specification = importlib.util.spec_from_file_location("xor", SCRIPTS / "xor.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


def number_right(model):
    return (model.predict(INPUT) == XOR).sum().item()


@pytest.mark.parametrize(
    ("weight", "bias", "table"),
    [
        ([1.0, 1.0], -1.5, [0, 0, 0, 1]),
        ([1.0, 1.0], -0.5, [0, 1, 1, 1]),
        ([-1.0, -1.0], 1.5, [1, 1, 1, 0]),
    ],
    ids=["AND", "OR", "NAND"],
)
def test_a_neuron_by_hand(weight, bias, table):
    output = linear_act(INPUT, torch.tensor([weight]), torch.tensor([bias]), "step")
    assert output.flatten().tolist() == table
    model = nn.Perceptron(2)
    model.load_state_dict({"weight": torch.tensor([weight]), "bias": torch.tensor([bias])})
    assert model.predict(INPUT).tolist() == table


def test_a_network_of_steps_by_hand_is_exact(xor):
    model = xor.step_network()
    assert model.predict(INPUT).tolist() == XOR.tolist()
    hidden = model.get_submodule("0")(INPUT)
    assert hidden[:, 0].tolist() == [0, 1, 1, 1]  # OR
    assert hidden[:, 1].tolist() == [1, 1, 1, 0]  # NAND


def test_no_line_separates_xor():
    """Its four inequalities contradict each other, and a grid of 9261 lines has none with more than three right."""
    values = torch.linspace(-2, 2, 21)
    parameters = torch.cartesian_prod(values, values, values)
    output = (parameters[:, :2] @ INPUT.T + parameters[:, 2:] >= 0).long()
    assert (output == XOR).sum(1).max() == 3


def test_a_perceptron_gets_at_most_three_right(xor):
    for seed in SEEDS:
        torch.manual_seed(seed)
        assert number_right(xor.trained_perceptron()) <= 3
    with pytest.warns(nn.perceptron.NotSeparableWarning):
        assert 0 not in nn.Perceptron(2).fit(INPUT, XOR)


def test_a_linear_network_gets_at_most_three_right(xor):
    """Its layers are one linear map, whose best probability is 1/2 for every point."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = xor.trained_network(4, "identity")
        assert number_right(model) <= 3
        torch.testing.assert_close(model.predict_proba(INPUT), torch.full((4,), 0.5), rtol=0, atol=0.02)
        first, last = (model.get_submodule(name) for name in ("0", "2"))
        one = torch.nn.functional.linear(INPUT, last.weight @ first.weight, last.weight @ first.bias + last.bias)
        torch.testing.assert_close(model(INPUT), one)


def test_an_mlp_gets_all_right(xor):
    """From at least 19 of 20 seeds."""
    right = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        right.append(number_right(xor.trained_network(4, "tanh")) == 4)
    assert sum(right) >= 19
