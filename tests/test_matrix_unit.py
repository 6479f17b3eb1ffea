"""Products by AMX, which multiplies bfloat16: of those, and of float32 in three parts that add up to it."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_mlp import ops
from torch_mlp.functional import linear_act

# Around the bands of 32, the blocks of 256 and depths of 640; large enough for the unit to be chosen unasked.
SHAPES = [(64, 128, 256), (97, 161, 126), (300, 1000, 190), (700, 1000, 190), (448, 322, 1033)]

pytestmark = pytest.mark.skipif(
    ops.cpu_capability() != "amx", reason=f"needs the instruction set amx, has {ops.cpu_capability()}"
)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def threads_of_float32(threads):
    """Where the level is forced, see test_cpu_kernels.py, the unit has the products of any number of threads."""
    if threads > 1 and "TORCH_MLP_CPU_CAPABILITY" not in os.environ:
        pytest.skip("with several threads the matrix unit has float32 where TORCH_MLP_CPU_CAPABILITY says so")


def selection(rows, cols, generator):
    """A matrix with one power of two in each row, which selects an element, and zeros."""
    matrix = torch.zeros(rows, cols)
    chosen = torch.arange(rows) * 11 % cols
    matrix[torch.arange(rows), chosen] = 2.0 ** torch.randint(-3, 4, (rows,), generator=generator)
    return matrix


def of_all_bits(rows, cols, generator):
    """Numbers of 24 bits that differ by up to 2^40."""
    values = torch.randn(rows, cols, generator=generator)
    return values * 2.0 ** torch.randint(-20, 20, (rows, cols), generator=generator)


@pytest.mark.usefixtures("threads_of_float32")
@pytest.mark.parametrize("selects", ["input", "weight", "grad_output"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_bit_is_lost(shape, selects):
    """Of sums with one term, each operand of each product being the one of many bits."""
    batch, ins, outs = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = {"input": (batch, ins), "weight": (outs, ins), "grad_output": (batch, outs)}
    x, w, gy = ((selection if name == selects else of_all_bits)(*sizes[name], generator) for name in sizes)
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    output = linear_act(*leaves, None, "identity")
    grad_input, grad_weight = torch.autograd.grad(output, leaves, gy)

    products = {"output": (output, x, w.T), "grad_input": (grad_input, gy, w), "grad_weight": (grad_weight, gy.T, x)}
    terms = {}
    for name, (found, a, b) in products.items():
        terms[name] = (a != 0).double() @ (b != 0).double()
        is_exact = terms[name] <= 1
        assert torch.equal(found.double()[is_exact], (a.double() @ b.double())[is_exact]), name
    assert (terms["grad_input" if selects == "grad_output" else "output"] == 1).all()
    assert selects != "input" or (terms["grad_weight"] == 1).any()


def gradients(function, values):
    """The output of the function of input and weight, and its gradients."""
    input, weight = (values[name].clone().requires_grad_() for name in ("input", "weight"))
    output = function(input, weight)
    return [output.detach(), *torch.autograd.grad(output, [input, weight], values["grad_output"])]


SIZES = [0.0, 1e-44, 1e-38, 1e-36, 1e-34, 1e-30, 1e-20, 2.0**-49, 2.0**-48, 2.0**47, 2.0**48, 1e30]


@pytest.mark.usefixtures("threads_of_float32")
@pytest.mark.parametrize("operand", ["input", "weight", "grad_output"])
@pytest.mark.parametrize(
    ("where", "size"),
    [*itertools.product(["one", "row", "all"], SIZES), ("one", 3.4e38), ("one", torch.inf), ("one", torch.nan)],
)
def test_numbers_of_any_size(operand, where, size):
    """What three parts cannot hold is multiplied in float32, or is nothing beside the largest: results are torch's."""
    generator = torch.Generator().manual_seed(3)
    values = {
        "input": torch.randn(300, 200, generator=generator),
        "weight": torch.randn(290, 200, generator=generator),
        "grad_output": torch.randn(300, 290, generator=generator),
    }
    part = {"one": values[operand][77, 101:102], "row": values[operand][77], "all": values[operand]}[where]
    part.copy_(torch.where(part < 0, -1, 1) * part.abs().clamp(0.5, 1) * size)

    ours = gradients(lambda x, w: linear_act(x, w, None, "identity"), values)
    for our, true in zip(ours, gradients(torch.nn.functional.linear, values), strict=True):
        largest = true[true.isfinite()].abs().max() if true.isfinite().any() else torch.tensor(0.0)
        rounded = 2e-6 * float(largest) + 1000 * 2.0**-149  # subnormal numbers are rounded to the same last place
        torch.testing.assert_close(our, true, rtol=1e-4, atol=rounded, equal_nan=True)


# Around the tiles of 16, the bands of 32, the blocks of 512 and depths of 512 and 1024; of several blocks of sums.
BFLOAT16_SHAPES = [(1, 40, 30), (15, 33, 17), (64, 64, 64), (97, 161, 126), (333, 1000, 190), (100, 2500, 33)]
BFLOAT16_SHAPES += [(40, 90, 1700), (1300, 70, 33), (900, 1700, 1100)]


def integers(rows, cols, generator):
    """Numbers whose products' sums are exact in float."""
    return torch.randint(-8, 9, (rows, cols), generator=generator).bfloat16()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("shape", BFLOAT16_SHAPES, ids=str)
def test_sums_of_bfloat16_are_rounded_once(shape, activation):
    batch, ins, outs = shape
    generator = torch.Generator().manual_seed(sum(shape))
    values = {"input": integers(batch, ins, generator), "weight": integers(outs, ins, generator)}
    bias = integers(1, outs, generator)[0]
    values["grad_output"] = integers(batch, outs, generator)
    ours = gradients(lambda x, w: linear_act(x, w, bias, activation), values)

    x, w, gy = (values[name].double() for name in ("input", "weight", "grad_output"))
    z = x @ w.T + bias.double()
    y, gz = (z.clamp(min=0), gy * (z > 0)) if activation == "relu" else (z, gy)
    for our, true in zip(ours, [y, gz @ w, gz.T @ x], strict=True):
        assert torch.equal(our, true.bfloat16())


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("operand", ["input", "weight", "grad_output"])
@pytest.mark.parametrize("shape", [(64, 64, 64), (37, 50, 41)], ids=str)
def test_what_is_not_finite_stays_in_its_row(shape, operand, value):
    batch, ins, outs = shape
    generator = torch.Generator().manual_seed(5)
    sizes = {"input": (batch, ins), "weight": (outs, ins), "grad_output": (batch, outs)}
    values = {name: integers(*size, generator) for name, size in sizes.items()}
    values[operand][-1, -1] = value  # beside what fills up the tiles
    ours = gradients(lambda x, w: linear_act(x, w, None, "identity"), values)
    for our, true in zip(ours, gradients(torch.nn.functional.linear, values), strict=True):
        torch.testing.assert_close(our, true, rtol=0.01, atol=0, equal_nan=True)


def test_system_that_refuses():
    """Linux refuses the unit if a stack for signals is too short for its state."""
    code = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None) == 0
import torch_mlp
print(torch_mlp.ops.cpu_capability())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_MLP_CPU_CAPABILITY"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout == "avx512_bf16\n", result.stderr


def test_child_that_tries_the_unit(compiler, tmp_path):
    program = tmp_path / "trial"
    source = Path(__file__).parent / "matrix_unit" / "trial.cpp"
    subprocess.run([compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "tried\n"
