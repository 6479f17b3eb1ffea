"""torch_mlp/nn/loss.py."""

import copy
import pickle

import pytest
import torch

from torch_mlp.nn import BCEWithLogitsLoss, CrossEntropyLoss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"reduction": "sum", "ignore_index": 2},
        {"weight": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0]), "label_smoothing": 0.3},
    ],
    ids=str,
)
def test_as_torch(device, options):
    ours, stock = CrossEntropyLoss(**options).to(device), torch.nn.CrossEntropyLoss(**options).to(device)
    input = torch.randn(7, 5, device=device, requires_grad=True)
    target = torch.randint(5, (7,), device=device)
    loss, expected = ours(input, target), stock(input, target)
    torch.testing.assert_close(loss, expected)
    grad_output = torch.randn_like(loss)
    our, their = (torch.autograd.grad(value, input, grad_output)[0] for value in (loss, expected))
    torch.testing.assert_close(our, their)


def test_state_dict_moves_both_ways():
    weight = torch.rand(5)
    ours, stock = CrossEntropyLoss(weight.clone()), torch.nn.CrossEntropyLoss(torch.ones(5))
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(stock.weight, weight)
    ours.load_state_dict(torch.nn.CrossEntropyLoss(2 * weight).state_dict())
    assert torch.equal(ours.weight, 2 * weight)


def test_label_out_of_range():
    with pytest.raises(IndexError, match=r"cross_entropy: expected target in \[0, 5\) or ignore_index -100, got 5"):
        CrossEntropyLoss()(torch.randn(1, 5), torch.tensor([5]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"weight": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0]), "pos_weight": torch.tensor(2.5), "reduction": "sum"},
        {"pos_weight": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])},
    ],
    ids=str,
)
def test_binary_as_torch(device, options):
    ours, stock = (module(**options).to(device) for module in (BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss))
    input = torch.randn(7, 5, device=device, requires_grad=True)
    target = torch.rand(7, 5, device=device)
    loss, expected = ours(input, target), stock(input, target)
    torch.testing.assert_close(loss, expected)
    grad_output = torch.randn_like(loss)
    our, their = (torch.autograd.grad(value, input, grad_output)[0] for value in (loss, expected))
    torch.testing.assert_close(our, their)


def test_binary_state_dict_and_copies():
    weight, pos_weight = torch.rand(5), torch.rand(5)
    ours = BCEWithLogitsLoss(weight, pos_weight=pos_weight)
    stock = torch.nn.BCEWithLogitsLoss(torch.ones(5), pos_weight=torch.ones(5))
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(stock.pos_weight, pos_weight)
    ours.load_state_dict({name: 2 * value for name, value in stock.state_dict().items()})
    assert torch.equal(ours.pos_weight, 2 * stock.pos_weight)
    input, target = torch.randn(7, 5), torch.rand(7, 5)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(input, target), ours(input, target))
