"""torch_mlp/functional: what it makes of its arguments before it calls an op."""

import pytest
import torch

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
