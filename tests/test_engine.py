"""torch_mlp/engine.py: which models the compiled op trains, and what is said of the others."""

import pytest
import torch

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
