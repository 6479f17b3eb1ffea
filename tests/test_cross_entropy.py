"""csrc/{cpu,cuda}/cross_entropy and torch_mlp/ops/cross_entropy.py."""

import inspect
import subprocess
import sys

import pytest
import torch
from conftest import DTYPES, assert_no_less_accurate, assert_same_bits

from torch_mlp.functional import cross_entropy

eager = torch.nn.functional.cross_entropy
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
smoothings = pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
weights = pytest.mark.parametrize("weighted", [False, True])


def make(device, dtype=torch.float64, batch=7, classes=5, scale=3.0, weighted=True):
    """input, target (with an ignored row, -100) and weight."""
    input = (scale * torch.randn(batch, classes, dtype=torch.float64)).to(device, dtype).requires_grad_()
    target = torch.randint(classes, (batch,), device=device)
    target[batch // 2] = -100
    weight = torch.rand(classes, dtype=torch.float64).to(device, dtype) if weighted else None
    return input, target, weight


def gradient(function, input, *arguments, grad_output, **options):
    return torch.autograd.grad(function(input, *arguments, **options), input, grad_output)[0]


def upstream(batch, reduction, like):
    return torch.randn(batch if reduction == "none" else (), dtype=torch.float64).to(like)


def test_signature_is_torchs():
    ours, theirs = (inspect.signature(function).parameters.values() for function in (cross_entropy, eager))
    ours, theirs = ([(p.name, p.default, p.kind) for p in parameters] for parameters in (ours, theirs))
    assert ours[: len(theirs)] == theirs
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, _, kind in ours[len(theirs) :])


# one class; tails of any vector width; a warp a row and a block a row; several blocks of the sum
@pytest.mark.parametrize(("batch", "classes"), [(3, 1), (64, 10), (9, 67), (33, 1000), (5, 5003), (1000, 3)])
@weights
@smoothings
@reductions
@dtypes
def test_accuracy(device, dtype, reduction, label_smoothing, weighted, batch, classes):
    input, target, weight = make(device, dtype, batch, classes, weighted=weighted)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    exact = input.detach().double().requires_grad_()
    exact_weight = weight.double() if weighted else None
    grad_output = upstream(batch, reduction, input)
    assert_no_less_accurate(
        cross_entropy(input, target, weight, **options),
        eager(input, target, weight, **options),
        eager(exact, target, exact_weight, **options).detach(),
    )
    assert_no_less_accurate(
        gradient(cross_entropy, input, target, weight, grad_output=grad_output, **options),
        gradient(eager, input, target, weight, grad_output=grad_output, **options),
        gradient(eager, exact, target, exact_weight, grad_output=grad_output.double(), **options),
    )


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 12])
@reductions
def test_ignore_index(device, reduction, ignore_index):
    input, target, weight = make(device, batch=40)
    target[target < 0] = ignore_index
    options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": 0.2}
    grad_output = upstream(40, reduction, input)
    torch.testing.assert_close(cross_entropy(input, target, weight, **options), eager(input, target, weight, **options))
    ours, theirs = (
        gradient(f, input, target, weight, grad_output=grad_output, **options) for f in (cross_entropy, eager)
    )
    torch.testing.assert_close(ours, theirs)
    assert (target == ignore_index).any()
    assert not ours[target == ignore_index].any()


@reductions
def test_every_row_ignored(device, reduction):
    input, _, weight = make(device)
    target = torch.full((7,), -100, device=device)
    loss = cross_entropy(input, target, weight, reduction=reduction)
    torch.testing.assert_close(loss, eager(input, target, weight, reduction=reduction), equal_nan=True)
    (grad,) = torch.autograd.grad(loss, input, upstream(7, reduction, input))
    assert not grad.any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_what_an_ignored_row_holds_does_not_matter(device, poison, label_smoothing):
    input, target, weight = make(device)
    with torch.no_grad():
        input[target < 0] = poison
    clean = input.detach().where(target.unsqueeze(1) >= 0, 0.0).requires_grad_()
    for reduction in ("none", "mean", "sum"):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        grad_output = upstream(7, reduction, input)
        assert_same_bits(
            [
                cross_entropy(clean, target, weight, **options).detach(),
                gradient(cross_entropy, clean, target, weight, grad_output=grad_output, **options),
            ],
            [
                cross_entropy(input, target, weight, **options),
                gradient(cross_entropy, input, target, weight, grad_output=grad_output, **options),
            ],
        )


@pytest.mark.parametrize("shift", [1e4, -1e4, 3e37])
@pytest.mark.parametrize("classes", [5, 2000])
def test_huge_logits(device, shift, classes):
    """float32, where log(sum(exp(x))) as one number would lose every digit behind the comma."""
    exact = torch.randn(7, classes, dtype=torch.float64) + (shift if abs(shift) < 1e5 else 0)
    if abs(shift) > 1e5:
        exact[:, 0] = shift
    input = exact.float().to(device).requires_grad_()
    exact = input.detach().double().requires_grad_()
    target = torch.randint(classes, (7,), device=device)
    for smoothing in (0.0, 0.1):
        ours, theirs, truth = (
            (
                function(logits, target, label_smoothing=smoothing, reduction="none").detach(),
                gradient(function, logits, target, label_smoothing=smoothing, grad_output=torch.tensor(0.7).to(logits)),
            )
            for function, logits in ((cross_entropy, input), (eager, input), (eager, exact))
        )
        for our, their, true in zip(ours, theirs, truth, strict=True):
            assert torch.isfinite(our).all()
            assert_no_less_accurate(our, their, true)


@pytest.mark.parametrize(
    "row",
    [
        [0.0, -torch.inf, 1.0],
        [-torch.inf, 2.0, -torch.inf],
        [-torch.inf] * 3,
        [torch.inf, 0.0, 1.0],
        [torch.inf, torch.inf, 1.0],
        [torch.nan, 0.0, 1.0],
        [1.0, -torch.inf, torch.nan],
    ],
    ids=str,
)
@pytest.mark.parametrize("pad", [0, 700, 5000])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_infinite_logits(device, row, pad, label_smoothing):
    """As torch, also where a whole block of a long row is -inf."""
    input = torch.tensor([[-torch.inf] * pad + row, [0.5] * (pad + 3)], device=device, requires_grad=True)
    for target in (torch.tensor([pad, 0], device=device), torch.tensor([pad + 1, 1], device=device)):
        options = {"label_smoothing": label_smoothing, "reduction": "none"}
        ours, theirs = (function(input, target, **options) for function in (cross_entropy, eager))
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        if not (torch.isinf(theirs).any() and label_smoothing):  # there torch's gradient is NaN, see below
            grad_output = torch.tensor([0.7, -1.3], device=device)
            our, their = (
                gradient(f, input, target, grad_output=grad_output, **options) for f in (cross_entropy, eager)
            )
            torch.testing.assert_close(our, their, equal_nan=True)


@pytest.mark.parametrize("how", ["transposed", "every other", "offset", "expanded"])
def test_layouts(device, how):
    values, target, weight = make(device, batch=6)
    values = values.detach()
    views = {
        "transposed": values.mT.contiguous().mT,
        "every other": torch.stack([values, torch.full_like(values, torch.nan)], -1)[..., 0],
        "offset": torch.cat([torch.full((6, 1), torch.nan, device=device, dtype=values.dtype), values], 1)[:, 1:],
        "expanded": values[:1].expand(6, 5),
    }
    input = views[how].requires_grad_()
    far_target, far_weight = torch.stack([target, target * 0 + 99], 1)[:, 0], torch.stack([weight, weight * 0], 1)[:, 0]
    grad_output = torch.randn(12, device=device, dtype=torch.float64)[::2]
    ours, theirs = (
        gradient(function, input, *arguments, grad_output=grad_output, reduction="none")
        for function, arguments in ((cross_entropy, (far_target, far_weight)), (eager, (target, weight)))
    )
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (
        torch.autograd.grad(f(input, target, reduction="none").sum(), input)[0] for f in (cross_entropy, eager)
    )
    torch.testing.assert_close(ours, theirs)


@reductions
def test_empty_batch(device, reduction):
    input = torch.empty(0, 5, device=device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss = cross_entropy(input, target, reduction=reduction)
    torch.testing.assert_close(loss, eager(input, target, reduction=reduction), equal_nan=True)
    assert torch.autograd.grad(loss.sum(), input)[0].shape == (0, 5)


def test_thread_counts_give_the_same_bits():
    input, target, weight = make("cpu", torch.float32, 5000, 11)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = cross_entropy(input, target, weight)
            results.append([loss.detach(), torch.autograd.grad(loss, input)[0]])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def second_gradient(function, input, *arguments, **options):
    (first,) = torch.autograd.grad(function(input, *arguments, **options).sum(), input, create_graph=True)
    return torch.autograd.grad((first * torch.arange(1.0, 6.0, device=input.device)).sum(), input)[0]


@reductions
def test_double_backward_at_the_edges(device, reduction):
    """An empty batch; every row ignored; an ignored row that holds NaN."""
    input, target, _ = make(device)
    assert second_gradient(cross_entropy, input[:0], target[:0], reduction=reduction).shape == (0, 5)
    assert not second_gradient(cross_entropy, input, torch.full_like(target, -100), reduction=reduction).any()
    expected = second_gradient(eager, input, target, reduction=reduction)
    with torch.no_grad():
        input[target < 0] = torch.nan
    torch.testing.assert_close(second_gradient(cross_entropy, input, target, reduction=reduction), expected)


@reductions
def test_double_backward_by_the_incoming_gradient_at_the_edges(device, reduction):
    """Every row ignored; an ignored row that holds NaN."""
    input, target, _ = make(device)
    poisoned = input.detach().where(target.unsqueeze(1) >= 0, torch.nan).requires_grad_()

    def found(input, target):
        grad_output = torch.ones((7,) if reduction == "none" else (), device=device).double().requires_grad_()
        loss = cross_entropy(input, target, reduction=reduction)
        (first,) = torch.autograd.grad(loss, input, grad_output, create_graph=True)
        return torch.autograd.grad((first * torch.arange(1.0, 6.0, device=device)).sum(), grad_output)[0]

    assert torch.equal(found(input, torch.full_like(target, -100)), torch.zeros_like(found(input, target)))
    torch.testing.assert_close(found(poisoned, target), found(input, target))
    assert found(input, target).any()


def test_double_backward_of_a_long_float16_batch(device):
    """Whose length, 70,000, is more than float16 holds."""
    input = torch.randn(70_000, 5, device=device).half().requires_grad_()
    target = torch.randint(5, (70_000,), device=device)
    exact = input.detach().double().requires_grad_()

    def scaled(function):
        return lambda *arguments: 1e4 * function(*arguments)

    ours, truth = second_gradient(scaled(cross_entropy), input, target), second_gradient(scaled(eager), exact, target)
    torch.testing.assert_close(ours.double(), truth, rtol=0.02, atol=0.02 * truth.abs().max().item())


def test_weight_has_no_gradient(device):
    input, target, weight = make(device)
    with pytest.raises(RuntimeError, match="cross_entropy: expected weight not to require grad"):
        cross_entropy(input, target, weight.requires_grad_())


def test_weight_that_requires_grad_where_none_is_recorded(device):
    """Weights that are learned elsewhere, in an evaluation: as in torch."""
    input, target, weight = make(device)
    with torch.no_grad():
        ours = cross_entropy(input, target, weight.requires_grad_())
        torch.testing.assert_close(ours, eager(input, target, weight))


def test_deprecated_reduction_arguments(device):
    input, target, weight = make(device)
    with pytest.warns(UserWarning, match="size_average"):
        ours = cross_entropy(input, target, weight, False)
    torch.testing.assert_close(ours, eager(input, target, weight, reduction="sum"))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            lambda x, y, w: (x, y[:6], w),
            ValueError,
            r"cross_entropy: expected target of shape \(7,\), got \(6,\)",
        ),
        (
            lambda x, y, w: (x, y.bool(), w),
            RuntimeError,
            "cross_entropy: expected target to hold class ind.* got torch.bool",
        ),
        (
            lambda x, y, w: (x, y, w.float()),
            RuntimeError,
            "cross_entropy: expected weight of the dtype of input, Double, got Float",
        ),
        (lambda x, y, w: (x, y, w[:4]), RuntimeError, r"cross_entropy: expected weight of shape \(5,\), got \(4,\)"),
        (
            lambda x, y, w: (x.long(), y, w.long()),
            RuntimeError,
            "cross_entropy: expected input of dtype Double, Float, BFloat16 or Half, got Long",
        ),
        (lambda x, y, w: (x, y.float(), w), RuntimeError, "expected target to hold class indices"),
        (
            lambda x, y, w: (x[0, 0], y[0], w),
            RuntimeError,
            r"cross_entropy: expected input of shape \(C\), .* got \(\)",
        ),
        (
            lambda x, y, w: (x, y[:, None], w),
            RuntimeError,
            r"cross_entropy: expected target of shape \(7,\), got \(7, 1\)",
        ),
        (lambda x, y, w: (x[0], y[:2], w), ValueError, r"cross_entropy: expected target of shape \(\), got \(2,\)"),
        (
            lambda x, y, w: (x[..., None], y[:6, None], w),
            ValueError,
            r"cross_entropy: expected target of shape \(7, 1\), got \(6, 1\)",
        ),
        (
            lambda x, y, w: (x[..., None], y, w),
            RuntimeError,
            r"cross_entropy: expected target of shape \(7, 1\), got \(7,\)",
        ),
    ],
)
def test_errors(device, change, error, sentence):
    input, target, weight = make(device)
    with pytest.raises(error, match=sentence):
        cross_entropy(*change(input.detach(), target, weight))


def test_option_errors(device):
    input, target, _ = make(device)
    with pytest.raises(ValueError, match="cross_entropy: expected reduction to be one of none, mean, sum, got 'avg'"):
        cross_entropy(input, target, reduction="avg")
    with pytest.raises(RuntimeError, match=r"cross_entropy: expected label_smoothing in \[0, 1\], got 1.5"):
        cross_entropy(input, target, label_smoothing=1.5)


@pytest.mark.parametrize("bad", [5, -1, -101, 2**40, -(2**62)])
def test_label_out_of_range(bad):
    input, target, weight = make("cpu")
    target[6] = bad
    sentence = rf"cross_entropy: expected target in \[0, 5\) or ignore_index -100, got {bad} at position 6"
    with pytest.raises(IndexError, match=sentence):
        cross_entropy(input, target, weight)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_label_out_of_range_on_cuda(device, bad):
    """A device-side assertion, as in torch; it spoils the CUDA context, hence the process of its own."""
    code = (
        "import torch; from torch_mlp.functional import cross_entropy\n"
        f"cross_entropy(torch.randn(3, 5, device='cuda'), torch.tensor([0, {bad}, 1], device='cuda')).item()"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode != 0
    assert "device-side assert" in finished.stderr


def test_backward_op_checks_its_arguments(device):
    input, target, weight = make(device)
    input = input.detach()
    forward, backward = torch.ops.torch_mlp.cross_entropy, torch.ops.torch_mlp._cross_entropy_backward
    _, lse, total = forward(input, target, weight, "mean", -100, 0.0)
    one = torch.ones((), dtype=torch.float64, device=device)
    bad = {
        r"grad_output of shape \(\), got \(7,\)": (torch.ones(7, device=device).double(), None, lse, total),
        r"lse of shape \(2, 7\), got \(2, 6\)": (one, None, lse[:, :6], total),
        r"lse of dtype Double, got Float": (one, None, lse.float(), total),
        r"total_weight of shape \(\), got \(1,\)": (one, None, lse, total[None]),
        r"grad_lse of shape \(7,\), got \(2, 7\)": (one, lse, lse, total),
        r"grad_lse of dtype Double, got Float": (one, lse[0].float(), lse, total),
    }
    for sentence, (grad_output, grad_lse, statistics, total_weight) in bad.items():
        with pytest.raises(RuntimeError, match="_cross_entropy_backward: expected " + sentence):
            backward(grad_output, grad_lse, input, target, weight, statistics, total_weight, "mean", -100, 0.0)
