"""torch_mlp/functional: what it makes of its arguments before it calls an op."""

import pytest
import torch

from torch_mlp import functional
from torch_mlp.functional import cross_entropy


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (7, 5, 3), (2, 5, 3, 4), (3, 1, 2), (0, 5, 3), (2, 5, 0)], ids=str)
def test_any_number_of_dimensions(device, shape, reduction, label_smoothing, weighted):
    """Losses and both derivatives as torch's, some rows being ignored."""
    classes = 0 if len(shape) == 1 else 1
    input = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.randint(shape[classes], shape[:classes] + shape[classes + 1 :], device=device)
    target[target == 1] = -100
    weight = torch.rand(shape[classes], dtype=torch.float64, device=device) if weighted else None
    options = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    results = []
    for function in (cross_entropy, torch.nn.functional.cross_entropy):
        loss = function(input, target, **options)
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad(loss, input, torch.randn(loss.shape).to(loss), create_graph=True)
        second = torch.autograd.grad(grad, input, torch.randn(grad.shape).to(grad))
        results.append((loss, grad, *second))
    assert results[0][0].shape == results[1][0].shape
    # Where every row is ignored, or there is none, the mean is NaN in both.
    torch.testing.assert_close(results[0][0], results[1][0], equal_nan=True)
    if results[1][1].isfinite().all():
        torch.testing.assert_close(results[0][1:], results[1][1:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_of_other_integers(device, dtype):
    input, target = torch.randn(7, 5, device=device), torch.randint(5, (7,), device=device)
    assert torch.equal(cross_entropy(input, target.to(dtype)), cross_entropy(input, target))
    expected = torch.nn.functional.cross_entropy(input, target)
    torch.testing.assert_close(cross_entropy(input, target.to(dtype)), expected)


_ROWS, _WEIGHT, _BIAS = torch.randn(4, 5), torch.randn(3, 5), torch.rand(3)
_LOGITS, _CLASSES, _PROBABILITIES = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(4, 3)
_LINEAR_LOSS = {"input": _ROWS, "linear_weight": _WEIGHT, "linear_bias": _BIAS}
TENSORS = {  # the function, then its tensors by name
    functional.linear_act: {"input": _ROWS, "weight": _WEIGHT, "bias": _BIAS},
    functional.linear_sigmoid: {"input": _ROWS, "weight": _WEIGHT, "bias": _BIAS},
    functional.cross_entropy: {"input": _LOGITS, "target": _CLASSES, "weight": _BIAS},
    functional.linear_cross_entropy: {**_LINEAR_LOSS, "target": _CLASSES, "weight": _BIAS},
    functional.binary_cross_entropy_with_logits: {
        "input": _LOGITS,
        "target": _PROBABILITIES,
        "weight": _BIAS,
        "pos_weight": _BIAS,
    },
    functional.linear_binary_cross_entropy: {
        **_LINEAR_LOSS,
        "target": _PROBABILITIES,
        "weight": _BIAS,
        "pos_weight": _BIAS,
    },
}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        pytest.param(function, name, id=f"{function.__name__}: {name}")
        for function, tensors in TENSORS.items()
        for name in tensors
    ],
)
def test_what_is_no_tensor(function, name):
    tensors = TENSORS[function]
    assert function(**tensors).isfinite().all()
    for wrong in (tensors[name].numpy(), tensors[name].tolist(), 1.0):
        with pytest.raises(TypeError, match=rf"\w+: expected {name} to be a Tensor, got {type(wrong).__name__}$"):
            function(**{**tensors, name: wrong})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"input": [[1.0]]}, "mlp_cross_entropy: expected input to be a Tensor, got list"),
        ({"weights": [1.0]}, "mlp_cross_entropy: expected weight to be a Tensor, got float"),
        ({"biases": ["b"]}, "mlp_cross_entropy: expected bias to be a Tensor, got str"),
        ({"target": [0, 1, 2, 0]}, "mlp_cross_entropy: expected target to be a Tensor, got list"),
        ({"weight": 2}, "mlp_cross_entropy: expected weight to be a Tensor, got int"),
    ],
)
def test_what_is_no_tensor_of_a_network(change, sentence):
    tensors = {"input": _ROWS, "weights": [_WEIGHT], "biases": [None], "target": _CLASSES}
    assert functional.mlp_cross_entropy(**tensors).isfinite()
    with pytest.raises(TypeError, match=sentence):
        functional.mlp_cross_entropy(**{**tensors, **change})
