"""What holds of every op: it has samples here, and passes torch's own checks of custom ops on them."""

import itertools

import pytest
import torch
from conftest import DIFFERENTIABLE, assert_same_bits, why_no_cuda
from torch.utils._pytree import tree_flatten, tree_unflatten

import torch_mlp

# Those that take tensors: the others tell about the processor, see test_config.py.
OPS = sorted(
    name.removeprefix("torch_mlp::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torch_mlp::") and not name.startswith("torch_mlp::_cpu_")
)


def linear_act_samples(device, activations=tuple(torch_mlp.functional.ACTIVATIONS)):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for activation in activations:
            weight, bias = torch.randn(4, 5), torch.randn(4)
            for input, maybe_bias in (
                (torch.randn(3, 5), bias),
                (torch.randn(2, 3, 5), None),
                (torch.randn(0, 5), bias),
            ):
                tensors = [None if t is None else t.to(device, dtype) for t in (input, weight, maybe_bias)]
                yield (*tensors, activation)


def linear_act_backward_samples(device):
    for input, weight, _, activation in linear_act_samples(device, DIFFERENTIABLE):
        output = torch.ops.torch_mlp.linear_act(input, weight, None, activation)
        for needs in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
            yield torch.randn_like(output), input, weight, output, activation, *needs


def cross_entropy_samples(device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for reduction in ("none", "mean", "sum"):
            for weight, smoothing in ((None, 0.0), (torch.rand(5), 0.1)):
                input, target = torch.randn(3, 5).to(device, dtype), torch.tensor([4, -100, 0], device=device)
                yield input, target, None if weight is None else weight.to(input), reduction, -100, smoothing


def cross_entropy_backward_samples(device):
    for input, target, weight, reduction, ignore_index, smoothing in cross_entropy_samples(device):
        options = reduction, ignore_index, smoothing
        loss, lse, total_weight = torch.ops.torch_mlp.cross_entropy(input, target, weight, *options)
        for grad_lse in (None, torch.randn_like(lse[0])):
            yield torch.randn_like(loss), grad_lse, input, target, weight, lse, total_weight, *options


def cross_entropy_rescale_samples(device):
    if device == "cpu":
        pytest.skip("on the CPU the gradient is multiplied, there is no such kernel")
    return _cross_entropy_rescale_samples(device)


def _cross_entropy_rescale_samples(device):
    for input, target, weight, reduction, ignore_index, smoothing in cross_entropy_samples(device):
        options = reduction, ignore_index, smoothing
        if reduction != "none":
            loss, *saved, gradient = torch.ops.torch_mlp._cross_entropy_with_gradient(input, target, weight, *options)
            for grad_output in (torch.ones_like(loss), torch.randn_like(loss)):
                yield gradient, grad_output, input, target, weight, *saved, *options


def cross_entropy_probabilities_samples(device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for reduction in ("none", "mean", "sum"):
            yield torch.randn(3, 5).to(device, dtype), torch.rand(3, 5).to(device, dtype), reduction


def cross_entropy_probabilities_backward_samples(device):
    for input, target, reduction in cross_entropy_probabilities_samples(device):
        loss, lse = torch.ops.torch_mlp.cross_entropy_probabilities(input, target, reduction)
        for grad_lse, *needs in ((None, True, True), (torch.randn_like(lse[0]), True, False), (None, False, True)):
            yield torch.randn_like(loss), grad_lse, input, target, lse, reduction, *needs


def binary_cross_entropy_samples(device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for reduction in ("none", "mean", "sum"):
            # The mean of nothing is NaN, which opcheck does not find equal to itself.
            for shape in ((3, 5), (), (0, 5)) if reduction != "mean" else ((3, 5), ()):
                tensors = [torch.randn(shape), torch.rand(shape), torch.rand(shape[-1:]), torch.rand(shape)]
                input, target, weight, pos_weight = (tensor.to(device, dtype) for tensor in tensors)
                yield input, target, None, None, reduction
                yield input, target, weight, pos_weight, reduction


def binary_cross_entropy_backward_samples(device):
    for sample in binary_cross_entropy_samples(device):
        loss = torch.ops.torch_mlp.binary_cross_entropy_with_logits(*sample)
        for needs in ((True, True), (True, False), (False, True)):
            yield torch.randn_like(loss), *sample, *needs


def mlp_samples(device, activations=tuple(torch_mlp.functional.ACTIVATIONS)):
    for dtype in (torch.float64, torch.bfloat16):
        for activation in activations:
            tensors = [torch.randn(6, 5), torch.randn(3, 6), torch.randn(6), torch.randn(2, 4, 5)]
            one, two, bias, input = (tensor.to(device, dtype) for tensor in tensors)
            yield input, [one, two], [bias, None], activation
            yield input[0], [one], [None], activation


def mlp_backward_samples(device):
    for input, weights, biases, activation in mlp_samples(device, DIFFERENTIABLE):
        outputs = torch.ops.torch_mlp.mlp(input, weights, biases, activation)
        for first in range(1 + 2 * len(weights)):
            needs = [0] * first + [1] * (1 + 2 * len(weights) - first)
            yield torch.randn_like(outputs[-1]), input, weights, outputs, activation, needs


def train_epoch_samples(device):
    """Of a learning rate of 0, which leaves the parameters as they are, so that the op can be called again."""
    images, labels = (
        torch.randint(256, (20, 5), dtype=torch.uint8, device=device),
        torch.randint(3, (20,), device=device),
    )
    order = torch.randperm(20, device=device)
    rest = (["tanh", "identity"], 6, torch.zeros(4, dtype=torch.float64), 0.0, 0.0, 1.0, 0.0)
    sparse = images * (torch.rand(20, 5, device=device) < 0.3)
    for dtype, pixels, bfloat16 in [
        (torch.float32, images, False),
        (torch.float32, sparse, False),
        (torch.float32, images, True),
        (torch.float64, images, False),
    ]:
        tensors = [torch.randn(4, 5), torch.randn(3, 4), torch.randn(4), torch.empty(0)]
        one, two, bias, none = (tensor.to(device, dtype) for tensor in tensors)
        yield pixels, labels, order, [one, two], [bias, none], [], *rest, bfloat16


def linear_cross_entropy_samples(device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for reduction in ("none", "mean", "sum"):
            for maybe, smoothing in ((None, 0.0), (torch.rand(5), 0.1)):
                tensors = [torch.randn(3, 4), torch.randn(5, 4), maybe, maybe]
                input, matrix, bias, weight = (None if t is None else t.to(device, dtype) for t in tensors)
                target = torch.tensor([4, -100, 0], device=device)
                for needs in ((True, True, bias is not None), (False, True, False), (False, False, False)):
                    yield input, matrix, bias, target, weight, reduction, -100, smoothing, *needs


def linear_cross_entropy_backward_samples(device):
    for sample in linear_cross_entropy_samples(device):
        loss, lse, total_weight, *_ = torch.ops.torch_mlp.linear_cross_entropy(*sample)
        for grad_lse in (None, torch.randn_like(lse[0])):
            yield torch.randn_like(loss), grad_lse, *sample[:5], lse, total_weight, *sample[5:]


SAMPLES = {
    "binary_cross_entropy_with_logits": binary_cross_entropy_samples,
    "_binary_cross_entropy_with_logits_backward": binary_cross_entropy_backward_samples,
    "linear_act": linear_act_samples,
    "_linear_act_backward": linear_act_backward_samples,
    "cross_entropy": cross_entropy_samples,
    "_cross_entropy_with_gradient": cross_entropy_samples,
    "_cross_entropy_backward": cross_entropy_backward_samples,
    "_cross_entropy_rescale_": cross_entropy_rescale_samples,
    "cross_entropy_probabilities": cross_entropy_probabilities_samples,
    "_cross_entropy_probabilities_backward": cross_entropy_probabilities_backward_samples,
    "linear_cross_entropy": linear_cross_entropy_samples,
    "_linear_cross_entropy_backward": linear_cross_entropy_backward_samples,
    "mlp": mlp_samples,
    "_mlp_backward": mlp_backward_samples,
    "_train_epoch": train_epoch_samples,
}


def test_every_op_has_samples():
    assert set(SAMPLES) == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(device, name):
    op = getattr(torch.ops.torch_mlp, name).default
    for sample in SAMPLES[name](device):
        results = torch.library.opcheck(op, sample)
        assert set(results.values()) == {"SUCCESS"}


def test_losses_of_the_fake_epoch_are_on_the_device_of_the_images():
    """On CUDA too, where lr is on the CPU: meta stands for it here."""
    for sample in train_epoch_samples("meta"):
        lr, losses = sample[8], torch.ops.torch_mlp._train_epoch(*sample)
        assert lr.device.type == "cpu"
        assert losses.device.type == "meta"
        assert (losses.dtype, losses.shape) == (torch.float64, lr.shape)


def with_one_on_meta(sample):
    """The sample with each of its tensors in turn, and each tensor of its lists, on meta."""
    for place, arg in enumerate(sample):
        if isinstance(arg, torch.Tensor):
            yield (*sample[:place], arg.to("meta"), *sample[place + 1 :])
        elif isinstance(arg, list):
            for i, tensor in enumerate(arg):
                if isinstance(tensor, torch.Tensor):
                    yield (*sample[:place], [*arg[:i], tensor.to("meta"), *arg[i + 1 :]], *sample[place + 1 :])


@pytest.mark.parametrize("name", [name for name in OPS if name != "_train_epoch"])  # whose lr is always on the CPU
def test_a_tensor_on_meta_among_others(device, name):
    """It alone makes torch call the fake kernel, whose results would be whatever memory held."""
    op = getattr(torch.ops.torch_mlp, name).default
    for sample in SAMPLES[name](device):
        for mixed in with_one_on_meta(sample):
            with pytest.raises(RuntimeError, match=rf"^{name}: expected \w+ on the device of \w+, .*, got .*"):
                op(*mixed)


@pytest.mark.parametrize("name", OPS)
def test_kernels_are_registered(name):
    keys = ["CPU"] * (name != "_cross_entropy_rescale_") + ["CUDA"] * torch_mlp.ops.has_cuda_kernels()
    for key in keys:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_mlp::{name}", key)


def results_of(op, sample):
    """What the op returns or, of one that returns nothing, what it has changed."""
    results = op(*sample)
    if results is None:
        return [sample[0].clone()]
    return [results] if isinstance(results, torch.Tensor) else list(results)


@pytest.mark.parametrize("name", OPS)
def test_two_calls_give_the_same_bits(device, name):
    op = getattr(torch.ops.torch_mlp, name).default
    for sample in SAMPLES[name](device):
        assert_same_bits(results_of(op, sample), results_of(op, sample))


@pytest.fixture
def op_on_cuda(name):
    if reason := why_no_cuda():
        pytest.skip(reason)
    return getattr(torch.ops.torch_mlp, name).default


@pytest.mark.parametrize("name", OPS)
def test_on_cuda_the_host_waits_for_nothing(op_on_cuda, name):
    for sample in list(SAMPLES[name]("cuda")):
        torch.cuda.set_sync_debug_mode("error")
        try:
            op_on_cuda(*sample)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPS)
def test_a_cuda_graph_holds_the_op(op_on_cuda, name):
    for sample in SAMPLES[name]("cuda"):
        expected = results_of(op_on_cuda, sample)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = results_of(op_on_cuda, sample)
        for result in results:
            result.zero_()
        graph.replay()
        assert_same_bits(expected, results)


@pytest.mark.parametrize("name", OPS)
def test_cuda_ops_wait_for_the_current_stream(op_on_cuda, name):
    """Whose arguments come late: zeros are there before."""
    stream = torch.cuda.Stream()
    for sample in itertools.islice(SAMPLES[name]("cuda"), 12):
        expected = results_of(op_on_cuda, sample)
        values, structure = tree_flatten(sample)
        is_late = [isinstance(value, torch.Tensor) and value.is_cuda for value in values]
        late = [torch.zeros_like(value) if of_cuda else value for value, of_cuda in zip(values, is_late, strict=True)]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(4_000_000)  # cycles
            for value, argument, of_cuda in zip(values, late, is_late, strict=True):
                if of_cuda:
                    argument.copy_(value)
            results = results_of(op_on_cuda, tree_unflatten(late, structure))
        torch.cuda.synchronize()
        assert_same_bits(expected, results)
