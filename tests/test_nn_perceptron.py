"""torch_mlp/nn/perceptron.py; what the lecture says of it is in tests/lecture."""

import copy
import math
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import DTYPES

from torch_mlp.nn import Perceptron
from torch_mlp.nn.perceptron import NotSeparableWarning


def make(samples=300, features=4, device="cpu", seed=0):
    """Integers, so that sums are exact in whatever order, and labels that a line separates; some lie close to it."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randint(-5, 6, (samples, features), generator=generator).float()
    return input.to(device), (input.sum(1) > 0).long().to(device)


def learn_by_hand(input, target, epochs, generator):
    """The learning rule, a sample at a time, with learning rate 1."""
    weight, bias, mistakes = torch.zeros(input.shape[1]), 0.0, []
    for _ in range(epochs):
        mistakes.append(0)
        for i in torch.randperm(len(input), generator=generator).tolist():
            error = target[i].item() - (1 if weight @ input[i] + bias >= 0 else 0)
            weight, bias = weight + error * input[i], bias + error
            mistakes[-1] += error != 0
    return weight, bias, mistakes


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_linear_and_0(device, bias):
    model, stock = Perceptron(5, bias, device), torch.nn.Linear(5, 1, bias, device)
    assert list(model.state_dict()) == list(stock.state_dict()) == ["weight", "bias"][: 1 + bias]
    assert all(not value.any() for value in model.state_dict().values())
    model.load_state_dict(stock.state_dict())
    assert torch.equal(model.weight, stock.weight)
    model.reset_parameters()
    assert not model.weight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_predict(device, dtype):
    model = Perceptron(5, device=device, dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    input = torch.randn(2, 7, 5, device=device, dtype=dtype)
    stock = torch.nn.functional.linear(input, model.weight, model.bias)
    assert torch.equal(model(input), (stock >= 0).to(dtype))
    classes = model.predict(input)
    assert (classes.shape, classes.dtype) == ((2, 7), torch.int64)
    assert torch.equal(classes, (stock >= 0).squeeze(-1).long())


@pytest.mark.parametrize("samples", [1, 128, 129, 300])
def test_fit_is_the_rule_sample_by_sample(device, samples):
    """Though mistakes are looked for in whole blocks; up to 300 samples make more than two of them."""
    input, target = make(samples)
    weight, bias, mistakes = learn_by_hand(input, target, 3, torch.Generator().manual_seed(7))
    model = Perceptron(4, device=device)
    with pytest.warns(NotSeparableWarning) if mistakes[-1] else nullcontext():
        found = model.fit(input.to(device), target.to(device), max_epochs=3, generator=torch.Generator().manual_seed(7))
    assert found == mistakes[: len(found)]
    assert model.weight.tolist() == [weight.tolist()]
    assert model.bias.tolist() == [bias]


def test_without_bias_the_line_goes_through_the_origin(device):
    input, _ = make(device=device)
    model = Perceptron(4, bias=False, device=device)
    assert model.fit(input, input[:, 0] >= 0, max_epochs=1000)[-1] == 0
    assert model.bias is None
    assert model.predict(torch.zeros(1, 4, device=device)).tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fit_in_every_dtype(device, dtype):
    model = Perceptron(4, device=device, dtype=dtype)
    input = torch.eye(4, device=device, dtype=dtype)
    assert model.fit(input, torch.tensor([[1], [-1], [-1], [1]], device=device))[-1] == 0
    assert model.predict(input).tolist() == [1, 0, 0, 1]
    assert model.weight.dtype == dtype


def test_it_ends_after_an_epoch_without_mistakes(device):
    input, target = make(device=device)
    model = Perceptron(4, device=device)
    mistakes = model.fit(input, target, max_epochs=1000)
    assert mistakes[-1] == 0
    assert 0 not in mistakes[:-1]
    assert model.fit(input, target) == [0]  # goes on from there


def test_the_generator_gives_the_order(device):
    input, target = make(device=device)
    fits = []
    for seed in (1, 1, 2):
        model = Perceptron(4, device=device)
        mistakes = model.fit(input, target, max_epochs=1000, generator=torch.Generator().manual_seed(seed))
        fits.append((mistakes, model.weight.tolist()))
    assert fits[0] == fits[1] != fits[2]


def test_fit_leaves_its_arguments_and_the_gradients_alone(device):
    input, target = make(device=device)
    before = input.clone(), target.clone()
    model = Perceptron(4, device=device)
    model.fit(input.requires_grad_(), target, max_epochs=1000)
    assert torch.equal(input, before[0])
    assert torch.equal(target, before[1])
    assert input.grad is None
    assert model.weight.grad is None
    assert model.weight.is_leaf
    assert model.weight.requires_grad


def test_warning_points_at_the_call():
    with pytest.warns(NotSeparableWarning, match="of 2 samples still mistaken in the last of 5 epochs") as found:
        Perceptron(1).fit(torch.ones(2, 1), torch.tensor([0, 1]), max_epochs=5)
    assert found[0].filename == __file__
    assert issubclass(NotSeparableWarning, UserWarning)


def test_ctrl_c_leaves_what_was_learned():
    class Interrupted(Perceptron):
        calls = 0

        def forward(self, input):
            self.calls += 1
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().forward(input)

    model, (input, target) = Interrupted(4), make()
    with pytest.raises(KeyboardInterrupt):
        model.fit(input, target)
    assert model.weight.any()


def test_progress(capsys, monkeypatch):
    """A bar on a terminal, and without one no need of tqdm."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    input, target = make()
    model = Perceptron(4)
    epochs = len(model.fit(input, target, max_epochs=1000, progress=True))
    assert f"{epochs}/1000" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert model.fit(input, target) == [0]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"input": torch.ones(3)}, ValueError, r"expected input of shape \(N, 2\), got \(3,\)"),
        ({"input": torch.ones(3, 4)}, ValueError, r"expected input of shape \(N, 2\), got \(3, 4\)"),
        ({"input": torch.tensor([[0.0, math.nan]] * 3)}, ValueError, "expected input to be finite"),
        ({"input": torch.ones(3, 2).double()}, RuntimeError, "expected weight of the dtype of input"),
        ({"input": torch.ones(3, 2).long()}, RuntimeError, "expected input of dtype"),
        ({"target": torch.tensor([0, 1, 2])}, ValueError, r"every one in \{-1, \+1\}, got 0, 1, 2"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"expected target of shape \(3,\), got \(2,\)"),
        ({"lr": 0.0}, ValueError, "expected lr and max_epochs above 0, got 0.0 and 100"),
        ({"lr": math.inf}, ValueError, "expected lr and max_epochs above 0, got inf and 100"),
        ({"max_epochs": 0}, ValueError, "expected lr and max_epochs above 0, got 1.0 and 0"),
    ],
    ids=str,
)
def test_errors(change, error, sentence):
    """Before anything moves."""
    model = Perceptron(2)
    good = {"input": torch.tensor([[0.0, 1.0]] * 3), "target": torch.tensor([0, 1, 1])}
    with pytest.raises(error, match=sentence):
        model.fit(**{**good, **change})
    assert not model.weight.any()


def test_copies_are_their_own():
    model, (input, target) = Perceptron(4), make()
    twin = copy.deepcopy(model)
    twin.fit(input, target, max_epochs=1000)
    assert twin.weight.any()
    assert not model.weight.any()


def test_repr():
    assert repr(Perceptron(2)) == "Perceptron(in_features=2, out_features=1, bias=True, activation=step)"
