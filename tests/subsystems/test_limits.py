"""What does not work, and the sentence that says so: each of these is in docs/limits.md."""

import pytest
import torch
from samples import every_layer, every_op, linear_act, mlp, mlp_cross_entropy, stacked
from torch.autograd import forward_ad

from torch_mlp.nn import MLP


def changed(sample, change):
    return [*(change(tensor.detach()) for tensor in sample.inputs), *sample.others]


@pytest.mark.support("sparse tensors", works=False)
@every_op
def test_sparse_tensors(device, op):
    sample = op(device, torch.float64, 5)
    # Where targets are smoothed first, torch's addition is what fails.
    sentence = r"Could not run 'torch_mlp::\w+' with arguments from the 'Sparse|add\(sparse, dense\) is not supported"
    with pytest.raises((NotImplementedError, RuntimeError), match=sentence):
        sample.ours(*changed(sample, torch.Tensor.to_sparse))


@pytest.mark.support("complex, integer and 8-bit tensors", works=False)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn], ids=str)
@every_op
def test_dtypes(device, op, dtype):
    sample = op(device, torch.float64, 5)
    kinds = (
        "dtype Double, Float, BFloat16 or Half|a floating-point dtype|class probabilities, since target has the shape"
    )
    sentence = rf": expected (input of )?({kinds}).* got (torch\.)?(complex64|int32|ComplexFloat|Int|Float8_e4m3fn)"
    # An 8-bit target is smoothed first, which torch refuses.
    sentence += "|not implemented for 'Float8_e4m3fn'|Promotion for Float8"
    with pytest.raises((RuntimeError, NotImplementedError), match=sentence):
        sample.ours(*changed(sample, lambda tensor: tensor.to(dtype)))


@pytest.mark.support("double backward of what torch.compile made", works=False)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@every_op
def test_double_backward_of_what_was_compiled(device, op):
    """No function that was compiled has one, torch's included."""
    sample = op(device, torch.float32, 5)
    output = torch.compile(sample.ours, backend="aot_eager", fullgraph=True)(*sample.inputs, *sample.others)
    grads = torch.autograd.grad(output, sample.inputs, torch.randn_like(output), create_graph=True)
    # The gradients of a loss that is linear in what comes in know nothing more of the inputs.
    sentence = (
        "aot_autograd does not currently support double backward|appears to not have been used in the graph|"
        "does not require grad and does not have a grad_fn"
    )
    with pytest.raises(RuntimeError, match=sentence):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), sample.inputs)


@pytest.mark.support("torch.jit.script", works=False)
@pytest.mark.filterwarnings("ignore")
@every_layer
def test_torchscript(layer):
    """Which torch has deprecated in favour of torch.export."""
    with pytest.raises((torch.jit.frontend.NotSupportedError, RuntimeError), match="torch_mlp"):
        torch.jit.script(layer("cpu", torch.float32).ours)


NO_GRADIENT = (
    "^linear_act: expected an activation with a derivative, got step, which is constant but for a jump at 0: its "
    "derivative is 0 wherever it has one, so that gradient descent cannot use it; use sigmoid, tanh or relu$"
)
every_op_with_steps = pytest.mark.parametrize(
    "op",
    [linear_act("step", True), mlp("step"), mlp_cross_entropy("step")],
    ids=["linear_act", "mlp", "mlp_cross_entropy"],
)


def over_a_recorded_graph(function, tensors, how):
    """What backwards runs in a mode of its own: many gradients at once, by vmap or not, and forward over reverse."""
    output = function(*tensors)
    grad_output = torch.ones_like(output)
    if how == "is_grads_batched":
        torch.autograd.grad(output, tensors, grad_output.expand(3, *output.shape), is_grads_batched=True)
    elif how == "vmap over backward":
        many = grad_output.expand(3, *output.shape)
        torch.func.vmap(lambda v: torch.autograd.grad(output, tensors, v, retain_graph=True))(many)
    else:
        with forward_ad.dual_level():
            torch.autograd.grad(output, tensors, forward_ad.make_dual(grad_output, grad_output))


def directional(function, tensors):
    with forward_ad.dual_level():
        function(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])


ASKING_FOR_GRADIENTS = {
    "backward": lambda f, t: f(*t).sum().backward(),
    "create_graph": lambda f, t: torch.autograd.grad(f(*t).sum(), t, create_graph=True),
    "grad": lambda f, t: torch.func.grad(lambda *t: f(*t).sum())(*t),
    "vjp": lambda f, t: torch.func.vjp(lambda *t: f(*t).sum(), *t)[1](torch.ones_like(t[0][0, 0])),
    "jacrev": lambda f, t: torch.func.jacrev(f)(*t),
    "jacfwd": lambda f, t: torch.func.jacfwd(f)(*t),
    "hessian": lambda f, t: torch.func.hessian(f)(*t),
    "jvp": lambda f, t: torch.func.jvp(f, tuple(t), tuple(t)),
    "linearize": lambda f, t: torch.func.linearize(f, *t),
    "forward-mode AD": directional,
    "vmap of grad": lambda f, t: torch.func.vmap(torch.func.grad(lambda x: f(x, *t[1:]).sum()))(t[0].expand(3, 5, 5)),
    "backward of vmap": lambda f, t: torch.func.vmap(lambda x: f(x, *t[1:]))(t[0].expand(3, 5, 5)).sum().backward(),
    **{
        how: lambda f, t, how=how: over_a_recorded_graph(f, t, how)
        for how in ("is_grads_batched", "vmap over backward", "forward over reverse")
    },
}


@pytest.mark.parametrize("how", ASKING_FOR_GRADIENTS)
@every_op_with_steps
def test_gradients_of_step(device, op, how):
    """An error in every mode: a gradient of 0 would look as if there was nothing to learn."""
    sample = op(device, torch.float64, 5)
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        ASKING_FOR_GRADIENTS[how](lambda *tensors: sample.ours(*tensors, *sample.others), sample.inputs)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@every_op_with_steps
def test_compiled_gradients_of_step(device, op):
    """Backwards the same; a transform that is compiled with what it transforms, torch refuses in words of its own."""
    sample = op(device, torch.float64, 5)

    def ours(*tensors):
        return sample.ours(*tensors, *sample.others)

    output = torch.compile(ours, fullgraph=True)(*sample.inputs)
    torch.testing.assert_close(output, sample.torchs(*sample.inputs, *sample.others))
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        output.sum().backward()
    tensors = [tensor.detach() for tensor in sample.inputs]
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(transform(ours), fullgraph=True, backend="aot_eager")(*tensors)


@every_op_with_steps
def test_vmap_of_step(device, op):
    """Forwards alone, over everything, of parameters that require grad too, and compiled."""
    sample, tensors = stacked(op, 3, device)
    expected = torch.stack([sample.torchs(*each) for each in zip(*tensors, strict=True)])
    mapped = torch.func.vmap(sample.ours)
    torch.testing.assert_close(mapped(*tensors), expected)
    leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    torch.testing.assert_close(mapped(*leaves), expected)
    torch.testing.assert_close(torch.compile(mapped, fullgraph=True, backend="aot_eager")(*tensors), expected)


def test_nested_tensors(device):
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged, device=device)
    with pytest.raises(NotImplementedError, match=r"Could not run 'torch_mlp::mlp' .* 'AutogradNestedTensor' backend"):
        MLP(5, [4], 3).to(device)(nested)


def test_tensors_of_inference_mode_in_a_backward_pass(device):
    """As torch's linear, which has to save them too."""
    sample = linear_act("tanh", True)(device, torch.float64, 5)
    with torch.inference_mode():
        input = sample.inputs[0].detach().clone()
    for function in (sample.torchs, sample.ours):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            function(input, *sample.inputs[1:])
