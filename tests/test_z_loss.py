"""``return_lse`` and ``z_loss`` of the cross-entropies of torch_mlp/functional."""

import pytest
import torch
from conftest import assert_same_bits, clones
from torch.autograd import gradcheck, gradgradcheck

from torch_mlp.functional import cross_entropy

KINDS = ["classes", "probabilities"]
kinds = pytest.mark.parametrize("kind", KINDS)
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def make(device, kind, dtype=torch.float64, shape=(7, 5)):
    """input, target (of classes, one is ignored) and weight."""
    input = (3 * torch.randn(shape, dtype=torch.float64)).to(device, dtype).requires_grad_()
    weight = torch.rand(shape[1], dtype=torch.float64).to(device, dtype)
    if kind == "probabilities":
        return input, torch.rand(shape, dtype=torch.float64).to(device, dtype), weight
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    target[2] = -100
    return input, target, weight


def expected(input, target, weight, reduction, z_loss, **options):
    """Loss and lse of torch."""
    is_kept = torch.ones_like(input.select(1, 0), dtype=torch.bool) if target.is_floating_point() else target >= 0
    lse = torch.logsumexp(input, 1).where(is_kept, 0)
    loss = torch.nn.functional.cross_entropy(input, target, weight, reduction=reduction, **options)
    if reduction == "none":
        return loss + z_loss * lse.square(), lse
    divisor = 1.0
    if reduction == "mean":
        divisor = is_kept.numel() if target.is_floating_point() else weight[target[is_kept]].sum()
    return loss + z_loss * lse.square().sum() / divisor, lse


@pytest.mark.parametrize("shape", [(7, 5), (40, 1000), (4, 5, 3)], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@reductions
@kinds
def test_values_and_gradients(device, kind, reduction, z_loss, shape):
    input, target, weight = make(device, kind, shape=shape)
    options = {"reduction": reduction, "z_loss": z_loss, "label_smoothing": 0.1}
    ours = cross_entropy(input, target, weight, return_lse=True, **options)
    theirs = expected(input, target, weight, **options)
    torch.testing.assert_close(ours, theirs)
    upstream = [torch.randn_like(result) for result in theirs]
    for used in (slice(None), slice(1), slice(1, 2)):  # both results, and each alone
        gradients = [
            torch.autograd.grad(results[used], input, upstream[used], retain_graph=True) for results in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients)


@reductions
@kinds
def test_loss_is_the_same_without_lse(device, kind, reduction):
    input, target, weight = make(device, kind)
    options = {"reduction": reduction, "z_loss": 0.2}
    alone = cross_entropy(input, target, weight, **options)
    assert torch.equal(alone, cross_entropy(input, target, weight, return_lse=True, **options)[0])
    assert not torch.equal(alone, cross_entropy(input, target, weight, reduction=reduction))


def test_lse_of_no_classes(device):
    """-inf, as of any empty sum."""
    input = torch.empty(3, 0, device=device)
    _, lse = cross_entropy(input, input, return_lse=True)
    torch.testing.assert_close(lse, torch.logsumexp(input, 1))


@reductions
@kinds
def test_gradcheck(device, kind, reduction):
    input, target, weight = make(device, kind)

    def results(input):
        return cross_entropy(input, target, weight, reduction=reduction, return_lse=True, z_loss=0.1)

    assert gradcheck(results, input, nondet_tol=0.0)
    assert gradgradcheck(results, input, nondet_tol=0.0)


@kinds
def test_dtype_of_lse(device, kind):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        input, target, weight = make(device, kind, dtype)
        loss, lse = cross_entropy(input, target, weight, return_lse=True, z_loss=0.1)
        assert (loss.dtype, lse.dtype) == (dtype, torch.float32)
        theirs = expected(input.double(), target, weight.double(), "mean", 0.1)
        torch.testing.assert_close(lse, theirs[1].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, theirs[0].to(dtype))


def test_an_ignored_row_has_no_part(device):
    input, target, weight = make(device, "classes")
    with torch.no_grad():
        input[2] = torch.nan
    loss, lse = cross_entropy(input, target, weight, return_lse=True, z_loss=0.1)
    (grad,) = torch.autograd.grad((loss, lse), input, (torch.tensor(0.7).to(loss), torch.randn_like(lse)))
    assert loss.isfinite()
    assert lse[2] == 0
    assert not grad[2].any()
    assert grad.isfinite().all()


@kinds
def test_functional_transforms(device, kind):
    input, target, weight = make(device, kind)

    def of_row(row, target, function=cross_entropy):
        loss, lse = function(row.unsqueeze(0), target.unsqueeze(0), weight, reduction="sum", z_loss=0.1)
        return loss + lse.sum()

    def ours(row, target):
        return of_row(row, target, lambda *a, **k: cross_entropy(*a, return_lse=True, **k))

    hessians = [
        torch.vmap(torch.func.hessian(function))(input[3:].detach(), target[3:])
        for function in (ours, lambda row, target: of_row(row, target, expected))
    ]
    torch.testing.assert_close(*hessians)


@kinds
def test_compiles(kind):
    input, target, weight = make("cpu", kind)

    def both(input):
        loss, lse = cross_entropy(input, target, weight, return_lse=True, z_loss=0.1)
        return loss + lse.square().mean()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(function(input), input, torch.tensor(1.3).double()) for function in (both, compiled)]
    torch.testing.assert_close(*grads)


@kinds
def test_nothing_is_clobbered(device, kind):
    input, target, weight = make(device, kind)
    upstream = [torch.randn((), dtype=torch.float64, device=device), torch.randn(7, dtype=torch.float64, device=device)]
    before = clones([input, target, weight, *upstream])
    torch.autograd.grad(cross_entropy(input, target, weight, return_lse=True, z_loss=0.1), input, upstream)
    assert_same_bits(before, [input, target, weight, *upstream])
