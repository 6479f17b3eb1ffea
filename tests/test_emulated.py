"""The CUDA kernels on the CPU, by tests/emulated/cuda_on_cpu.h: what a GPU computes can be checked without one.

The sources of csrc/cuda are translated, launches become calls, and compiled as a library of ops of their own, whose
results have to be those of the CPU kernels. Speed, races, and what nvcc makes of the code are not tested here.
"""

import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import compile_objects
from test_ops import SAMPLES, results_of
from torch.utils import cpp_extension

import torch_mlp  # noqa: F401 - the ops to compare with

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"
NAMESPACE = "torch_mlp_emulated"
OPS = sorted({op for path in SOURCES.glob("cuda/*.cu") for op in re.findall(r'm\.impl\("(\w+)"', path.read_text())})
MACROS = """
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#undef STD_CUDA_CHECK
#undef CUDA_KERNEL_ASSERT
#define STD_CUDA_KERNEL_LAUNCH_CHECK()
#define STD_CUDA_CHECK(call) ((void)(call))
#define CUDA_KERNEL_ASSERT(condition) ((condition) ? (void)0 : (std::puts(#condition), std::abort()))
"""


def end_of(text, start):
    """Behind the bracket that closes the one at start."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at + 1
    raise AssertionError("brackets that do not match")


def with_calls_for_launches(text):
    """kernel<T><<<grid, block, shared, stream>>>(arguments) as launch(grid, block, [&] { kernel<T>(arguments); })."""
    while (at := text.find("<<<")) >= 0:
        close = text.index(">>>", at)
        end = end_of(text, close + 3)
        name = re.search(r"[\w:]+\s*$", re.sub(r"<[^;{}]*>\s*$", lambda m: "_" * len(m[0]), text[:at]))
        grid, block = re.match(r"((?:[^,(]|\([^)]*\))+),((?:[^,(]|\([^)]*\))+),", text[at + 3 : close]).groups()
        call = f"emulated::launch({grid}, {block}, [&] {{ {text[name.start() : at]}{text[close + 3 : end]}; }})"
        text = text[: name.start()] + call + text[end:]
    return text


def translated(text):
    text = with_calls_for_launches(text)
    text = text.replace("#include <cuda_runtime.h>", f'#include "{TESTS}/emulated/cuda_on_cpu.h"')
    text = text.replace("namespace torch_mlp {", MACROS + "namespace torch_mlp {", 1)
    barrier = r"(void grid_barrier\([^{]*\)) \{.*?\n\}"
    text = re.sub(barrier, r"\1 { emulated::pause(emulated::Waits::ForGrid); }", text, flags=re.DOTALL)
    text = text.replace("#pragma unroll", "// unroll")
    text = re.sub(r"const DeviceGuard guard\(.*\);", "", text)
    text = re.sub(r"(inline cudaStream_t current_stream\(.*\)) \{[^}]*\}", r"\1 { return nullptr; }", text)
    return text.replace("STABLE_TORCH_LIBRARY_IMPL(torch_mlp, CUDA", f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU")


def toolkit_headers():
    """The folder of cuda_runtime.h, by nvcc itself: that on PATH may be a wrapper whose folder is not the toolkit's."""
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin:{os.environ['PATH']}")
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull]
    top = re.search(r"^#\$ TOP=(.+)$", subprocess.run(command, capture_output=True, text=True).stderr, re.MULTILINE)
    folder = Path(top[1], "include") if top else None
    return folder if folder and (folder / "cuda_runtime.h").exists() else None


@pytest.fixture(scope="session")
def emulated(compiler, tmp_path_factory):
    """The ops that were translated."""
    toolkit = toolkit_headers()
    if torch.version.cuda is None or toolkit is None:
        pytest.skip("needs a CUDA toolkit and a CUDA build of torch, whose headers the kernels include; no GPU")
    folder = tmp_path_factory.mktemp("emulated")
    for path in SOURCES.rglob("*"):
        if path.suffix in (".h", ".cuh", ".cu") or path.name == "ops.cpp":
            target = folder / path.relative_to(SOURCES)
            target.parent.mkdir(exist_ok=True)
            text = path.read_text()
            if path.parent.name == "cuda" and path.name != "launch.h":
                text = translated(text)
            target.write_text(text.replace("STABLE_TORCH_LIBRARY(torch_mlp,", f"STABLE_TORCH_LIBRARY({NAMESPACE},"))
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-DTORCH_MLP_WITH_CUDA", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-isystem{path}" for path in (toolkit, *cpp_extension.include_paths())]
    sources = [folder / "ops.cpp", *sorted(folder.glob("cuda/*.cu"))]
    objects = compile_objects([compiler, *flags, "-x", "c++"], sources, folder)
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch_cuda"]
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", folder / "ops.so"], check=True)
    torch.ops.load_library(folder / "ops.so")
    return getattr(torch.ops, NAMESPACE)


def assert_close(emulated_results, expected_results, is_rounded=False):
    """is_rounded: to 16 bits on the way."""
    for ours, expected in zip(emulated_results, expected_results, strict=True):
        is_coarse = is_rounded or expected.dtype in (torch.bfloat16, torch.float16)
        options = {"rtol": 0.02, "atol": 0.01} if is_coarse else {}
        torch.testing.assert_close(ours, expected, equal_nan=True, **options)


@pytest.mark.parametrize("name", [name for name in OPS if name != "_cross_entropy_rescale_"])  # which the CPU has not
def test_ops(emulated, name):
    for sample in SAMPLES[name]("cpu"):
        results = [results_of(getattr(ops, name).default, sample) for ops in (emulated, torch.ops.torch_mlp)]
        assert_close(*results, is_rounded=name == "_train_epoch" and sample[-1])  # products in bfloat16


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("classes", [1, 10, 128, 129, 1000, 2047, 5003, 30011])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cross_entropy(emulated, dtype, classes, offset):
    """Every number of threads that may share a row, from where a row may begin."""
    rows = 70 if classes < 2000 else 5
    input = (3 * torch.randn(rows * classes + offset)).to(dtype)[offset:].view(rows, classes)
    target, weight = torch.randint(classes, (rows,)), torch.rand(classes).to(dtype)
    target[rows // 2] = -100
    for options in ((None, "mean", -100, 0.0), (weight, "sum", -100, 0.2), (weight, "none", -100, 0.0)):
        exact, exact_weight = input.double(), None if options[0] is None else weight.double()
        expected = torch.ops.torch_mlp._cross_entropy_with_gradient(exact, target, exact_weight, *options[1:])
        loss, lse, total_weight, grad = emulated._cross_entropy_with_gradient(input, target, *options)
        tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
        for ours, truth in zip((loss, lse, total_weight, grad), expected, strict=True):
            error = (ours.double() - truth).square().mean().sqrt()
            assert error <= tolerance * truth.square().mean().sqrt()
        assert not grad[rows // 2].any()
        if options[1] != "none":
            grad_output = torch.tensor(0.3, dtype=dtype)
            rest = (input, target, options[0], lse, total_weight, *options[1:])
            backward = emulated._cross_entropy_backward(grad_output, None, *rest)
            emulated._cross_entropy_rescale_(grad.fill_(7), torch.ones_like(grad_output), *rest)
            assert (grad == 7).all()  # it would hold what comes with 1
            emulated._cross_entropy_rescale_(grad, grad_output, *rest)
            assert torch.equal(grad, backward)


@pytest.mark.parametrize("classes", [1, 10, 128, 129, 1000, 2047])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_probabilities(emulated, dtype, classes):
    """Every number of threads that may share a row, and blocks enough for sums of their own."""
    rows = 300
    input, target = (3 * torch.randn(rows, classes)).to(dtype), torch.rand(rows, classes).to(dtype)
    ops = emulated.cross_entropy_probabilities, emulated._cross_entropy_probabilities_backward
    exact_ops = (
        torch.ops.torch_mlp.cross_entropy_probabilities,
        torch.ops.torch_mlp._cross_entropy_probabilities_backward,
    )
    for reduction in ("mean", "sum", "none"):
        grad_output = torch.randn(rows if reduction == "none" else (), dtype=torch.float64).to(dtype)
        results = []
        for (forward, backward), as_dtype in ((ops, lambda t: t), (exact_ops, torch.Tensor.double)):
            tensors = as_dtype(input), as_dtype(target)
            loss, lse = forward(*tensors, reduction)
            grads = backward(as_dtype(grad_output), None, *tensors, lse, reduction, True, True)
            results.append((loss, lse, *grads))
        tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
        for ours, truth in zip(*results, strict=True):
            error = (ours.double() - truth).square().mean().sqrt()
            assert error <= tolerance * truth.square().mean().sqrt()


@pytest.mark.parametrize("classes", [67, 128])
def test_the_sum_of_a_row_is_as_exact_where_few_threads_share_it(emulated, classes):
    """Its error is in every gradient of the row."""
    input = 3 * torch.randn(1000, classes)
    _, (maximum, sum) = emulated.cross_entropy_probabilities(input, torch.rand(1000, classes), "none")
    exact = (input.double() - maximum.double()[:, None]).exp().sum(1)
    assert (sum / exact - 1).square().mean().sqrt() <= 0.5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("factor", [torch.inf, -torch.inf, torch.nan])
def test_upstream_gradients_that_are_not_finite(emulated, factor):
    input, target = torch.randn(7, 5, requires_grad=True), torch.randint(5, (7,))
    target[3] = -100
    grad_output = torch.tensor(factor)
    loss = torch.nn.functional.cross_entropy(input.double(), target, reduction="sum")
    (expected,) = torch.autograd.grad(loss, input, grad_output.double())
    rest = (input.detach(), target, None)
    _, lse, total_weight = emulated.cross_entropy(*rest, "sum", -100, 0.0)
    grad = emulated._cross_entropy_backward(grad_output, None, *rest, lse, total_weight, "sum", -100, 0.0)
    torch.testing.assert_close(grad, expected, equal_nan=True)


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "tanh", "relu"])
@pytest.mark.parametrize(("batch", "ins", "outs"), [(1, 3, 5), (70, 20, 40), (300, 7, 33), (1000, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_linear_act(emulated, dtype, batch, ins, outs, activation):
    """Columns and rows that are split among threads and blocks, and those that are left over."""
    tensors = [torch.randn(size, dtype=torch.float64).to(dtype) for size in ((batch, ins), (outs, ins), (outs,))]
    grad_output = torch.randn(batch, outs, dtype=torch.float64).to(dtype)
    output = torch.ops.torch_mlp.linear_act(*tensors, activation)
    assert_close([emulated.linear_act(*tensors, activation)], [output])
    arguments = (grad_output, *tensors[:2], output, activation, True, True, True)
    exact = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
    truths = torch.ops.torch_mlp._linear_act_backward(*exact)
    for ours, truth in zip(emulated._linear_act_backward(*arguments), truths, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.016}[dtype]
        assert (ours.double() - truth).square().mean().sqrt() <= tolerance * truth.square().mean().sqrt()


@pytest.mark.parametrize(
    ("widths", "count", "batch_size"),
    [
        ([784, 128, 10], 300, 128),
        ([20, 7, 5, 3], 33, 8),
        ([300, 150, 150, 40], 150, 70),  # tiles of every size, logits in several
        ([1, 1], 3, 3),
        ([5, 4, 3, 4, 3, 4, 3, 4, 2], 20, 6),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("activation", "momentum", "decay", "bias"),
    [("identity", 0.0, 0.0, True), ("sigmoid", 0.9, 0.0, True), ("tanh", 0.7, 0.02, True), ("relu", 0.0, 0.01, False)],
)
def test_train_epoch(emulated, widths, count, batch_size, activation, momentum, decay, bias):
    """The kernel of small networks, against the CPU's in float64."""
    sizes = [size for ins, outs in pairwise(widths) for size in ((outs, ins), (outs if bias else 0,))]
    values = [
        torch.randn(size, dtype=torch.float64) / size[-1] ** 0.5 if size[-1] else torch.empty(0) for size in sizes
    ]
    velocities = [torch.randn(size) / 10 for size in sizes] if momentum else []
    pixels = torch.randint(256, (count + 5, widths[0]), dtype=torch.uint8)
    labels, order = torch.randint(widths[-1], (count + 5,)), torch.randperm(count + 5)[:count]
    rates = torch.linspace(0.2, 0.1, -(-count // batch_size), dtype=torch.float64)
    activations = [activation] * (len(widths) - 2) + ["identity" if activation != "tanh" else "tanh"]
    for images, lr in ((pixels, rates), (pixels / 256, torch.full_like(rates, 0.1))):
        scale = 1 / 256 if images.dtype == torch.uint8 else 1.0
        results = []
        for op, dtype in ((torch.ops.torch_mlp._train_epoch, torch.float64), (emulated._train_epoch, torch.float32)):
            kept = [[tensor.to(dtype, copy=True) for tensor in tensors] for tensors in (values, velocities)]
            data = images if images.dtype == torch.uint8 else images.to(dtype)
            arguments = (data, labels, order, kept[0][::2], kept[0][1::2], kept[1], activations, batch_size, lr)
            losses = op(*arguments, momentum, decay, scale, -0.3, False)
            results.append([losses, *kept[0], *kept[1]])
        for truth, ours in zip(*results, strict=True):
            assert ours.isfinite().all()
            assert (ours.double() - truth).norm() <= 1e-5 * truth.norm()
