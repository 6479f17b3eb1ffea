"""torch_mlp/nn/mlp.py."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import DIFFERENTIABLE

from torch_mlp.functional import cross_entropy
from torch_mlp.nn import MLP

STOCK = {
    "identity": torch.nn.Identity,
    "sigmoid": torch.nn.Sigmoid,
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
}


def stock_mlp(widths, activation, bias=True):
    layers = []
    for ins, outs in pairwise(widths):
        layers += [torch.nn.Linear(ins, outs, bias), STOCK[activation]()]
    return torch.nn.Sequential(*layers[:-1])


def test_parameter_count_of_the_lecture():
    assert MLP(2, [1024, 512], 3).num_parameters() == 529_411


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [[], [4], [4, 6, 3]], ids=str)
@pytest.mark.parametrize("activation", DIFFERENTIABLE)
def test_as_a_stock_sequential_with_its_checkpoints(device, activation, hidden, bias):
    ours = MLP(5, hidden, 3, activation, bias).to(device)
    stock = stock_mlp([5, *hidden, 3], activation, bias).to(device)
    stock.load_state_dict(ours.state_dict())
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(stock.state_dict())
    assert list(ours.state_dict()) == list(stock.state_dict())

    input, target = torch.randn(7, 5, device=device), torch.randint(3, (7,), device=device)
    torch.testing.assert_close(ours(input), stock(input))
    cross_entropy(ours(input), target).mul(1.7).backward()
    torch.nn.functional.cross_entropy(stock(input), target).mul(1.7).backward()
    for our, their in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(our.grad, their.grad)


def test_one_hidden_layer_may_be_given_as_a_number():
    assert repr(MLP(5, 4, 3)) == repr(MLP(5, [4], 3))


def test_predict(device):
    model = MLP(5, 4, 3).to(device)
    input = torch.randn(2, 7, 5, device=device)
    probabilities = model.predict_proba(input)
    torch.testing.assert_close(probabilities, torch.softmax(model(input), -1))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 7, device=device))
    assert torch.equal(model.predict(input), probabilities.argmax(-1))
    assert not probabilities.requires_grad


def test_gaussian_initialisation():
    model = MLP(300, [400], 500).init_gaussian_(std=0.3, generator=torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert abs(parameter.mean().item()) < 0.01
            assert parameter.std().item() == pytest.approx(0.3, rel=0.02)
    again = MLP(300, [400], 500).init_gaussian_(std=0.3, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_xor_with_weights_chosen_by_hand():
    """Which no network without a hidden layer can; outside of no_grad too, though steps have no gradient."""
    model = MLP(2, 2, 1, "step")
    model.load_state_dict(
        {
            "0.weight": torch.tensor([[1.0, 1.0], [1.0, 1.0]]),  # or, and
            "0.bias": torch.tensor([-0.5, -1.5]),
            "2.weight": torch.tensor([[1.0, -1.0]]),  # or, but not and
            "2.bias": torch.tensor([0.0]),
        }
    )
    output = model(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    assert output.flatten().tolist() == [0, 1, 1, 0]
    assert output.requires_grad


def test_learns_xor():
    """Which no network without a hidden layer can."""
    torch.manual_seed(1)
    input = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    target = torch.tensor([0, 1, 1, 0])
    losses = []
    for hidden in ([], [4]):
        model = MLP(2, hidden, 2).init_gaussian_(std=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        for _ in range(500):
            optimizer.zero_grad()
            loss = cross_entropy(model(input), target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    # The least loss of a linear map is that of a coin; its predictions are then a matter of rounding.
    assert losses[0] >= math.log(2) - 1e-6
    assert losses[1] < 0.01
    assert torch.equal(model.predict(input), target)


@pytest.mark.parametrize("hidden", [[], [4]])
def test_unknown_activation(hidden):
    with pytest.raises(ValueError, match=r"MLP: expected activation to be one of identity, .*, got 'gelu'"):
        MLP(5, hidden, 3, "gelu")


@pytest.mark.parametrize("widths", [(0, [4], 3), (5, [0], 3), (5, [4], 0), (5, [-1], 3)])
def test_widths_must_be_positive(widths):
    with pytest.raises(ValueError, match="MLP: expected every layer to have at least 1 feature, got"):
        MLP(*widths)
