"""torch.autocast: dtypes of results and gradients as those of torch's own ops, which its lists of ops decide."""

import pytest
import torch
from samples import every_layer, every_op

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def results(sample, function, device, autocast_dtype, inputs):
    with torch.autocast(device, autocast_dtype):
        output = function(*inputs, *sample.others)
    torch.manual_seed(1)
    return output, *torch.autograd.grad(output, inputs, torch.randn_like(output))


@pytest.mark.support("autocast")
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_op
def test_dtypes_and_values_are_torchs(device, op, dtype, autocast_dtype):
    """float64 is left as it is; what is multiplied is in the dtype of autocast, losses are in float32."""
    sample = op(device, dtype, 6)
    ours, torchs = (
        results(sample, function, device, autocast_dtype, sample.inputs) for function in (sample.ours, sample.torchs)
    )
    assert [t.dtype for t in ours] == [t.dtype for t in torchs]
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(ours, torchs, **tolerance)


@pytest.mark.support("autocast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_op
def test_mixed_inputs(device, op, dtype):
    """An input that comes from an autocast layer, weights in float32."""
    sample = op(device, torch.float32, 6)
    inputs = [sample.inputs[0].detach().to(dtype).requires_grad_(), *sample.inputs[1:]]
    ours, torchs = (results(sample, function, device, dtype, inputs) for function in (sample.ours, sample.torchs))
    assert [t.dtype for t in ours] == [t.dtype for t in torchs]
    torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.05)


@pytest.mark.support("autocast")
@every_op
def test_autocast_that_is_off(device, op):
    """For the other device, or by a block inside of it."""
    sample = op(device, torch.float32, 6)
    expected = sample.ours(*sample.inputs, *sample.others)
    other = "cuda" if device == "cpu" else "cpu"
    with torch.autocast(other, torch.bfloat16, enabled=other == "cpu" or torch.cuda.is_available()):
        assert torch.equal(sample.ours(*sample.inputs, *sample.others), expected)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert torch.equal(sample.ours(*sample.inputs, *sample.others), expected)


@pytest.mark.support("autocast")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_layer
def test_layers(device, layer, dtype):
    ours, torchs, arguments = layer(device, dtype)
    with torch.autocast(device, torch.bfloat16):
        output, expected = ours(*arguments), torchs(*arguments)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)


@pytest.mark.support("autocast")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@every_op
def test_under_compile_and_in_transforms(device, op):
    sample = op(device, torch.float32, 6)
    tensors = [*(tensor.detach() for tensor in sample.inputs), *sample.others]
    with torch.autocast(device, torch.bfloat16):
        expected = sample.torchs(*tensors)
        compiled = torch.compile(sample.ours, fullgraph=True, backend="aot_eager")(*tensors)
        mapped = torch.func.vmap(sample.ours)(*[torch.stack([tensor, tensor]) for tensor in tensors])
    assert compiled.dtype == mapped.dtype == expected.dtype
    torch.testing.assert_close(compiled, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(mapped, torch.stack([expected, expected]), rtol=0.05, atol=0.05)
