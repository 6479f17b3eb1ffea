"""torch_mlp/nn/mlp.py."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import DIFFERENTIABLE

from torch_mlp.functional import cross_entropy
from torch_mlp.nn import MLP
from torch_mlp.nn.mlp import HEADS

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


def loss_by_torch(head, output, target, **options):
    """From what forward gives, in float64."""
    functional = torch.nn.functional
    losses = {
        "regression": functional.mse_loss,
        "binary": functional.binary_cross_entropy_with_logits,
        "multiclass": functional.cross_entropy,
    }
    return losses[head](output.double(), target.double() if head != "multiclass" else target, **options)


def a_target(head, shape, outs, device):
    """Floating-point; for "multiclass" classes without the last dimension."""
    if head == "multiclass":
        return torch.randint(outs, shape[:-1], device=device)
    return torch.randn(shape, device=device) if head == "regression" else torch.randint(2, shape, device=device).float()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("outs", [1, 4])
@pytest.mark.parametrize("hidden", [[], [6, 3]], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_loss_of_each_head(device, head, hidden, outs, reduction):
    model = MLP(5, hidden, outs, "tanh", device=device, head=head)
    input = torch.randn(7, 5, device=device)
    target = a_target(head, (7, outs), outs, device)
    loss = model.loss(input, target, reduction=reduction)
    truth = loss_by_torch(head, model(input), target, reduction=reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)

    grad_output = torch.randn(loss.shape, device=device)
    grads = torch.autograd.grad(loss, list(model.parameters()), grad_output)
    true_grads = torch.autograd.grad(truth, list(model.parameters()), grad_output.double())
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["regression", "binary"])
def test_a_single_output_takes_targets_without_its_dimension(device, head):
    model = MLP(5, [4], 1, device=device, head=head)
    input, target = torch.randn(2, 7, 5, device=device), a_target(head, (2, 7), 1, device)
    assert torch.equal(model.loss(input, target), model.loss(input, target.unsqueeze(-1)))
    assert model.loss(input, target, reduction="none").shape == (2, 7)
    assert model.loss(input[0, 0], target[0, 0]).shape == ()
    assert model.predict(input).shape == (2, 7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("head", ["regression", "binary"])
def test_targets_may_be_integers(device, head, dtype):
    model = MLP(5, [4], 2, device=device, head=head)
    input, target = torch.randn(7, 5, device=device), torch.randint(2, (7, 2), device=device)
    loss = model.loss(input, target.to(dtype))
    assert torch.equal(loss, model.loss(input, target.float()))
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_options_go_to_the_loss(device):
    input, weight = torch.randn(7, 5, device=device), torch.tensor([0.5, 3.0], device=device)
    for head, options in (
        ("binary", {"pos_weight": weight, "weight": weight}),
        ("multiclass", {"weight": weight, "label_smoothing": 0.1}),
    ):
        model = MLP(5, [4], 2, device=device, head=head)
        target = a_target(head, (7, 2), 2, device)
        double = {name: value.double() if name != "label_smoothing" else value for name, value in options.items()}
        truth = loss_by_torch(head, model(input), target, **double)
        torch.testing.assert_close(model.loss(input, target, **options).double(), truth, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="pos_weight"):
        MLP(5, [4], 2, device=device, head="regression").loss(
            input, torch.randn(7, 2, device=device), pos_weight=weight
        )


@pytest.mark.parametrize("head", ["regression", "binary"])
@pytest.mark.parametrize(
    ("outs", "shape", "sentence"),
    [
        (1, (7, 7), r"\(7, 1\), got \(7, 7\)"),
        (1, (1, 7), r"\(7, 1\), got \(1, 7\)"),
        (1, (), r"\(7, 1\), got \(\)"),
        (4, (7,), r"\(7, 4\), got \(7,\)"),
        (4, (7, 1), r"\(7, 4\), got \(7, 1\)"),
        (4, (4,), r"\(7, 4\), got \(4,\)"),
    ],
)
def test_no_target_is_broadcast(head, outs, shape, sentence):
    model, calls = MLP(5, [4], outs, head=head), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"MLP.loss: expected target of shape {sentence}"):
        model.loss(torch.randn(7, 5), torch.zeros(shape))
    assert not calls


@pytest.mark.parametrize("head", HEADS)
def test_a_target_that_is_no_tensor(head):
    with pytest.raises(TypeError, match="expected target to be a Tensor, got list"):
        MLP(5, [4], 1, head=head).loss(torch.randn(2, 5), [0, 0])


@pytest.mark.parametrize("head", HEADS)
def test_loss_calls_a_model_with_hooks(head):
    model, calls = MLP(5, [4], 3, head=head), []
    input, target = torch.randn(7, 5), a_target(head, (7, 3), 3, "cpu")
    before = model.loss(input, target)
    model.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model.loss(input, target), before)
    assert calls == [1]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")  # compiler's
@pytest.mark.parametrize("outs", [1, 3])
@pytest.mark.parametrize("head", HEADS)
def test_loss_compiled_and_under_autocast(device, head, outs):
    model = MLP(5, [4], outs, device=device, head=head)
    input, target = torch.randn(7, 5, device=device), a_target(head, (7, outs), outs, device)
    target = target.squeeze(-1) if outs == 1 else target
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, target), model.loss(input, target))
    with torch.autocast(device, torch.bfloat16):
        loss = model.loss(input, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model.loss(input, target), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("outs", [1, 3])
def test_predictions_of_a_binary_head(device, outs):
    model = MLP(5, 4, outs, "tanh", device=device, head="binary").init_gaussian_(1.0)
    input = torch.randn(2, 7, 5, device=device)
    shape = (2, 7) if outs == 1 else (2, 7, outs)
    probabilities = model.predict_proba(input)
    torch.testing.assert_close(probabilities, 1 / (1 + torch.exp(-model(input).detach().reshape(shape))))
    classes = model.predict(input)
    assert classes.dtype == torch.int64
    assert torch.equal(classes, (probabilities >= 0.5).long())
    assert 0 < classes.sum() < classes.numel()
    assert not probabilities.requires_grad


def test_a_coin_is_heads():
    """A probability of 1/2 is rounded up, as by the step activation."""
    model = MLP(5, [], 1, head="binary")
    torch.nn.init.zeros_(next(model.parameters()))
    torch.nn.init.zeros_(list(model.parameters())[1])
    assert model.predict_proba(torch.randn(3, 5)).tolist() == [0.5] * 3
    assert model.predict(torch.randn(3, 5)).tolist() == [1] * 3


@pytest.mark.parametrize("outs", [1, 3])
def test_predictions_of_a_regression_head(device, outs):
    model = MLP(5, 4, outs, device=device, head="regression")
    input = torch.randn(7, 5, device=device)
    assert torch.equal(model.predict(input), model(input).detach().reshape((7,) if outs == 1 else (7, outs)))
    assert not model.predict(input).requires_grad
    with pytest.raises(
        ValueError, match=r"MLP.predict_proba: expected a head that gives probabilities.*got regression"
    ):
        model.predict_proba(input)


def test_the_head_has_no_parameters():
    keys = [list(MLP(5, [4], 3, head=head).state_dict()) for head in HEADS]
    assert keys[0] == keys[1] == keys[2] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert MLP(5, [4], 3).head == "multiclass"


def test_unknown_head():
    with pytest.raises(
        ValueError, match="MLP: expected head to be one of regression, binary, multiclass, got 'softmax'"
    ):
        MLP(5, [4], 3, head="softmax")


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
