"""The vector kernels of the CPU: every instruction set, every edge of a tile, units in the last place."""

import ctypes
import itertools
import mmap
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ALIKE_THREADS, DIFFERENTIABLE, EAGER, assert_no_less_accurate
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_mlp import ops
from torch_mlp.functional import cross_entropy, linear_act

FORCED = "TORCH_MLP_CPU_CAPABILITY"
NAN = float("nan")
LEAST_NORMAL = 2.0**-126


@pytest.mark.skipif(FORCED in os.environ, reason="is run at this instruction set by the same test without it")
@pytest.mark.parametrize("level", ["default", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set(level):
    # A forced level also takes the products that the library would compute, see kernels.cpp: so all three are run.
    environment = {**os.environ, FORCED: level}
    probe = "import torch_mlp; print(torch_mlp.ops.cpu_capability())"
    result = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if "TORCH_MLP_CPU_CAPABILITY to be one of" in result.stderr:
        pytest.skip(f"needs {level}: {result.stderr.strip().splitlines()[-1]}")
    assert result.stdout.strip() == level
    folder = os.path.dirname(__file__)
    files = [
        os.path.join(folder, f"test_{name}.py")
        for name in ("cpu_kernels", "matrix_unit", "linear_act", "cross_entropy", "binary_cross_entropy", "epoch")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not cuda", *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.dirname(folder))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def test_unknown_instruction_set():
    code = "import torch_mlp; torch_mlp.ops.cpu_capability()"
    environment = {**os.environ, FORCED: "avx1024"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    sentence = r"RuntimeError: torch_mlp: expected TORCH_MLP_CPU_CAPABILITY to be one of default\b.*, got 'avx1024'$"
    assert re.match(sentence, result.stderr.strip().splitlines()[-1])


def surrounded(rows, cols, generator, offset=3):
    """A matrix inside a larger one of NaN, that begins at an odd address."""
    whole = torch.full((rows + 2, cols + 2 * offset), NAN)
    part = whole[1:-1, offset:-offset]
    part.copy_(torch.randn(rows, cols, generator=generator))
    return part


def assert_rounded(our, true, depth):
    """Each term and each sum may be off by half a unit; a wrong or missing element is off by far more."""
    error = (our.double() - true).abs().max()
    bound = 4 * torch.finfo(our.dtype).eps * (3 + depth**0.5) * (1 + true.abs().max())
    assert error <= bound, f"error {error:.3g}, expected at most {bound:.3g}"


# Around the tiles' 6 rows, the vectors' 4, 8 and 16 lanes, the panels' 8, 16 and 64 and the blocks' 16, 48 and 256.
sizes = st.sampled_from([1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 100, 129, 257])


def ours_and_truth(dtype, inputs, grad_output, activation):
    """Output and gradients of linear_act in this dtype, and of torch in float64."""

    def values(dtype, function):
        leaves = [value.to(dtype).detach().requires_grad_() for value in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(dtype))]

    def eager(input, weight, bias=None):
        return EAGER[activation](torch.nn.functional.linear(input, weight, bias))

    ours = values(dtype, lambda *tensors: linear_act(*tensors, activation=activation))
    return ours, values(torch.float64, eager)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, st.sampled_from(DIFFERENTIABLE), st.booleans(), st.integers(0, 10**6))
@example(17, 4097, 17, "sigmoid", True, 0)  # too deep for a panel
@example(600, 40, 33, "tanh", True, 0)  # too long a batch for the kernels
@example(130, 600, 520, "sigmoid", True, 0)  # b does not stay in the cache, three depths
@example(520, 300, 10, "relu", False, 0)  # few outputs, long batch
@example(16, 256, 17, "identity", True, 0)
@example(1025, 20, 16, "tanh", True, 0)  # too long a batch for the kernels' gradients, though the outputs are few
@example(9, 17, 4097, "relu", True, 0)  # too wide
def test_edges_of_tiles(batch, ins, outs, activation, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = [surrounded(batch, ins, generator), surrounded(outs, ins, generator)]
    inputs[1].mul_(ins**-0.5)
    if has_bias:
        inputs.append(surrounded(1, outs, generator)[0])
    grad_output = surrounded(batch, outs, generator)

    ours, truth = ours_and_truth(torch.float32, inputs, grad_output, activation)
    for our, true, depth in zip(ours, truth, (ins, outs, batch, batch), strict=False):
        assert_rounded(our, true, depth)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes, sizes, sizes, st.sampled_from(["identity", "relu"]), st.booleans(), st.sampled_from([3, 4]), st.booleans()
)
@example(64, 1100, 70, "relu", True, 4, False)  # three depths forward
@example(100, 130, 1100, "identity", False, 4, False)  # three depths of grad_input
@example(510, 70, 300, "relu", True, 3, True)  # two blocks of rows of grad_weight, for grad_input the library
@example(1100, 40, 16, "relu", True, 4, False)  # few outputs, three depths of grad_weight
@example(3, 64, 300, "relu", True, 4, False)  # forward the library
@example(16, 8200, 17, "identity", True, 4, False)  # too deep for a panel
def test_exact_sums_of_bfloat16(batch, ins, outs, activation, has_bias, offset, transposes):
    """Of integers, whose sums are exact in float: nothing is rounded but the results, and a bias added after that."""
    generator = torch.Generator().manual_seed(batch * ins + outs)

    def integers(rows, cols):
        part = surrounded(rows, cols, generator, offset).mul_(1.5).round_()
        whole = torch.full((cols + 4, rows + 2), NAN) if transposes else torch.full((rows + 2, cols + 2 * offset), NAN)
        whole = whole.bfloat16()
        inner = whole[2:-2, 1:-1].t() if transposes else whole[1:-1, offset:-offset]
        return inner.copy_(part)

    inputs = [integers(batch, ins), integers(outs, ins), *([integers(1, outs)[0]] if has_bias else [])]
    grad_output = integers(batch, outs)

    for our, true in zip(*ours_and_truth(torch.bfloat16, inputs, grad_output, activation), strict=True):
        assert our.dtype == torch.bfloat16
        assert ((our.double() - true).abs() <= torch.finfo(torch.bfloat16).eps * true.abs()).all()


def units(found, truth):
    """The error in units in the last place of float32; those of denormal numbers count as the least normal one's."""
    unit = torch.exp2(torch.frexp(truth.abs().clamp(min=LEAST_NORMAL)).exponent.double() - 24)
    return (found.double() - truth).abs() / unit


def inputs_of_every_size():
    """From -105 to 105, more of them near 0, and by powers of two down to the least denormal number."""
    of_every_exponent = torch.exp2(-149 * torch.rand(50_000, dtype=torch.float64)).float()
    z = torch.cat([torch.linspace(-105, 105, 200_001), torch.linspace(-2, 2, 50_001), of_every_exponent])
    return torch.cat([z, -of_every_exponent, torch.tensor([88.7, -87.3, -87.4, 1e38, -1e38, 2.0**-149, -(2.0**-149)])])


@pytest.mark.parametrize("outs", [3, 40])  # by dot products, by panels
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_activations_to_the_last_place(activation, outs):
    z = inputs_of_every_size()
    z = z[torch.randperm(len(z))]  # so that the lanes of a vector differ
    rows = z.split(100)
    rows = [*rows[:-2], torch.cat(rows[-2:])]  # none so short that it goes another way
    output = torch.cat([linear_act(part[:, None], torch.ones(outs, 1), None, activation) for part in rows])
    truth, theirs = EAGER[activation](z.double()), EAGER[activation](z)
    # Torch's sigmoid flushes denormal results to 0, and so may ours; nowhere else is there an error of that size.
    bound = torch.where(truth.abs() < LEAST_NORMAL, units(theirs, truth), 0).clamp(min=3)
    assert (units(output, truth[:, None]) <= bound[:, None]).all()


@pytest.mark.parametrize("outs", [3, 40])
@pytest.mark.parametrize("activation", sorted(EAGER))
def test_special_values(activation, outs):
    """Among ordinary ones, at both ends of a vector and in its middle; a column apart they must not be seen."""
    z = torch.randn(40, 1)
    z[[0, 3, 7, 15, 16, 31, 39], 0] = torch.tensor([NAN, torch.inf, -torch.inf, -0.0, NAN, 0.0, torch.inf])
    output = linear_act(z, torch.ones(outs, 1), torch.zeros(outs), activation)
    torch.testing.assert_close(output, EAGER[activation](z).expand(40, outs), equal_nan=True)


def test_exp_to_the_last_place():
    # The gradient's kernel, with statistics that leave the bare exp(-t) of the second logit: maximum 0 and sum 1.
    t = torch.cat([inputs_of_every_size().abs(), torch.tensor([torch.inf])])
    logits = torch.stack([torch.zeros_like(t), -t], 1)
    target = torch.zeros(len(t), dtype=torch.int64)
    lse = torch.stack([torch.zeros_like(t), torch.ones_like(t)])
    for scale in (1.0, -2.0):  # a power of two: no rounding
        grad = torch.ops.torch_mlp._cross_entropy_backward(
            torch.full_like(t, scale), None, logits, target, None, lse, torch.tensor(1.0), "none", -100, 0.0
        )
        assert (units(grad[:, 1], scale * torch.exp(-t.double())) <= 3).all()


def test_sum_and_logarithm_of_exp():
    # With logits (0, -t) the second one's gradient is p = exp(-t) / (1 + exp(-t)) by the saved 1 + exp(-t).
    t = torch.linspace(0, 86, 100_000)
    logits = torch.stack([torch.zeros_like(t), -t], 1)
    target = torch.zeros(len(t), dtype=torch.int64)
    options = None, "sum", -100, 0.0
    loss, lse, total_weight = torch.ops.torch_mlp.cross_entropy(logits, target, *options)
    exact = torch.exp(-t.double())
    assert ((lse[1].double() - (1 + exact)).abs() <= 2 * torch.finfo(torch.float32).eps).all()
    grad = torch.ops.torch_mlp._cross_entropy_backward(
        torch.tensor(1.7), None, logits, target, None, lse, total_weight, *options[1:]
    )
    truth = 1.7 * exact / (1 + exact)
    # 3 units of exp, and the roundings of the factor, the sum and the product
    assert ((grad[:, 1].double() - truth).abs() <= 4.5 * torch.finfo(torch.float32).eps * truth).all()
    assert_no_less_accurate(
        loss.detach(),
        torch.nn.functional.cross_entropy(logits, target, reduction="sum"),
        torch.nn.functional.cross_entropy(logits.double(), target, reduction="sum"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_any_number_of_classes(dtype, smoothing, weighted):
    every = [1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 33, 63, 64, 65, 100, 1000, 4099]
    for classes, rows in itertools.product(every, [1, 3, 16, 17, 65]):
        logits = (3 * torch.randn(rows, classes)).to(dtype)
        target = torch.randint(classes, (rows,))
        weight = torch.rand(classes).to(dtype) + 0.5 if weighted else None
        grad_output = torch.randn(rows).to(dtype)

        def values(function, to, logits=logits, target=target, weight=weight, grad_output=grad_output):
            leaf = logits.to(to).requires_grad_()
            of_class = None if weight is None else weight.to(to)
            loss = function(leaf, target, of_class, reduction="none", label_smoothing=smoothing)
            return loss.detach(), torch.autograd.grad(loss, leaf, grad_output.to(to))[0]

        truth = values(torch.nn.functional.cross_entropy, torch.float64)
        for our, true in zip(values(cross_entropy, dtype), truth, strict=True):
            bound = 4 * torch.finfo(dtype).eps * (1 + true.abs().amax())
            assert (our.double() - true).abs().amax() <= bound, f"{rows} rows of {classes} classes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [3, 10, 17, 100])
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), NAN])
def test_cross_entropy_of_special_logits(dtype, classes, special):
    logits = torch.randn(20, classes).to(dtype)
    logits[3, classes // 2] = logits[7, :] = logits[11, 0] = logits[19, classes - 1] = special
    logits[12:14] = logits[7]
    logits[12, 1] = logits[13, classes - 1] = 0.25  # one class alone is not special
    target = torch.randint(classes, (20,))
    target[3], target[12], target[13] = classes // 2, 1, 0
    results = []
    # Torch in float64, for its gradients of bfloat16 are rounded more than once.
    for function, to in ((cross_entropy, dtype), (torch.nn.functional.cross_entropy, torch.float64)):
        leaf = logits.to(to).requires_grad_()
        loss = function(leaf, target, reduction="none")
        results.append((loss.detach(), torch.autograd.grad(loss, leaf, torch.linspace(-1, 1, 20).to(dtype).to(to))[0]))
    for our, true in zip(*results, strict=True):
        torch.testing.assert_close(our, true.to(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", DIFFERENTIABLE)
@pytest.mark.parametrize("shape", [(1, 5, 1), (17, 33, 7), (65, 100, 130)])
def test_other_dtypes(dtype, activation, shape):
    batch, ins, outs = shape
    inputs = [tensor.to(dtype) for tensor in (torch.randn(batch, ins), torch.randn(outs, ins) / 8, torch.randn(outs))]
    grad_output = torch.randn(batch, outs).to(dtype)

    def values(to, function):
        leaves = [value.to(to).requires_grad_() for value in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(to))]

    ours = values(dtype, lambda *tensors: linear_act(*tensors, activation=activation))
    truth = values(torch.float64, lambda *tensors: EAGER[activation](torch.nn.functional.linear(*tensors)))
    for our, true in zip(ours, truth, strict=True):
        assert our.dtype == dtype
        assert_rounded(our, true, 0)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_every_bfloat16(activation):
    """Forward and backward are right to the last place, but for ties: the work between is in float32."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)[3:, None]
    z = z[(z.abs() >= LEAST_NORMAL) | z.isnan()][:, None]  # the library's product need not keep denormal numbers
    leaf = z.clone().requires_grad_()
    output = linear_act(leaf, torch.ones(1, 1, dtype=torch.bfloat16), None, activation)
    grad_output = torch.randn(z.shape).bfloat16()
    (grad,) = torch.autograd.grad(output, leaf, grad_output)
    y, gy = output.detach().double(), grad_output.double()
    slope = {"sigmoid": (1 - y) * y, "tanh": 1 - y * y, "relu": torch.where(y <= 0, 0.0, 1.0)}[activation]
    for found, truth in ((output.detach(), EAGER[activation](z.double())), (grad, gy * slope)):
        assert torch.equal(found.isnan(), truth.isnan())
        is_finite = truth.isfinite()
        assert torch.equal(found[truth.isinf()].double(), truth[truth.isinf()])
        # Half a unit of bfloat16, of 2^16 units of float32, and a few of the work in float32; denormal results may
        # be flushed to 0
        bound = torch.where(truth.abs() < LEAST_NORMAL, 2.0**23, 2**15 + 8)
        assert (units(found, truth) <= bound)[is_finite].all()


def guarded(*shape, dtype=torch.float32):
    """Random values that end where a page begins that nobody may read or write."""
    count, size = torch.Size(shape).numel(), dtype.itemsize
    pages = -(-count * size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    values = torch.frombuffer(memory, dtype=dtype, count=count, offset=pages * mmap.PAGESIZE - count * size)
    values = values.view(shape)
    return values.copy_(torch.randn(shape) if dtype.is_floating_point else torch.zeros(shape))


def visit_guarded_memory():
    """All kernels on memory whose end is guarded; the process ends at the first byte that is none of theirs."""
    forward, backward = torch.ops.torch_mlp.linear_act, torch.ops.torch_mlp._linear_act_backward
    cross, cross_backward = torch.ops.torch_mlp.cross_entropy, torch.ops.torch_mlp._cross_entropy_backward
    soft = torch.ops.torch_mlp.cross_entropy_probabilities
    soft_backward = torch.ops.torch_mlp._cross_entropy_probabilities_backward
    lengths = [1, 3, 5, 8, 9, 17, 31, 65]
    for batch, ins, outs in itertools.product([1, 3, 9, 16, 17, 65], lengths, lengths):
        input, weight, bias, grad_output = guarded(batch, ins), guarded(outs, ins), guarded(outs), guarded(batch, outs)
        output = guarded(batch, outs).copy_(forward(input, weight, bias, "tanh"))
        backward(grad_output, input, weight, output, "tanh", True, True, True)
    for dtype, rows, classes in itertools.product([torch.float32, torch.bfloat16], [1, 3, 17], lengths):
        logits, of_class, target = (
            guarded(rows, classes, dtype=dtype),
            guarded(classes, dtype=dtype),
            guarded(rows, dtype=torch.int64),
        )
        _, lse, total = cross(logits, target, of_class, "none", -100, 0.1)
        grad_output, grad_lse = guarded(rows, dtype=dtype), guarded(rows)
        statistics, probabilities = guarded(2, rows).copy_(lse), guarded(rows, classes, dtype=dtype)
        cross_backward(grad_output, grad_lse, logits, target, of_class, statistics, total, "none", -100, 0.1)
        soft(logits, probabilities, "none")
        soft_backward(grad_output, grad_lse, logits, probabilities, statistics, "none", True, True)
        z, bias = guarded(rows, classes, dtype=dtype), guarded(classes, dtype=dtype)
        output = guarded(rows, classes, dtype=dtype).copy_(forward(z, torch.eye(classes).to(dtype), bias, "sigmoid"))
        backward(logits, z, torch.eye(classes).to(dtype), output, "sigmoid", True, True, True)
    binary, binary_backward = (
        torch.ops.torch_mlp.binary_cross_entropy_with_logits,
        torch.ops.torch_mlp._binary_cross_entropy_with_logits_backward,
    )
    for dtype, rows, cols in itertools.product([torch.float32, torch.bfloat16], [1, 17], [*lengths, 1025]):
        x, y, w, p = (guarded(*shape, dtype=dtype) for shape in ((rows, cols), (rows, cols), (cols,), (rows, cols)))
        binary(x, y, w, p, "none")
        binary_backward(guarded(rows, cols, dtype=dtype), x, y, w, p, "none", True, True)
    print("all visited")


def test_nothing_outside_is_touched():
    # Inputs end at a page that cannot be read; glibc's checking allocator looks behind each result when it is freed.
    code = "from test_cpu_kernels import visit_guarded_memory as visit; visit()"
    environment = {**os.environ, "LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    folder = os.path.dirname(__file__)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert result.stdout == "all visited\n", f"exit status {result.returncode}\n{result.stderr[-2000:]}"


@pytest.mark.parametrize("shape", [(0, 5, 4), (20, 0, 40), (7, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_sizes(dtype, shape):
    batch, ins, outs = shape
    inputs = [torch.randn(*size).to(dtype) for size in ((batch, ins), (outs, ins), (outs,))]
    grad_output = torch.randn(batch, outs).to(dtype)

    def values(to, function):
        leaves = [value.to(to).requires_grad_() for value in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(to))]

    ours = values(dtype, lambda *tensors: linear_act(*tensors, activation="sigmoid"))
    truth = values(torch.float64, lambda *tensors: torch.sigmoid(torch.nn.functional.linear(*tensors)))
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(our, true.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_bits_do_not_depend_on_the_number_of_threads():
    # Large enough for two threads, see kMultiplicationsPerThread; the forward pass is the kernels' on any processor,
    # the gradients' products only at a forced level.
    input, weight, bias = torch.randn(128, 700), torch.randn(500, 700) / 30, torch.randn(500)
    long_input, few_outputs = torch.randn(3000, 700), torch.randn(10, 700) / 30
    logits, target = torch.randn(3001, 1003, requires_grad=True), torch.randint(1003, (3001,))
    output, grad_output = linear_act(input, weight, bias), torch.randn(128, 500)
    products = bool(os.environ.get(FORCED))

    def results():
        loss = cross_entropy(logits, target)
        return [
            linear_act(input, weight, bias, "sigmoid"),
            linear_act(long_input, few_outputs, bias[:10], "tanh"),
            loss,
            torch.autograd.grad(loss, logits, torch.tensor(1.3))[0],
            *torch.ops.torch_mlp._linear_act_backward(
                grad_output, input, weight, output, "sigmoid", products, products, True
            ),
        ]

    threads = torch.get_num_threads()
    try:
        by_threads = []
        for count in (*ALIKE_THREADS, *reversed(ALIKE_THREADS)):
            torch.set_num_threads(count)
            by_threads.append(results())
    finally:
        torch.set_num_threads(threads)
    for other in by_threads[1:]:
        for left, right in zip(by_threads[0], other, strict=True):
            assert torch.equal(left, right)


def test_capability_is_known():
    assert ops.cpu_capability() == (os.environ.get(FORCED) or ops.cpu_capability())
    assert ops.cpu_capability() in ("default", "avx2", "avx512", "avx512_bf16", "amx")
