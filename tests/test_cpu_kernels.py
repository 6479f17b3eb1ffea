"""The vector kernels of the CPU: every instruction set, every edge of a tile, units in the last place."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import assert_no_less_accurate
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_mlp import ops
from torch_mlp.functional import cross_entropy, linear_act

FORCED = "TORCH_MLP_CPU_CAPABILITY"
EAGER = {"identity": lambda z: z, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
NAN = float("nan")


@pytest.mark.skipif(FORCED in os.environ, reason="is run at this instruction set by the same test without it")
@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_every_instruction_set(level):
    # A forced level also takes the products that the library would compute, see kernels.cpp: so all three are run.
    environment = {**os.environ, FORCED: level}
    probe = "import torch_mlp; print(torch_mlp.ops.cpu_capability())"
    result = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if "ValueError" in result.stderr:
        pytest.skip(f"needs {level}: {result.stderr.strip().splitlines()[-1]}")
    assert result.stdout.strip() == level
    folder = os.path.dirname(__file__)
    files = [os.path.join(folder, f"test_{name}.py") for name in ("cpu_kernels", "linear_act", "cross_entropy")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not cuda", *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.dirname(folder))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def surrounded(rows, cols, generator, offset=3):
    """A matrix inside a larger one of NaN, that begins at an odd address."""
    whole = torch.full((rows + 2, cols + 2 * offset), NAN)
    part = whole[1:-1, offset:-offset]
    part.copy_(torch.randn(rows, cols, generator=generator))
    return part


# Around the tiles' 6 rows, the vectors' 4, 8 and 16 lanes, the panels' 8, 16 and 64 and the blocks' 16, 48 and 256.
sizes = st.sampled_from([1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 100, 129, 257])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, st.sampled_from(sorted(EAGER)), st.booleans(), st.integers(0, 10**6))
@example(17, 4097, 17, "sigmoid", True, 0)  # too deep for a panel
@example(600, 40, 33, "tanh", True, 0)  # too long a batch for the kernels
@example(130, 600, 520, "sigmoid", True, 0)  # b does not stay in the cache, three depths
@example(520, 300, 10, "relu", False, 0)  # few outputs, long batch
@example(16, 256, 17, "identity", True, 0)
def test_edges_of_tiles(batch, ins, outs, activation, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = [surrounded(batch, ins, generator), surrounded(outs, ins, generator)]
    inputs[1].mul_(ins**-0.5)
    if has_bias:
        inputs.append(torch.randn(outs, generator=generator))
    grad_output = surrounded(batch, outs, generator)

    def values(dtype, function):
        leaves = [value.to(dtype).detach().requires_grad_() for value in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(dtype))]

    def eager(input, weight, bias=None):
        return EAGER[activation](torch.nn.functional.linear(input, weight, bias))

    ours = values(torch.float32, lambda *tensors: linear_act(*tensors, activation=activation))
    truth = values(torch.float64, eager)
    for our, true, depth in zip(ours, truth, (ins, outs, batch, batch), strict=False):
        error = (our.double() - true).abs().max()
        # Each term and each sum may be off by half a unit; a wrong or missing element is off by far more.
        bound = 4 * torch.finfo(torch.float32).eps * (3 + depth**0.5) * (1 + true.abs().max())
        assert error <= bound, f"error {error:.3g}, expected at most {bound:.3g}"


@pytest.mark.parametrize("outs", [3, 40])  # by dot products, by panels
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_activations_to_the_last_place(activation, outs):
    z = torch.cat([torch.linspace(-105, 105, 200_001), torch.randn(50_000) * 1e-3, torch.randn(50_000) * 1e-30])
    z = torch.cat([z, torch.tensor([0.0, -0.0, 88.7, -87.3, 1e38, -1e38, float("inf"), -float("inf"), NAN])])
    z = z[: len(z) // 64 * 64 - 64].reshape(-1, 64).T.flatten() if outs > 16 else z  # any order: lanes differ
    output = torch.cat([linear_act(part[:, None], torch.ones(outs, 1), None, activation) for part in z.split(64)])
    truth = EAGER[activation](z.double())
    unit = (torch.nextafter(truth.float().abs(), torch.tensor(float("inf"))) - truth.float().abs()).double()
    for column in output.T:
        is_normal = (truth.abs() > 1.2e-38) & truth.isfinite()
        assert ((column.double() - truth).abs() <= 3 * unit)[is_normal].all()
        is_tiny = truth.abs() <= 1.2e-38
        assert ((column.double() - truth).abs()[is_tiny] <= 1.2e-38).all()
        assert torch.equal(column.isnan(), truth.isnan())


def test_exp_to_the_last_place():
    # With logits (0, -t) the second one's gradient is p = exp(-t) / (1 + exp(-t)) by the saved 1 + exp(-t).
    t = torch.linspace(0, 86, 100_000)
    logits = torch.stack([torch.zeros_like(t), -t], 1)
    target = torch.zeros(len(t), dtype=torch.int64)
    options = None, "sum", -100, 0.0
    loss, lse, total_weight = torch.ops.torch_mlp.cross_entropy(logits, target, *options)
    exact = torch.exp(-t.double())
    assert ((lse[1].double() - (1 + exact)).abs() <= 2 * torch.finfo(torch.float32).eps).all()
    grad = torch.ops.torch_mlp._cross_entropy_backward(
        torch.tensor(1.7), logits, target, None, lse, total_weight, *options[1:]
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


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), NAN])
def test_cross_entropy_of_special_logits(classes, special):
    logits = torch.randn(20, classes)
    logits[3, 5] = logits[7, :] = logits[11, 0] = logits[19, classes - 1] = special
    target = torch.randint(classes, (20,))
    results = []
    for function in (cross_entropy, torch.nn.functional.cross_entropy):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, target, reduction="none")
        results.append((loss.detach(), torch.autograd.grad(loss, leaf, torch.linspace(-1, 1, 20))[0]))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, equal_nan=True)


@pytest.mark.parametrize("activation", sorted(EAGER))
@pytest.mark.parametrize("shape", [(1, 5, 1), (17, 33, 7), (65, 100, 130)])
def test_bfloat16_tails(activation, shape):
    batch, ins, outs = shape
    inputs = [torch.randn(batch, ins), torch.randn(outs, ins) * ins**-0.5, torch.randn(outs)]
    grad_output = torch.randn(batch, outs).bfloat16()

    def values(dtype, function):
        leaves = [value.bfloat16().to(dtype).requires_grad_() for value in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(dtype))]

    ours = values(torch.bfloat16, lambda *tensors: linear_act(*tensors, activation=activation))
    truth = values(torch.float64, lambda *tensors: EAGER[activation](torch.nn.functional.linear(*tensors)))
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(our.double(), true, rtol=0.05, atol=0.02 * float(1 + true.abs().max()))


def test_bits_do_not_depend_on_the_number_of_threads():
    # Large enough for two threads, see kMultiplicationsPerThread; the forward pass is the kernels' on any processor.
    input, weight, bias = torch.randn(128, 700), torch.randn(500, 700) / 30, torch.randn(500)
    logits, target = torch.randn(3001, 1003, requires_grad=True), torch.randint(1003, (3001,))

    def results():
        loss = cross_entropy(logits, target)
        return linear_act(input, weight, bias, "sigmoid"), loss, torch.autograd.grad(loss, logits, torch.tensor(1.3))[0]

    threads = torch.get_num_threads()
    try:
        by_threads = []
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            by_threads.append(results())
    finally:
        torch.set_num_threads(threads)
    for other in by_threads[1:]:
        for left, right in zip(by_threads[0], other, strict=True):
            assert torch.equal(left, right)


def test_capability_is_known():
    assert ops.cpu_capability() == os.environ.get(FORCED, ops.cpu_capability())
    assert ops.cpu_capability() in ("default", "avx2", "avx512")
