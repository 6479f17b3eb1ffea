"""csrc/{cpu,cuda}/linear_cross_entropy and torch_mlp/ops/linear_cross_entropy.py."""

import inspect
import subprocess
import sys

import pytest
import torch
from conftest import ALIKE_THREADS, DTYPES, assert_no_less_accurate, assert_same_bits, clones, why_no_cuda
from torch.autograd import gradcheck, gradgradcheck

from torch_mlp.functional import cross_entropy, linear_cross_entropy

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def eager(input, linear_weight, target, *, linear_bias=None, **options):
    """What torch.nn.functional.linear_cross_entropy stands for, which not every torch has."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    return torch.nn.functional.cross_entropy(logits, target, **options)


def make(device, dtype=torch.float64, batch=7, features=4, classes=5, bias=True):
    """input, linear_weight, linear_bias, and target with an ignored row."""
    shapes = [(batch, features), (classes, features), (classes,)]
    input, matrix, offset = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    tensors = [(t / (features**0.5 if t is matrix else 1)).to(device, dtype) for t in (input, matrix, offset)]
    target = torch.randint(classes, (batch,), device=device)
    target[batch // 2] = -100
    *tensors, offset = (tensor.requires_grad_() for tensor in tensors)
    return *tensors, offset if bias else None, target


def results(function, tensors, grad_output, **options):
    """Loss and the gradients of input, linear_weight and linear_bias."""
    input, matrix, bias, target = tensors
    loss = function(input, matrix, target, linear_bias=bias, **options)
    inputs = [tensor for tensor in (input, matrix, bias) if tensor is not None]
    return loss.detach(), *torch.autograd.grad(loss, inputs, grad_output.to(loss))


def upstream(reduction, batch, device):
    return torch.randn(batch if reduction == "none" else (), dtype=torch.float64, device=device)


def test_signature_is_torchs():
    theirs = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if theirs is None:
        pytest.skip("this torch has no linear_cross_entropy")
    ours, theirs = (
        {p.name: (p.default, p.kind) for p in inspect.signature(function).parameters.values()}
        for function in (linear_cross_entropy, theirs)
    )
    assert set(ours) - set(theirs) == {"return_lse", "z_loss"}
    assert set(theirs) - set(ours) == {"options"}
    assert all(ours[name] == theirs[name] for name in ours if name in theirs)


# few classes: one chunk; many: several of them, the last one short, and products of the library's
@pytest.mark.parametrize(
    ("batch", "features", "classes"), [(3, 4, 1), (64, 20, 10), (700, 16, 1100), (1030, 9, 600), (300, 8, 5000)]
)
@pytest.mark.parametrize(("bias", "weighted", "label_smoothing"), [(True, False, 0.0), (False, True, 0.1)])
@reductions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(device, dtype, reduction, bias, weighted, label_smoothing, batch, features, classes):
    tensors = make(device, dtype, batch, features, classes, bias)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors[:3]] + [tensors[3]]
    weight = torch.rand(classes, dtype=torch.float64).to(device, dtype) if weighted else None
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    grad_output = upstream(reduction, batch, device).to(dtype)
    ours, theirs = (results(f, tensors, grad_output, weight=weight, **options) for f in (linear_cross_entropy, eager))
    truths = results(eager, exact, grad_output.double(), weight=weight.double() if weighted else None, **options)
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        if truth.dim():
            assert_no_less_accurate(our, their, truth)
        else:  # between two single numbers luck decides; torch's are inf where float16 does not hold what it sums
            torch.testing.assert_close(our.double(), truth, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("bias", [True, False])
@reductions
def test_gradcheck(device, reduction, bias):
    input, matrix, offset, target = make(device, bias=bias)
    weight = torch.rand(5, dtype=torch.float64, device=device)

    def loss(input, matrix, offset=None):
        return linear_cross_entropy(
            input, matrix, target, linear_bias=offset, weight=weight, reduction=reduction, label_smoothing=0.1
        )

    inputs = [tensor for tensor in (input, matrix, offset) if tensor is not None]
    assert gradcheck(loss, inputs, nondet_tol=0.0)
    assert gradgradcheck(loss, inputs, nondet_tol=0.0)


@pytest.mark.parametrize("z_loss", [0.0, 0.2])
@reductions
def test_lse_and_z_loss(device, reduction, z_loss):
    input, matrix, bias, target = make(device, batch=600, classes=700)
    options = {"reduction": reduction, "return_lse": True, "z_loss": z_loss, "label_smoothing": 0.1}
    ours = linear_cross_entropy(input, matrix, target, linear_bias=bias, **options)
    theirs = cross_entropy(torch.nn.functional.linear(input, matrix, bias), target, **options)
    torch.testing.assert_close(ours, theirs)
    incoming = [torch.randn_like(result) for result in theirs]
    for used in (slice(None), slice(1), slice(1, 2)):
        gradients = [
            torch.autograd.grad(found[used], (input, matrix, bias), incoming[used], retain_graph=True)
            for found in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients)


@reductions
def test_each_combination_of_gradients(device, reduction):
    tensors = make(device, batch=600, classes=700)
    grad_output = upstream(reduction, 600, device)
    _, *expected = results(eager, tensors, grad_output, reduction=reduction)
    for needs in range(1, 8):
        needed = [bool(needs & (1 << k)) for k in range(3)]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors[:3], needed, strict=True)]
        loss = linear_cross_entropy(leaves[0], leaves[1], tensors[3], linear_bias=leaves[2], reduction=reduction)
        loss.backward(grad_output)
        for leaf, need, gradient in zip(leaves, needed, expected, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, gradient)


def test_a_second_backward_pass(device):
    input, matrix, bias, target = make(device)
    loss = linear_cross_entropy(input, matrix, target, linear_bias=bias)
    one = torch.tensor(1.7, dtype=torch.float64, device=device)
    first = torch.autograd.grad(loss, (input, matrix, bias), one, retain_graph=True)
    kept = clones(first)
    second = torch.autograd.grad(loss, (input, matrix, bias), -2 * one)
    assert_same_bits(kept, first)
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(right, -2 * left)


def test_a_cuda_graph_gives_a_backward_pass_more_than_once():
    """A pass that is recorded may be run again without the forward pass before it."""
    if reason := why_no_cuda():
        pytest.skip(reason)
    input, _, _, target = make("cuda", torch.float32)
    layer = torch.nn.Linear(4, 5, device="cuda")
    layer.forward = lambda input, target: linear_cross_entropy(input, layer.weight, target, linear_bias=layer.bias)
    tensors = input, *layer.parameters()
    one = torch.tensor(1.7, device="cuda")
    expected = torch.autograd.grad(layer(input, target), tensors, one)
    loss = torch.cuda.make_graphed_callables(layer, (input, target))(input, target)
    for _ in range(3):
        torch.testing.assert_close(torch.autograd.grad(loss, tensors, one, retain_graph=True), expected)


@pytest.mark.parametrize("kind", ["probabilities", "places", "probabilities of places", "one row", "one row's"])
@reductions
def test_shapes(device, reduction, kind):
    """Also where the logits are held, which torch_mlp.functional says."""
    input, matrix, bias, target = make(device, classes=6)
    weight = torch.rand(6 if "places" not in kind else 3, dtype=torch.float64, device=device)
    leaves, logits = (input, matrix, bias), torch.nn.functional.linear(input, matrix, bias)
    if "places" in kind:
        matrix, bias, logits = matrix.reshape(3, 2, 4), bias.reshape(3, 2), logits.reshape(7, 3, 2)
        target = torch.randint(3, (7, 2), device=device)
    if "row" in kind:
        input, logits, target = input[0], logits[0], target[0]
    if "probabilities" in kind or kind == "one row's":
        target = torch.rand(logits.shape, dtype=torch.float64, device=device)
    ours = linear_cross_entropy(input, matrix, target, linear_bias=bias, weight=weight, reduction=reduction)
    theirs = torch.nn.functional.cross_entropy(logits, target, weight, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    grad_output = torch.randn_like(theirs)
    gradients = [torch.autograd.grad(loss, leaves, grad_output) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5)], ids=str)
@reductions
def test_empty(device, reduction, shape):
    tensors = make(device, torch.float64, *shape) if shape[0] else (*make(device)[1:3], None, None)
    if not shape[0]:
        matrix, bias = (t.detach().requires_grad_() for t in tensors[:2])
        input = torch.zeros(0, 4, dtype=torch.float64, device=device, requires_grad=True)
        tensors = input, matrix, bias, torch.zeros(0, dtype=torch.int64, device=device)
    grad_output = upstream(reduction, shape[0], device)
    ours, theirs = (results(f, tensors, grad_output, reduction=reduction) for f in (linear_cross_entropy, eager))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, equal_nan=True)


@pytest.mark.parametrize("kind", ["probabilities", "places", "probabilities of places"])
def test_no_features(device, kind):
    """Where the logits are held, of a linear map of nothing: the bias is all there is."""
    input, matrix, bias, target = make(device, features=0, classes=6)
    logits = torch.nn.functional.linear(input, matrix, bias)
    if "places" in kind:
        matrix, offset, logits = matrix.reshape(3, 2, 0), bias.reshape(3, 2), logits.reshape(7, 3, 2)
        target = torch.randint(3, (7, 2), device=device)
    else:
        offset = bias
    if "probabilities" in kind:
        target = torch.rand(logits.shape, dtype=torch.float64, device=device)
    ours = linear_cross_entropy(input, matrix, target, linear_bias=offset)
    theirs = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, (input, bias)) for loss in (ours, theirs)))


@reductions
def test_every_row_ignored(device, reduction):
    input, matrix, bias, target = make(device)
    tensors = input, matrix, bias, torch.full_like(target, -100)
    loss, *gradients = results(linear_cross_entropy, tensors, upstream(reduction, 7, device), reduction=reduction)
    expected = eager(input, matrix, tensors[3], linear_bias=bias, reduction=reduction)
    torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("ignore_index", [None, -1, 3])
def test_ignore_index(device, ignore_index):
    input, matrix, bias, target = make(device, batch=40)
    target[target < 0] = -100 if ignore_index is None else ignore_index
    tensors, grad_output = (input, matrix, bias, target), upstream("mean", 40, device)
    torchs = {} if ignore_index is None else {"ignore_index": ignore_index}
    ours = results(linear_cross_entropy, tensors, grad_output, ignore_index=ignore_index)
    torch.testing.assert_close(ours, results(eager, tensors, grad_output, **torchs))


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("grad_output", [float("inf"), float("nan")])
def test_an_ignored_row_has_no_gradient_whatever_comes_in(device, grad_output, retain_graph):
    *tensors, target = make(device, torch.float32)
    loss = linear_cross_entropy(tensors[0], tensors[1], target, linear_bias=tensors[2])
    gradient = torch.autograd.grad(loss, tensors[0], loss.new_tensor(grad_output), retain_graph=retain_graph)[0]
    is_ignored = target == -100
    assert torch.equal(gradient[is_ignored], torch.zeros_like(gradient[is_ignored]))
    assert not gradient[~is_ignored].isfinite().any()


def test_layouts(device):
    input, matrix, bias, target = make(device, batch=40, classes=20)
    with torch.no_grad():
        far = [tensor.mT.contiguous().mT.requires_grad_() for tensor in (input, matrix)]
        spread = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0].requires_grad_()
    far_target = torch.stack([target, target * 0 + 99], 1)[:, 0]
    grad_output = upstream("none", 80, device)[::2]
    ours = results(linear_cross_entropy, (*far, spread, far_target), grad_output, reduction="none")
    torch.testing.assert_close(ours, results(eager, (input, matrix, bias, target), grad_output, reduction="none"))


@reductions
def test_nothing_is_clobbered(device, reduction):
    tensors = make(device, batch=600, classes=700)
    grad_output = upstream(reduction, 600, device)
    before = clones([*tensors, grad_output])
    results(linear_cross_entropy, tensors, grad_output, reduction=reduction)
    assert_same_bits(before, [*tensors, grad_output])


@reductions
def test_number_of_threads_does_not_change_the_bits(reduction):
    # In float32, whose products are the package's own.
    tensors, grad_output = make("cpu", torch.float32, 600, 64, 700), upstream(reduction, 600, "cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for count in ALIKE_THREADS:
            torch.set_num_threads(count)
            found.append(results(linear_cross_entropy, tensors, grad_output, reduction=reduction))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[0][0], other[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    input, matrix, bias, target = make(device, torch.float32, batch=600, classes=700)
    weight = torch.rand(700, device=device)
    for given in (None, weight):
        with torch.autocast(device, dtype):
            tensors = input, matrix, bias, target
            grad_output = torch.tensor(0.7, device=device)
            ours, theirs = (results(f, tensors, grad_output, weight=given) for f in (linear_cross_entropy, eager))
        for our, their in zip(ours, theirs, strict=True):
            assert our.dtype == their.dtype == torch.float32
            torch.testing.assert_close(our, their, rtol=2e-2, atol=2e-2 * their.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_with_a_scaled_loss(device, reduction):
    """As torch.amp.GradScaler has it: the gradients that it saves from vanishing are there."""
    tensors = make(device, torch.float32, 3000, 8, 3000)
    grad_output = torch.full((3000,), 2.0**16 / 3000) if reduction == "none" else torch.tensor(2.0**16)
    with torch.autocast(device, torch.float16):
        _, *ours = results(linear_cross_entropy, tensors, grad_output, reduction=reduction)
    _, *truths = results(
        eager,
        [*(t.detach().double().requires_grad_() for t in tensors[:3]), tensors[3]],
        grad_output,
        reduction=reduction,
    )
    for our, truth in zip(ours, truths, strict=True):
        assert (our.double() - truth).square().mean().sqrt() < 0.01 * truth.square().mean().sqrt()


def peak_memory(function, classes):
    """MiB that a forward and backward pass add to the memory of a process, in a process of its own."""
    code = f"""
import torch
from test_linear_cross_entropy import eager, linear_cross_entropy
torch.set_num_threads(1)
input, matrix = torch.randn(512, 512).requires_grad_(), torch.randn({classes}, 512).requires_grad_()
target = torch.randint({classes}, (512,))
def step(rows):
    {function}(input[:rows], matrix[:10], target[:rows] % 10).backward()
    {function}(input[:rows], matrix, target[:rows]).backward() if rows == 512 else None
step(2)
input.grad = matrix.grad = None
def peak():  # getrusage would begin with that of the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
step(512)
print(peak() - before)
"""
    path = str(__file__).rpartition("/")[0]
    finished = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=True)
    return float(finished.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory():
    """The gradient of the weight once, and the logits of 128 rows; the graph is freed."""
    classes = 20_000
    chunk = 128 * classes * 4 / 2**20  # 10 MiB
    ours, theirs = (peak_memory(function, classes) for function in ("linear_cross_entropy", "eager"))
    gradient = classes * 512 * 4 / 2**20  # 39 MiB
    assert ours < chunk + 1.3 * gradient + 5
    assert ours < theirs / 2


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (lambda x, w, b, y: (x[None], w, b, y), RuntimeError, r"expected input of shape \(N, in_features\) or"),
        (lambda x, w, b, y: (x, w[0], b, y), RuntimeError, r"expected linear_weight of shape \(C, 4\), got \(4,\)"),
        (
            lambda x, w, b, y: (x, w[:, :3], b, y),
            RuntimeError,
            r"expected linear_weight of shape \(C, 4\), got \(5, 3\)",
        ),
        (lambda x, w, b, y: (x, w, b[:2], y), RuntimeError, r"expected linear_bias of shape \(5,\), got \(2,\)"),
        (
            lambda x, w, b, y: (x[0], w[None], b[None], y[0]),
            RuntimeError,
            r"expected input of shape \(N, in_features\)",
        ),
        (lambda x, w, b, y: (x, w.float(), b, y), RuntimeError, "expected linear_weight of the dtype of input, Double"),
        (lambda x, w, b, y: (x, w, b, y[:3]), ValueError, r"expected target of shape \(7,\), got \(3,\)"),
        (lambda x, w, b, y: (x, w, b, y.double()), RuntimeError, "expected target to hold class indices"),
        (lambda x, w, b, y: (x.long(), w.long(), b.long(), y), RuntimeError, "expected input of dtype Double, Float"),
    ],
)
def test_errors(device, change, error, sentence):
    tensors = (t.detach() for t in make(device))
    input, matrix, bias, target = change(*tensors)
    with pytest.raises(error, match="linear_cross_entropy: " + sentence):
        linear_cross_entropy(input, matrix, target, linear_bias=bias)


def test_errors_of_options(device):
    input, matrix, _, target = make(device)
    bad = {
        r"expected reduction to be one of none, mean, sum, got 'max'": (ValueError, {"reduction": "max"}),
        r"expected label_smoothing in \[0, 1\], got 2": (RuntimeError, {"label_smoothing": 2.0}),
        r"expected weight of shape \(5,\), got \(3,\)": (RuntimeError, {"weight": input[0, :3].detach()}),
        r"expected weight not to require grad": (RuntimeError, {"weight": matrix[:, 0]}),
    }
    for sentence, (error, options) in bad.items():
        with pytest.raises(error, match="linear_cross_entropy: " + sentence):
            linear_cross_entropy(input, matrix, target, **options)
    with pytest.raises(RuntimeError, match="expected no ignore_index with class probabilities, got 2"):
        linear_cross_entropy(input, matrix, torch.rand(7, 5, device=device).double(), ignore_index=2)


def test_wrong_labels():
    for classes in (5, 5000):
        input, matrix, bias, target = make("cpu", torch.float32, 600, classes=classes)
        target[500] = classes
        sentence = rf"expected target in \[0, {classes}\) or ignore_index -100, got {classes} at position 500"
        with pytest.raises(IndexError, match="linear_cross_entropy: " + sentence):
            linear_cross_entropy(input, matrix, target, linear_bias=bias)


def test_backward_op_checks_its_arguments(device):
    input, matrix, bias, target = (t.detach() for t in make(device))
    forward, backward = torch.ops.torch_mlp.linear_cross_entropy, torch.ops.torch_mlp._linear_cross_entropy_backward
    needs = (True, True, True)
    _, lse, total, *_ = forward(input, matrix, bias, target, None, "mean", -100, 0.0, *needs)
    one = torch.ones((), dtype=torch.float64, device=device)
    for sentence, (grad_output, statistics, total_weight) in {
        r"grad_output of shape \(\), got \(7,\)": (lse[0], lse, total),
        r"grad_output of dtype Double, got Float": (one.float(), lse, total),
        r"lse of shape \(2, 7\), got \(2, 6\)": (one, lse[:, :6], total),
        r"total_weight of shape \(\), got \(1,\)": (one, lse, total[None]),
    }.items():
        with pytest.raises(RuntimeError, match="_linear_cross_entropy_backward: expected " + sentence):
            backward(
                grad_output,
                None,
                input,
                matrix,
                bias,
                target,
                None,
                statistics,
                total_weight,
                "mean",
                -100,
                0.0,
                *needs,
            )
