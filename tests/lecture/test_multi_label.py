"""Labels of which any number may be right: 28 sigmoids, as for the 28 places in a cell where a protein can be."""

import pytest
import torch

from torch_mlp.nn import MLP

LABELS = 28


@pytest.fixture(scope="module")
def data():
    """Training and test samples of 20 features; each label is there where its own bent function is above a threshold.

    The thresholds differ, so that some labels are rare and others are not.
    """
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(3000, 20, generator=generator)
    first, second = torch.randn(20, 32, generator=generator) / 4, torch.randn(32, LABELS, generator=generator)
    score = torch.tanh(input @ first) @ second
    shares = torch.linspace(0.2, 0.8, LABELS)
    thresholds = torch.stack([torch.quantile(score[:, k], 1 - share) for k, share in enumerate(shares.tolist())])
    target = (score > thresholds).float()
    return input[:2000], target[:2000], input[2000:], target[2000:]


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    model = MLP(20, 64, LABELS, "tanh", head="binary")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    for _ in range(10):
        for rows in torch.randperm(2000).split(50):
            optimizer.zero_grad()
            model.loss(data[0][rows], data[1][rows]).backward()
            optimizer.step()
    return model


def test_every_label_is_learned(data, model):
    """Better than always saying what is more frequent, whose accuracy is that of the more frequent answer."""
    _, train_target, input, target = data
    majority = (train_target.mean(0) >= 0.5).float()
    baseline = (target == majority).float().mean(0)
    accuracy = (model.predict(input) == target).float().mean(0)
    assert (accuracy > baseline + 0.05).all()
    assert accuracy.mean() > 0.9 > 0.7 > baseline.mean()


def test_probabilities_of_labels_do_not_sum_to_1(data, model):
    """They sum to the number of labels that are to be expected, which differs from sample to sample."""
    _, _, input, target = data
    sums = model.predict_proba(input).sum(-1)
    assert sums.max() > 10
    assert sums.std() > 1
    assert sums.mean().item() == pytest.approx(target.sum(-1).mean().item(), rel=0.05)
    assert model.predict(input).sum(-1).max() > 10


def test_the_loss_of_a_label_reaches_its_own_output_only():
    """The labels share the hidden layer, but not the last one; a softmax would couple all outputs."""
    input = torch.randn(7, 20, dtype=torch.float64)
    model = MLP(20, 6, LABELS, dtype=torch.float64, head="binary")
    target = torch.randint(2, (7, LABELS))
    hidden, _, weight, bias = model.parameters()
    loss = model.loss(input, target, reduction="none")
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(
        loss[:, 3], (hidden, weight, bias), torch.randn(7, dtype=torch.float64)
    )
    others = torch.arange(LABELS) != 3
    assert not grad_weight[others].any()
    assert not grad_bias[others].any()
    assert grad_weight[3].all()
    assert grad_bias[3] != 0
    assert grad_hidden.all()

    coupled = MLP(20, 6, LABELS, dtype=torch.float64)
    loss = coupled.loss(input, torch.full((7,), 3))
    assert torch.autograd.grad(loss, list(coupled.parameters())[2])[0].all()


def test_the_loss_is_that_of_independent_networks_with_one_output():
    """The mean over labels of binary cross-entropies, each of the label's own sigmoid."""
    input, target = torch.randn(7, 20, dtype=torch.float64), torch.randint(2, (7, LABELS))
    model = MLP(20, 6, LABELS, dtype=torch.float64, head="binary")
    state = model.state_dict()
    losses = []
    for k in range(LABELS):
        single = MLP(20, 6, 1, dtype=torch.float64, head="binary")
        single.load_state_dict(
            {**state, "2.weight": state["2.weight"][k : k + 1], "2.bias": state["2.bias"][k : k + 1]}
        )
        losses.append(single.loss(input, target[:, k]))
    torch.testing.assert_close(model.loss(input, target), torch.stack(losses).mean())
