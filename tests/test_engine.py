"""torch_mlp/engine.py: which models the compiled op trains, and what is said of the others."""

import pytest
import torch
from conftest import assert_same_bits, clones

from torch_mlp import nn, train_epoch
from torch_mlp.engine import choose_engine, layers_of


def some_data():
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (200, 40), generator=generator, dtype=torch.uint8)
    return images, torch.randint(5, (200,), generator=generator)


SEQUENTIAL = torch.nn.Sequential
LINEAR = torch.nn.Linear


def test_stock_layers_are_trained_too():
    images, labels = some_data()
    model = SEQUENTIAL(torch.nn.Flatten(), LINEAR(40, 12), torch.nn.Tanh(), nn.LinearSigmoid(12, 8), LINEAR(8, 5))
    twin = nn.MLP(40, [12, 8], 5)
    assert [layer.activation for layer in layers_of(model)] == ["tanh", "sigmoid", "identity"]
    assert choose_engine(model) == choose_engine(twin) == "epoch"
    before = train_epoch(model, images, labels, batch_size=20, lr=0.5)
    for _ in range(20):
        after = train_epoch(model, images, labels, batch_size=20, lr=0.5)
    assert after < before


def hooked():
    model = nn.MLP(40, [12], 5)
    next(model.children()).register_forward_hook(lambda *_: None)
    return model


def tied():
    model = SEQUENTIAL(LINEAR(5, 5), torch.nn.Tanh(), LINEAR(5, 5))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("engine", ["auto", "epoch", "autograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_do_not_learn(engine, dtype):
    """Said before anything moves, the random numbers included."""
    images, labels = some_data()
    model = nn.MLP(40, [12], 5, "step", dtype=dtype)
    before, state = clones(list(model.parameters())), torch.get_rng_state()
    sentence = "train_epoch: expected activations with a derivative, got step in layer 0, which gradient descent cannot"
    with pytest.raises(ValueError, match=sentence):
        train_epoch(model, images, labels, batch_size=20, lr=0.5, momentum=0.9, engine=engine)
    assert_same_bits(before, list(model.parameters()))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_do_not_learn_in_the_op(device, dtype):
    images, labels = (tensor.to(device) for tensor in some_data())
    parameters = [torch.randn(shape, device=device, dtype=dtype) for shape in [(12, 40), (5, 12), (12,), (5,)]]
    before = clones(parameters)
    rates, order = torch.full((10,), 0.5, dtype=torch.float64), torch.arange(200, device=device)
    with pytest.raises(RuntimeError, match="_train_epoch: expected an activation with a derivative, got step"):
        torch.ops.torch_mlp._train_epoch(
            images,
            labels,
            order,
            parameters[:2],
            parameters[2:],
            [],
            ["step", "identity"],
            20,
            rates,
            0,
            0,
            1,
            0,
            False,
        )
    assert_same_bits(before, parameters)


def test_what_follows_frozen_steps_learns():
    images, labels = some_data()
    model = nn.MLP(40, [12], 5, "step")
    first, last = model.children()
    first.requires_grad_(False)
    (before,) = clones([last.weight])
    assert choose_engine(model) == "autograd"
    train_epoch(model, images, labels, batch_size=20, lr=0.5)
    assert not torch.equal(before, last.weight)


def frozen():
    model = nn.MLP(40, [12], 5)
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: LINEAR(40, 5), "expected an MLP or a Sequential of linear layers, got Linear"),
        (lambda: SEQUENTIAL(LINEAR(40, 5), torch.nn.Dropout()), "got Dropout as layer 1"),
        (lambda: SEQUENTIAL(torch.nn.Tanh(), LINEAR(40, 5)), "got Tanh as layer 0"),
        (lambda: SEQUENTIAL(LINEAR(40, 5), torch.nn.ReLU()), "expected a last layer that gives logits, got a relu"),
        (lambda: SEQUENTIAL(), "expected a network of at least one linear layer, got none"),
        (
            lambda: nn.MLP(40, [12], 5).half(),
            r"expected float32 or float64 parameters, .* got torch.float16 on cpu in 0.weight",
        ),
        (hooked, r"expected layers without hooks, got some on 0 \(LinearAct\)"),
        (tied, r"expected parameters of their own, got \d.weight and \d.weight that share memory"),
        (frozen, "got one in 0.weight that requires no grad"),
    ],
)
def test_models_the_op_cannot_train(model, sentence):
    images, labels = some_data()
    model = model()
    with pytest.raises(ValueError, match=f"train_epoch: .*{sentence}.*; use the engine autograd"):
        train_epoch(model, images, labels, batch_size=10, lr=0.1, engine="epoch")
    assert choose_engine(model) == "autograd"


@pytest.mark.parametrize("engine", ["auto", "epoch", "autograd"])
@pytest.mark.parametrize("criterion", [None, nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(label_smoothing=0.1)])
@pytest.mark.parametrize("head", ["regression", "binary"])
def test_the_softmax_cross_entropy_is_not_the_loss_of_another_head(head, criterion, engine):
    images, labels = some_data()
    model = nn.MLP(40, [12], 5, head=head)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sentence = f"train_epoch: expected a model with head multiclass for the softmax cross-entropy, .*got head {head}"
    with pytest.raises(ValueError, match=sentence):
        train_epoch(model, images, labels, batch_size=10, lr=0.1, criterion=criterion, engine=engine)
    assert all(torch.equal(left, right) for left, right in zip(before, model.parameters(), strict=True))


def test_another_head_is_trained_by_a_criterion_of_its_own():
    class OneAgainstTheRest(torch.nn.Module):
        def forward(self, logits, labels):
            target = torch.nn.functional.one_hot(labels, 5).to(logits.dtype)
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)

    images, labels = some_data()
    model, criterion = nn.MLP(40, [12], 5, head="binary"), OneAgainstTheRest()
    assert choose_engine(model, criterion) == "autograd"
    losses = [train_epoch(model, images, labels, batch_size=20, lr=0.5, criterion=criterion) for _ in range(20)]
    assert losses[-1] < losses[0]
