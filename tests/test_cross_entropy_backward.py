"""The backward pass of cross_entropy, where the forward pass computes the gradient: torch_mlp/ops/cross_entropy.py."""

import importlib

import pytest
import torch
from conftest import assert_no_less_accurate, why_no_cuda
from functorch.compile import make_boxed_func
from test_cross_entropy import eager, make
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from torch_mlp.functional import cross_entropy

CLASSES = pytest.mark.parametrize("classes", [1, 3, 10, 16, 17, 67, 1000, 5003, 30011])
REDUCED = pytest.mark.parametrize("reduction", ["mean", "sum"])
OPS = torch.ops.torch_mlp


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch):
    """On CUDA the forward pass computes the gradient of many logits only, and of as few as these in this file."""
    monkeypatch.setattr(importlib.import_module("torch_mlp.ops.cross_entropy"), "_FEW_LOGITS", 0)


class Calls(TorchDispatchMode):
    """Which of our ops are called, in order."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torch_mlp":
            self.ops.append(func)
        return func(*args, **(kwargs or {}))


def truth(input, target, weight, grad_output, **options):
    exact = input.detach().double().requires_grad_()
    loss = eager(exact, target, None if weight is None else weight.double(), **options)
    return torch.autograd.grad(loss, exact, grad_output.double())[0]


@CLASSES
@REDUCED
@pytest.mark.parametrize(("weighted", "label_smoothing"), [(False, 0.0), (True, 0.0), (True, 0.2), (False, 0.2)])
@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0, 65536.0])
def test_any_upstream_gradient(device, reduction, weighted, label_smoothing, classes, factor):
    # 37 rows: vectors of any width end within them
    input, target, weight = make(device, torch.float32, 37, classes, weighted=weighted)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    grad_output = torch.tensor(factor, device=device)
    (grad,) = torch.autograd.grad(cross_entropy(input, target, weight, **options), input, grad_output)
    expected = truth(input, target, weight, grad_output, **options)
    torch.testing.assert_close(grad.double(), expected, rtol=2e-6, atol=2e-7 * float(expected.abs().max()))
    assert not grad[18].any()  # is ignored


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_accuracy(device, dtype, classes, offset, factor):
    logits = torch.randn(37 * classes + offset, device=device).to(dtype)[offset:].view(37, classes)
    target = torch.randint(classes, (37,), device=device)
    grad_output = torch.tensor(factor, device=device, dtype=dtype)
    ours, theirs = logits.requires_grad_(), logits.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(ours, target, reduction="sum"), ours, grad_output)
    (expected,) = torch.autograd.grad(eager(theirs, target, reduction="sum"), theirs, grad_output)
    assert_no_less_accurate(grad, expected, truth(logits, target, None, grad_output, reduction="sum"))


@REDUCED
@pytest.mark.parametrize("factor", [torch.inf, -torch.inf, torch.nan])
def test_upstream_gradients_that_are_not_finite(device, reduction, factor):
    input, target, weight = make(device, torch.float32, 37, 10)
    grad_output = torch.tensor(factor, device=device)
    (grad,) = torch.autograd.grad(cross_entropy(input, target, weight, reduction=reduction), input, grad_output)
    expected = truth(input, target, weight, grad_output, reduction=reduction)
    torch.testing.assert_close(grad.double(), expected, equal_nan=True)
    assert not grad[18].any()


@CLASSES
@REDUCED
def test_as_many_backward_passes_as_are_asked_for(device, reduction, classes):
    input, target, weight = make(device, torch.float32, 37, classes)
    before = input.detach().clone()
    loss = cross_entropy(input, target, weight, reduction=reduction)
    factors = torch.tensor([1.0, -3.0, 1.0, 0.7], device=device)
    grads = [torch.autograd.grad(loss, input, factor, retain_graph=True)[0] for factor in factors]
    copies = [grad.clone() for grad in grads]
    for grad in grads:
        grad.mul_(2)  # what a caller does with one of them is nothing to the others
    grads += [torch.autograd.grad(loss, input, factors[1])[0]]
    assert torch.equal(input, before)
    assert torch.equal(copies[0], copies[2])
    assert torch.equal(copies[1], grads[-1])
    for grad, copy, factor in zip(grads, copies, factors, strict=False):
        assert torch.equal(grad, 2 * copy)
        expected = truth(input, target, weight, factor, reduction=reduction)
        torch.testing.assert_close(copy.double(), expected, rtol=2e-6, atol=2e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("classes", [10, 1100, 4200])
def test_more_rows_than_blocks(device, classes):
    """Of a grid, whose blocks then take more than one; with few classes, rows for several blocks."""
    input, target, _ = make(device, torch.float32, 4100, classes)
    loss = cross_entropy(input, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, input, torch.tensor(0.7, device=device))
    expected = truth(input, target, None, torch.tensor(0.7, device=device), reduction="sum")
    torch.testing.assert_close(grad.double(), expected, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(loss.double(), eager(input.double(), target, reduction="sum"), rtol=2e-7, atol=0)


@pytest.mark.parametrize("input", [torch.empty(0, 5), torch.empty(3, 0)], ids=["no rows", "no classes"])
@REDUCED
def test_nothing_to_differentiate(device, input, reduction):
    input = input.to(device).requires_grad_()
    target = torch.full(input.shape[:1], -100, device=device)
    cross_entropy(input, target, reduction=reduction).backward()
    assert input.grad.shape == input.shape


def test_loss_that_is_used_twice(device):
    input, target, weight = make(device, torch.float32, 37, 10)
    losses = [function(input, target, weight) for function in (cross_entropy, eager)]
    grads = [torch.autograd.grad(2 * loss + loss.sin(), input)[0] for loss in losses]
    torch.testing.assert_close(*grads)


def test_batched_upstream_gradients(device):
    input, target, weight = make(device, torch.float32, 37, 10)
    factors = torch.randn(4, device=device)
    loss = cross_entropy(input, target, weight)
    (batched,) = torch.autograd.grad(loss, input, factors, is_grads_batched=True)
    for grad, factor in zip(batched, factors, strict=True):
        torch.testing.assert_close(grad, truth(input, target, weight, factor).float())


def test_vmap_over_upstream_gradients(device):
    input, target, weight = make(device, torch.float32, 37, 10)
    factors = torch.randn(4, device=device)
    loss = cross_entropy(input, target, weight)
    mapped = torch.vmap(lambda factor: torch.autograd.grad(loss, input, factor, retain_graph=True)[0])(factors)
    for grad, factor in zip(mapped, factors, strict=True):
        torch.testing.assert_close(grad, truth(input, target, weight, factor).float())


@pytest.mark.parametrize("classes", [10, 16, 17])
def test_one_logit_far_above_the_others(device, classes):
    """Wherever it is, it is the maximum that keeps exp from overflow."""
    input = (300 * torch.eye(classes, device=device)).requires_grad_()
    target = torch.arange(classes, device=device).roll(1)
    loss = cross_entropy(input, target)
    assert loss == 300
    (grad,) = torch.autograd.grad(loss, input)
    torch.testing.assert_close(grad, truth(input, target, None, torch.ones((), device=device)).float())


def test_saved_tensors_that_are_packed(device):
    input, target, weight = make(device, torch.float32, 37, 10)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        loss = cross_entropy(input, target, weight)
    grads = [torch.autograd.grad(loss, input, torch.tensor(0.5, device=device), retain_graph=True)[0] for _ in "ab"]
    assert torch.equal(*grads)
    torch.testing.assert_close(grads[0], truth(input, target, weight, torch.tensor(0.5, device=device)).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@REDUCED
def test_softmax_is_computed_once(dtype, reduction):
    input, target, weight = make("cpu", dtype)
    with Calls() as calls:
        cross_entropy(input, target, weight, reduction=reduction).backward()
    assert calls.ops == [OPS._cross_entropy_with_gradient.default]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"reduction": "none"}),
        (torch.float32, {"return_lse": True}),
        (torch.bfloat16, {}),  # would be rounded twice
        (torch.float16, {}),
    ],
)
def test_gradient_is_computed_in_the_backward_pass_else(dtype, options):
    input, target, weight = make("cpu", dtype)
    with Calls() as calls:
        result = cross_entropy(input, target, weight, **options)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
    assert calls.ops == [OPS.cross_entropy.default, OPS._cross_entropy_backward.default]


def test_compiled_code_does_not_keep_what_it_would_compute_again():
    ops = []

    def collect(graph, inputs):
        ops.extend(node.target for node in graph.graph.nodes if "torch_mlp" in str(node.target))
        return make_boxed_func(graph.forward)

    input, target, weight = make("cpu", torch.float32)
    compiled = torch.compile(cross_entropy, backend=aot_autograd(fw_compiler=collect))
    compiled(input, target, weight).backward()
    assert ops == [OPS.cross_entropy.default, OPS._cross_entropy_backward.default]
    torch.testing.assert_close(input.grad, truth(input, target, weight, torch.ones(())).float())


def test_no_gradient_is_computed_that_nobody_wants():
    input, target, weight = make("cpu", torch.float32)
    with Calls() as calls, torch.no_grad():
        cross_entropy(input, target, weight)
    with calls:
        cross_entropy(input.detach(), target, weight)
    assert calls.ops == [OPS.cross_entropy.default] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_on_cuda_the_host_learns_no_upstream_gradient(dtype):
    if reason := why_no_cuda():
        pytest.skip(reason)
    input, target, weight = make("cuda", dtype)
    factor = torch.tensor(0.5, device="cuda", dtype=dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with Calls() as calls:
            cross_entropy(input, target, weight).backward(factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls.ops == [OPS._cross_entropy_with_gradient.default, OPS._cross_entropy_rescale_.default]


def test_a_cuda_graph_computes_the_gradient_in_the_backward_pass():
    """It may run that more than once for one forward pass, with whatever has become of the gradient in between."""
    if reason := why_no_cuda():
        pytest.skip(reason)
    input, target, weight = make("cuda", torch.float32)
    factor = torch.tensor(0.5, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), Calls() as calls:
        loss = cross_entropy(input, target, weight)
        (grad,) = torch.autograd.grad(loss, input, factor)
    assert calls.ops == [OPS.cross_entropy.default, OPS._cross_entropy_backward.default]
    for value in (0.5, 3.0):
        factor.fill_(value)
        graph.replay()
        torch.testing.assert_close(grad, truth(input, target, weight, factor).float())
