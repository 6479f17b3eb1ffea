"""What does not work, and the sentence that says so: each of these is in docs/limits.md."""

import pytest
import torch
from samples import every_layer, every_op, linear_act

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
    sentence = "aot_autograd does not currently support double backward|appears to not have been used in the graph"
    with pytest.raises(RuntimeError, match=sentence):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), sample.inputs)


@pytest.mark.support("torch.jit.script", works=False)
@pytest.mark.filterwarnings("ignore")
@every_layer
def test_torchscript(layer):
    """Which torch has deprecated in favour of torch.export."""
    with pytest.raises((torch.jit.frontend.NotSupportedError, RuntimeError), match="torch_mlp"):
        torch.jit.script(layer("cpu", torch.float32).ours)


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
