"""What an op leaves as it was, and where it runs: values, versions, saved tensors, devices and modes."""

import pytest
import torch
from conftest import assert_same_bits, clones
from samples import every_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint


def upstream(output):
    return torch.randn(output.shape, dtype=torch.float64).to(output)


@pytest.mark.support("nothing clobbered")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_op
def test_nothing_is_clobbered(device, op, dtype):
    """Inputs, incoming gradients, saved tensors, outputs, and the gradients of an earlier backward pass."""
    sample = op(device, dtype, 5)
    tensors = [*sample.inputs, *sample.others]
    versions = [tensor._version for tensor in tensors]
    before = clones(tensors)
    saved = []

    def pack(tensor):
        saved.append((tensor, tensor.detach().clone(), tensor._version))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = sample.ours(*tensors)
    assert saved
    grad_output = upstream(output)
    kept = clones([output, grad_output])
    first = torch.autograd.grad(output, sample.inputs, grad_output, retain_graph=True)
    kept_first = clones(first)
    second = torch.autograd.grad(output, sample.inputs, -2 * grad_output, retain_graph=True)
    assert_same_bits([copy for _, copy, _ in saved], [tensor for tensor, _, _ in saved])
    assert [tensor._version for tensor, _, _ in saved] == [version for _, _, version in saved]
    # This one frees the graph, and may make its results of what nobody can ask for any more.
    again = torch.autograd.grad(output, sample.inputs, grad_output)
    assert_same_bits(before, tensors)
    assert_same_bits(kept, [output, grad_output])
    assert_same_bits(kept_first, first)
    assert_same_bits(first, again)
    assert_same_bits([-2 * grad for grad in first], second)
    assert [tensor._version for tensor in tensors] == versions
    assert output._version == grad_output._version == 0


@pytest.mark.support("nothing clobbered")
@every_op
def test_nothing_is_clobbered_by_the_second_backward_pass(device, op):
    sample = op(device, torch.float64, 5)
    before = clones([*sample.inputs, *sample.others])
    output = sample.ours(*sample.inputs, *sample.others)
    grad_output = upstream(output).requires_grad_()
    first = torch.autograd.grad(output, sample.inputs, grad_output, create_graph=True)
    second_upstream = [upstream(grad) for grad in first]
    kept = clones([output, grad_output, *first, *second_upstream])
    torch.autograd.grad(first, [*sample.inputs, grad_output], second_upstream, allow_unused=True)
    assert_same_bits(before, [*sample.inputs, *sample.others])
    assert_same_bits(kept, [output, grad_output, *first, *second_upstream])


@pytest.mark.support("version counters")
@every_op
def test_in_place_change_of_a_saved_tensor_is_noticed(device, op):
    """Of every tensor whose change torch notices too."""
    sample = op(device, torch.float64, 5)
    for place, tensor in enumerate(sample.inputs):
        noticed = []
        for function in (sample.ours, sample.torchs):
            output = function(*sample.inputs, *sample.others)
            with torch.no_grad():
                tensor.mul_(2)
            try:
                torch.autograd.grad(output, sample.inputs, upstream(output))
                noticed.append("")
            except RuntimeError as error:
                noticed.append(str(error))
        # Saving the logits rather than their softmax, we notice a change that torch computes right in spite of.
        assert noticed[0] or not noticed[1], f"change of input {place}"
        assert all("modified by an inplace operation" in error for error in noticed if error)
    output = sample.ours(*sample.inputs, *sample.others)
    expected = sample.gradients(sample.ours, torch.ones_like(output))
    with torch.no_grad():
        sample.inputs[0].mul_(1)
    assert_same_bits(expected, sample.gradients(sample.ours, torch.ones_like(output)))


@pytest.mark.support("saved_tensors_hooks, save_on_cpu")
@every_op
def test_saved_tensors_hooks(device, op):
    """Everything that is saved goes through them: what they give back is what the backward pass computes with."""
    sample = op(device, torch.float64, 5)
    output = sample.ours(*sample.inputs, *sample.others)
    grad_output = upstream(output)
    expected = torch.autograd.grad(output, sample.inputs, grad_output)
    scrambled = torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach().clone(), 1), lambda pair: pair[0])
    zeroed = torch.autograd.graph.saved_tensors_hooks(lambda t: t, torch.zeros_like)
    for context in (scrambled, torch.autograd.graph.save_on_cpu()):
        with context:
            output = sample.ours(*sample.inputs, *sample.others)
        found = torch.autograd.grad(output, sample.inputs, grad_output, create_graph=True)
        torch.testing.assert_close(found, expected)
    with zeroed:
        output = sample.ours(*sample.inputs, *sample.others)
    assert not torch.equal(torch.autograd.grad(output, sample.inputs[0], grad_output)[0], expected[0])


@pytest.mark.support("tensor hooks")
@every_op
def test_tensor_hooks(device, op):
    """Hooks on outputs and inputs, on several gradients at once, and after accumulation."""
    sample = op(device, torch.float64, 5)
    grad_output = upstream(sample.ours(*sample.inputs, *sample.others))
    results = []
    for function in (sample.ours, sample.torchs):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in sample.inputs]
        seen, together = [], []
        output = function(*inputs, *sample.others)
        output.register_hook(lambda grad: -3 * grad)
        inputs[0].register_hook(lambda grad: 2 * grad)
        for tensor in inputs:
            tensor.register_post_accumulate_grad_hook(lambda t, seen=seen: seen.append(t.grad.clone()))
        torch.autograd.graph.register_multi_grad_hook(inputs, lambda grads, together=together: together.extend(grads))
        output.backward(grad_output)
        assert len(seen) == len(inputs)
        results.append(([tensor.grad for tensor in inputs], together))
    torch.testing.assert_close(*results)


@pytest.mark.support("checkpoint")
@pytest.mark.parametrize("use_reentrant", [False, True])
@every_op
def test_checkpoint(device, op, use_reentrant):
    sample = op(device, torch.float64, 5)
    tensors = (*sample.inputs, *sample.others)
    expected_output = sample.ours(*tensors)
    grad_output = upstream(expected_output)
    expected = torch.autograd.grad(expected_output, sample.inputs, grad_output)
    output = checkpoint(sample.ours, *tensors, use_reentrant=use_reentrant)
    output.backward(grad_output)
    assert_same_bits([expected_output.detach()], [output])
    assert_same_bits(expected, [tensor.grad for tensor in sample.inputs])


@pytest.mark.support("use_deterministic_algorithms")
@every_op
def test_deterministic_algorithms(device, op):
    sample = op(device, torch.float32, 40)
    output = sample.ours(*sample.inputs, *sample.others)
    grad_output = upstream(output)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            [
                sample.ours(*sample.inputs, *sample.others).detach(),
                *sample.gradients(sample.ours, grad_output),
            ]
            for _ in range(3)
        ]
        output = sample.ours(*sample.inputs, *sample.others)
        grads = torch.autograd.grad(output, sample.inputs, grad_output, create_graph=True)
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), sample.inputs, allow_unused=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


@pytest.mark.support("inference_mode, no_grad")
@every_op
def test_inference_mode(device, op):
    sample = op(device, torch.float64, 5)
    expected = sample.ours(*sample.inputs, *sample.others)
    with torch.inference_mode():
        output = sample.ours(*sample.inputs, *sample.others)
        of_inference_tensors = sample.ours(*clones(sample.inputs), *sample.others)
        assert output.is_inference()
    with torch.no_grad():
        without_graph = sample.ours(*sample.inputs, *sample.others)
    assert not without_graph.requires_grad
    assert_same_bits([expected.detach()] * 3, [output, of_inference_tensors, without_graph])


def metadata(tensor):
    return tensor.shape, tensor.dtype, tensor.device.type, tensor.stride()


@pytest.mark.support("meta device, FakeTensor")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_op
def test_meta_and_fake_tensors(device, op, dtype):
    """Shapes, dtypes, devices and strides of outputs and gradients are those of a real run."""
    sample = op(device, dtype, 5)
    output = sample.ours(*sample.inputs, *sample.others)
    expected = [output, *torch.autograd.grad(output, sample.inputs, torch.ones_like(output))]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (*sample.inputs, *sample.others)]
        fake_output = sample.ours(*fake)
        grads = torch.autograd.grad(fake_output, fake[: len(sample.inputs)], torch.ones_like(fake_output))
    assert [metadata(t) for t in expected] == [metadata(t) for t in (fake_output, *grads)]

    on_meta = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in (*sample.inputs, *sample.others)]
    meta_output = sample.ours(*on_meta)
    grads = torch.autograd.grad(meta_output, on_meta[: len(sample.inputs)], torch.ones_like(meta_output))
    assert [metadata(t)[:2] for t in expected] == [metadata(t)[:2] for t in (meta_output, *grads)]
    assert all(t.is_meta for t in (meta_output, *grads))


@pytest.mark.support("set_default_device, set_default_dtype")
@every_op
def test_default_device_and_dtype(device, op):
    """What an op makes of its own goes by its arguments, not by the defaults."""
    sample = op(device, torch.float32, 5)
    tensors = [*sample.inputs, *sample.others]
    grad_output = upstream(sample.ours(*tensors))
    expected = sample.gradients(sample.ours, grad_output)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        output = sample.ours(*tensors)
        found = torch.autograd.grad(output, sample.inputs, grad_output, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in found), sample.inputs, allow_unused=True)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert output.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert all(grad is None or (grad.device.type == device and grad.dtype == torch.float32) for grad in second)
