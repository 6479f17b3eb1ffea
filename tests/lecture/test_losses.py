"""The losses of the lecture as they are written there, in float64, beside what the package computes of logits."""

import pytest
import torch

from torch_mlp import functional
from torch_mlp.nn import MLP


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def softmax(z):
    return torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)


def one_hot(y, num_classes):
    return (y.unsqueeze(-1) == torch.arange(num_classes)).double()


@pytest.mark.parametrize("head", ["regression", "binary", "multiclass"])
def test_the_loss_is_the_average_over_the_data(head):
    """L(theta) = 1/D sum_i l(y_i, y_hat_i): of all samples at once, one by one, and of unequal parts."""
    model = MLP(3, 4, 1 if head != "multiclass" else 5, dtype=torch.float64, head=head)
    x = normal(12, 3)
    y = {"regression": normal(12), "binary": torch.randint(2, (12,)), "multiclass": torch.randint(5, (12,))}[head]
    loss = model.loss(x, y)
    per_sample = model.loss(x, y, reduction="none")
    assert per_sample.shape == (12,)
    torch.testing.assert_close(loss, per_sample.mean())
    torch.testing.assert_close(per_sample, torch.stack([model.loss(x[i : i + 1], y[i : i + 1]) for i in range(12)]))
    torch.testing.assert_close(loss, (8 * model.loss(x[:8], y[:8]) + 4 * model.loss(x[8:], y[8:])) / 12)


def test_cross_entropy_is_minus_the_log_of_the_probability_of_the_right_class():
    """-sum_k Y_k log p_k with the one-hot Y of class y is -log p_y."""
    z, y = normal(7, 4), torch.randint(4, (7,))
    p, big_y = softmax(z), one_hot(y, 4)
    by_hand = -(big_y * torch.log(p)).sum(-1)
    torch.testing.assert_close(by_hand, -torch.log(p[torch.arange(7), y]))
    torch.testing.assert_close(functional.cross_entropy(z, y, reduction="none"), by_hand)
    torch.testing.assert_close(functional.cross_entropy(z, big_y, reduction="none"), by_hand)


def test_binary_cross_entropy():
    """-(y log p + (1 - y) log(1 - p)), p = sigmoid(z); y in {0, 1} picks one of the two."""
    z, y = normal(9), torch.randint(2, (9,)).double()
    p = sigmoid(z)
    by_hand = -(y * torch.log(p) + (1 - y) * torch.log(1 - p))
    torch.testing.assert_close(by_hand, torch.where(y == 1, -torch.log(p), -torch.log(1 - p)))
    torch.testing.assert_close(functional.binary_cross_entropy_with_logits(z, y, reduction="none"), by_hand)


# Of logits, which are all there is; and of probabilities, which are rounded to 0 and 1 first.
FORMS = {
    "binary": (
        lambda z, y: functional.binary_cross_entropy_with_logits(z[..., 1] - z[..., 0], y.to(z.dtype)),
        lambda z, y: -torch.log(torch.where(y == 1, p := sigmoid(z[..., 1] - z[..., 0]), 1 - p)).mean(),
    ),
    "multiclass": (
        functional.cross_entropy,
        lambda z, y: -torch.log(softmax(z)[torch.arange(len(y)), y]).mean(),
    ),
}
forms = pytest.mark.parametrize(("of_logits", "of_probabilities"), FORMS.values(), ids=FORMS)


@forms
def test_the_form_of_logits_agrees_with_that_of_probabilities(of_logits, of_probabilities):
    z, y = normal(50, 2).mul_(5).requires_grad_(), torch.randint(2, (50,))
    losses = [of_logits(z, y), of_probabilities(z, y)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*[torch.autograd.grad(loss, z)[0] for loss in losses], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 120.0), (torch.float64, 1000.0)], ids=str)
@forms
def test_only_the_form_of_logits_stays_finite(of_logits, of_probabilities, dtype, size):
    """A sure and wrong answer: p is rounded to 0 and log 0 is infinite; of the logits the loss is their distance."""
    z = torch.tensor([[size, 0.0], [0.0, size]], dtype=dtype, requires_grad=True)
    y = torch.tensor([1, 0])
    assert not of_probabilities(z, y).isfinite()
    loss = of_logits(z, y)
    assert loss.item() == size
    loss.backward()
    torch.testing.assert_close(z.grad, torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=dtype))  # (p - Y) / D


def test_softmax_of_two_classes_is_the_sigmoid_of_the_difference():
    """exp(z_1) / (exp(z_0) + exp(z_1)) = 1 / (1 + exp(-(z_1 - z_0))): a network with one output less is enough."""
    two = MLP(3, 4, 2, dtype=torch.float64)
    weight, bias = two.state_dict()["2.weight"], two.state_dict()["2.bias"]
    one = MLP(3, 4, 1, dtype=torch.float64, head="binary")
    one.load_state_dict({**two.state_dict(), "2.weight": weight[1:] - weight[:1], "2.bias": bias[1:] - bias[:1]})
    x, y = normal(20, 3), torch.randint(2, (20,))
    torch.testing.assert_close(one.predict_proba(x), two.predict_proba(x)[:, 1])
    torch.testing.assert_close(one.loss(x, y), two.loss(x, y))
    assert torch.equal(one.predict(x), two.predict(x))


@pytest.mark.parametrize("shift", [-1000.0, 0.5, 1000.0])
def test_softmax_does_not_see_a_shift_of_all_logits(shift):
    """exp(z_k + c) / sum_j exp(z_j + c) = exp(z_k) / sum_j exp(z_j): the same number added to all biases."""
    model, shifted = (MLP(3, 4, 5, dtype=torch.float64) for _ in range(2))
    state = model.state_dict()
    shifted.load_state_dict({**state, "2.bias": state["2.bias"] + shift})
    x, y = normal(20, 3), torch.randint(5, (20,))
    assert (shifted(x) - model(x)).abs().min() > 0.4
    torch.testing.assert_close(shifted.predict_proba(x), model.predict_proba(x), rtol=1e-10, atol=0)
    torch.testing.assert_close(shifted.loss(x, y), model.loss(x, y), rtol=1e-10, atol=0)
    torch.testing.assert_close(model.predict_proba(x), softmax(model(x)).detach())
