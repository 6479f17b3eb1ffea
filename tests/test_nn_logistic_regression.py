"""torch_mlp/nn/logistic_regression.py and labels.py; what the lecture says of it is in tests/lecture."""

import copy
import math

import pytest
import torch
from conftest import DTYPES
from torch.nn.utils import prune

from torch_mlp.nn import LogisticRegression

LABELS = [*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.float8_e4m3fn]
UNSIGNED = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def expected_loss(model, input, target, reduction="mean"):
    """By torch, of targets of 0 and 1."""
    logits = torch.nn.functional.linear(input, model.weight, model.bias).squeeze(-1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.to(logits), reduction=reduction)
    return loss + model.weight_decay / 2 * model.weight.square().sum()


@pytest.mark.parametrize("bias", [True, False])
def test_initialisation_and_state_dict_are_those_of_linear(bias):
    torch.manual_seed(3)
    ours = LogisticRegression(5, bias)
    torch.manual_seed(3)
    stock = torch.nn.Linear(5, 1, bias)
    assert list(ours.state_dict()) == list(stock.state_dict()) == ["weight", "bias"][: 1 + bias]
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in stock.state_dict().items())
    stock.load_state_dict({name: value + 1 for name, value in ours.state_dict().items()})
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours.weight, stock.weight)


@pytest.mark.parametrize("shape", [(7,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_loss_and_predictions(device, dtype, bias, shape):
    model = LogisticRegression(5, bias, 0.3, device, dtype)
    input = torch.randn(*shape, 5, device=device, dtype=dtype)
    target = torch.randint(2, shape, device=device)
    stock = torch.nn.functional.linear(input, model.weight, model.bias)
    torch.testing.assert_close(model(input), stock)
    tolerance = {} if dtype in (torch.float64, torch.float32) else {"rtol": 0.02, "atol": 0.02}
    for reduction in ("mean", "sum"):
        loss, expected = model.loss(input, target, reduction), expected_loss(model, input, target, reduction)
        torch.testing.assert_close(loss, expected, **tolerance)
        upstream = torch.tensor(-1.7).to(loss)
        ours, theirs = (torch.autograd.grad(each, list(model.parameters()), upstream) for each in (loss, expected))
        torch.testing.assert_close(ours, theirs, **tolerance)
    probabilities, classes = model.predict_proba(input), model.predict(input)
    torch.testing.assert_close(probabilities, torch.sigmoid(stock).squeeze(-1).detach(), **tolerance)
    assert probabilities.shape == classes.shape == shape
    assert classes.dtype == torch.int64
    assert torch.equal(classes, (model(input) >= 0).squeeze(-1).long())
    assert not probabilities.requires_grad


@pytest.mark.parametrize("dtype", [*LABELS, *UNSIGNED], ids=str)
def test_labels_of_every_dtype_and_both_shapes(device, dtype):
    model, input = LogisticRegression(5).to(device), torch.randn(7, 5, device=device)
    target = torch.tensor([0, 1, 1, 0, 1, 0, 1], device=device)
    expected = expected_loss(model, input, target)
    kinds = [target] if dtype in UNSIGNED else [target, 2 * target - 1]
    for labels in kinds:
        for shaped in (labels, labels.unsqueeze(1)):
            before = shaped.to(dtype)
            torch.testing.assert_close(model.loss(input, before), expected)


@pytest.mark.parametrize("label", [0, 1, -1])
def test_labels_that_are_all_the_same(device, label):
    model, input = LogisticRegression(5).to(device), torch.randn(7, 5, device=device)
    target = torch.full((7,), label, device=device)
    torch.testing.assert_close(model.loss(input, target), expected_loss(model, input, (target > 0).long()))


def test_labels_are_left_as_they_are(device):
    target = torch.tensor([-1.0, 1.0], device=device)
    LogisticRegression(3).to(device).loss(torch.randn(2, 3, device=device), target)
    assert target.tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (torch.tensor([0, 1, 2]), r"every target in \{0, 1\}, or every one in \{-1, \+1\}, got 0, 1, 2$"),
        (torch.tensor([0.5, 1.0, 0.0]), "got 0, 0.5, 1$"),
        (torch.tensor([0.0, math.nan, 1.0]), "got 0, 1, nan$"),
        (torch.tensor([0, -1, 1]), "got -1, 0, 1$"),
        (torch.tensor([255, 1, 1], dtype=torch.uint8), "got 1, 255$"),
        (torch.tensor([1.0, 1.0, 1.0 + 1e-12], dtype=torch.float64), "got 1, 1$"),
        (torch.tensor([1.0, 0.0, 1.0]).cfloat(), "expected target of an integer, floating-point or bool dtype, got"),
        (torch.tensor([0, 1]), r"expected target of shape \(3,\), got \(2,\)"),
        (torch.tensor([[0, 1, 1]]), r"expected target of shape \(3,\), got \(1, 3\)"),
        (torch.tensor(1), r"expected target of shape \(3,\), got \(\)"),
    ],
    ids=str,
)
def test_bad_labels(device, target, sentence):
    model = LogisticRegression(5).to(device)
    with pytest.raises(ValueError, match="LogisticRegression.loss: .*" + sentence):
        model.loss(torch.randn(3, 5, device=device), target.to(device))


@pytest.mark.parametrize("weight_decay", [-0.1, math.inf, math.nan])
def test_bad_weight_decay(weight_decay):
    with pytest.raises(ValueError, match=f"expected weight_decay to be finite and at least 0, got {weight_decay}"):
        LogisticRegression(5, weight_decay=weight_decay)


def test_other_errors():
    model, input, target = LogisticRegression(5, weight_decay=0.1), torch.randn(3, 5), torch.ones(3)
    with pytest.raises(ValueError, match="expected reduction mean or sum with weight_decay"):
        model.loss(input, target, reduction="none")
    with pytest.raises(ValueError, match="expected reduction to be one of none, mean, sum, got 'avg'"):
        model.loss(input, target, reduction="avg")
    with pytest.raises(RuntimeError, match=r"expected weight of shape \(out_features, 4\), got \(1, 5\)"):
        model.loss(torch.randn(3, 4), target)
    with pytest.raises(TypeError, match=r"LogisticRegression.loss: expected target to be a Tensor, got list"):
        model.loss(input, [1, 0, 1])


def test_copies_keep_the_weight_decay(device):
    model = LogisticRegression(5, weight_decay=0.3).to(device)
    input, target = torch.randn(3, 5, device=device), torch.tensor([-1, 1, 1], device=device)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.loss(input, target), model.loss(input, target))
    with torch.no_grad():
        twin.weight.zero_()
    assert model.weight.abs().max() > 0


def test_repr():
    assert repr(LogisticRegression(2, weight_decay=0.1)) == (
        "LogisticRegression(in_features=2, bias=True, weight_decay=0.1)"
    )


def test_loss_compiled_and_per_sample(device):
    """There nobody looks at the labels: one that is none makes the loss NaN."""
    model = LogisticRegression(5, weight_decay=0.3).to(device)
    input, target = torch.randn(4, 5, device=device), torch.tensor([1, -1, -1, 1], device=device)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, target), model.loss(input, target))
    each = torch.func.vmap(model.loss)(input, target)
    torch.testing.assert_close(each, torch.stack([model.loss(*pair) for pair in zip(input, target, strict=True)]))
    assert compiled(input, 2 * target).isnan()
    assert torch.func.vmap(model.loss)(input, 0.5 * target).isnan().all()


def test_autocast(device):
    """The loss and its penalty in float32."""
    model = LogisticRegression(5, weight_decay=0.3).to(device)
    input, target = torch.randn(4, 5, device=device), torch.tensor([1, -1, -1, 1], device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = model.loss(input, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model.loss(input, target), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_calls_a_layer_with_hooks(device, dtype, reduction):
    """Pruning computes the weight in one, after each step from the one that learns."""
    model = LogisticRegression(8, weight_decay=0.3, device=device, dtype=dtype)
    prune.l1_unstructured(model, "weight", amount=0.5)
    input = torch.randn(6, 8, device=device, dtype=dtype)
    target = torch.randint(2, (6,), device=device)
    for _ in range(3):
        loss, before = model.loss(input, target, reduction), model.weight_orig.detach().clone()
        model(input)  # for the reference
        torch.testing.assert_close(model.weight, before * model.weight_mask)
        expected = expected_loss(model, input, target, reduction)
        tolerance = {} if dtype in (torch.float64, torch.float32) else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(loss, expected, **tolerance)
        parameters = list(model.parameters())
        ours, theirs = (torch.autograd.grad(each, parameters) for each in (loss, expected))
        torch.testing.assert_close(ours, theirs, **tolerance)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, ours, strict=True):
                parameter -= 0.5 * gradient
    assert torch.equal(model.weight == 0, model.weight_mask == 0)
    with pytest.raises(ValueError, match="expected reduction mean or sum with weight_decay"):
        model.loss(input, target, "none")


def test_loss_on_the_meta_device():
    loss = LogisticRegression(3, device="meta").loss(
        torch.empty(6, 3, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    )
    assert loss.shape == ()
    assert loss.is_meta
