"""torch.func: results as torch's, and vmap without a loop."""

import pytest
import torch
from samples import every_layer, every_op, stacked
from torch.utils._python_dispatch import TorchDispatchMode

# Of many layers stacked upon each other torch says itself that its rule is slow.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def scalar(function):
    """A number of everything a function gives, with a factor of its own for each."""

    def total(*tensors):
        output = function(*tensors)
        factors = torch.arange(1, output.numel() + 1, dtype=output.dtype, device=output.device).view_as(output)
        return (factors * output).sum()

    return total


@pytest.mark.support("torch.func: grad, vjp, jacrev, jacfwd, hessian")
@pytest.mark.parametrize("name", ["grad", "vjp", "jacrev", "jacfwd", "hessian"])
@every_op
def test_derivatives(device, op, name):
    sample = op(device, torch.float64, 3)
    tensors = [*(tensor.detach() for tensor in sample.inputs), *sample.others]
    places = tuple(range(len(sample.inputs)))

    def of(function):
        if name == "vjp":
            output, pullback = torch.func.vjp(
                lambda *inputs: function(*inputs, *sample.others), *tensors[: len(places)]
            )
            torch.manual_seed(1)
            return pullback(torch.randn_like(output))
        if name == "grad":
            return torch.func.grad(scalar(function), places)(*tensors)
        return getattr(torch.func, name)(function, places)(*tensors)

    torch.testing.assert_close(of(sample.ours), of(sample.torchs))


@pytest.mark.support("torch.func: jvp, linearize")
@every_op
def test_directional_derivatives(device, op):
    sample = op(device, torch.float64, 3)
    inputs = tuple(tensor.detach() for tensor in sample.inputs)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)

    def of(function):
        value, pushforward = torch.func.linearize(lambda *inputs: function(*inputs, *sample.others), *inputs)
        return (
            torch.func.jvp(lambda *inputs: function(*inputs, *sample.others), inputs, tangents),
            (value, pushforward(*tangents)),
        )

    torch.testing.assert_close(of(sample.ours), of(sample.torchs))


@pytest.mark.support("vmap")
@pytest.mark.parametrize("which", ["all", "rows"])
@every_op
def test_vmap(device, op, which):
    """Over everything, as for an ensemble, and over the rows only; per-sample gradients too."""
    sample, many = stacked(op, 3, device)
    is_mapped = [which == "all" or place in sample.rows for place in range(len(many))]
    tensors = [tensor if mapped else tensor[0] for tensor, mapped in zip(many, is_mapped, strict=True)]
    in_dims = tuple(0 if mapped else None for mapped in is_mapped)
    places = tuple(range(len(sample.inputs)))
    found = [
        torch.func.vmap(sample.ours, in_dims)(*tensors),
        *torch.func.vmap(torch.func.grad(scalar(sample.ours), places), in_dims)(*tensors),
    ]
    one_by_one = []
    for index in range(3):
        args = [tensor[index] if mapped else tensor for tensor, mapped in zip(tensors, is_mapped, strict=True)]
        inputs = [tensor.detach().requires_grad_() for tensor in args[: len(places)]]
        grads = torch.autograd.grad(scalar(sample.torchs)(*inputs, *args[len(places) :]), inputs)
        one_by_one.append([sample.torchs(*args), *grads])
    torch.testing.assert_close(found, [torch.stack(list(each)) for each in zip(*one_by_one, strict=True)])


@pytest.mark.support("vmap")
@every_op
def test_vmap_of_hessians(device, op):
    sample, tensors = stacked(op, 3, device)
    found = torch.func.vmap(torch.func.hessian(scalar(sample.ours)))(*tensors)
    one_by_one = [
        torch.autograd.functional.hessian(lambda x, rest=rest: scalar(sample.torchs)(x, *rest), first)
        for first, *rest in zip(*tensors, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(one_by_one))


@pytest.mark.support("vmap")
@every_op
def test_vmap_over_a_backward_pass(device, op):
    """Whose forward pass ran outside of the transform: how Jacobians are computed row by row at once."""
    sample = op(device, torch.float64, 4)
    results = []
    for function in (sample.ours, sample.torchs):
        output = function(*sample.inputs, *sample.others)
        torch.manual_seed(1)
        grad_outputs = torch.randn(3, *output.shape, dtype=output.dtype, device=device)
        grads = torch.func.vmap(
            lambda v, output=output: torch.autograd.grad(output, sample.inputs, v, retain_graph=True)
        )(grad_outputs)
        results.append(grads)
    torch.testing.assert_close(*results)


class Count(TorchDispatchMode):
    """Of calls of ATen."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.support("vmap")
@every_op
def test_vmap_makes_no_loop(device, op):
    """As many calls for 17 as for 2, forwards, of a gradient, and backwards only."""
    counts = []
    for count in (2, 17):
        sample, tensors = stacked(op, count, device)
        output = sample.ours(*sample.inputs, *sample.others)
        grad_outputs = torch.randn(count, *output.shape, dtype=output.dtype, device=device)
        with Count() as calls:
            torch.func.vmap(sample.ours)(*tensors)
            torch.func.vmap(torch.func.grad(scalar(sample.ours)))(*tensors)
            torch.func.vmap(lambda v, s=sample, o=output: torch.autograd.grad(o, s.inputs, v, retain_graph=True))(
                grad_outputs
            )
        counts.append(calls.calls)
    assert counts[0] == counts[1] > 0


@pytest.mark.support("functional_call, ensembles by vmap")
@every_layer
def test_functional_call(device, layer):
    """With parameters of somebody else, and over the parameters of several."""
    layers = [layer(device, torch.float64) for _ in range(3)]
    arguments = layers[0].arguments
    results = []
    for modules in ([one.ours for one in layers], [one.torchs for one in layers]):
        state = torch.func.stack_module_state(modules)
        one = torch.func.functional_call(modules[0], {n: t[2] for part in state for n, t in part.items()}, arguments)

        def of(parameters, buffers, module=modules[0]):
            return torch.func.functional_call(module, (parameters, buffers), arguments).square().sum()

        if state[0]:
            mapped = torch.func.vmap(torch.func.grad_and_value(of))(*state)
            results.append((one, list(mapped[0].values()), mapped[1]))
        else:
            results.append((one,))
    torch.testing.assert_close(*results)
