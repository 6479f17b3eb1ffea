"""torch.compile: whole graphs, batch sizes that change, transforms inside, and whole training steps."""

import pytest
import torch
from samples import every_layer, every_op, stacked
from torch._dynamo import compiled_autograd, config
from torch._dynamo.utils import counters

# Of the compiler's, about itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.support("compile(fullgraph=True), dynamic batch sizes")
@every_op
def test_batch_sizes_that_change(device, op):
    """One graph for every batch size but 1, of which torch makes one of its own; values and gradients as without."""
    for batch in (6, 64, 7, 1, 200):
        sample = op(device, torch.float64, batch)
        tensors = [*sample.inputs, *sample.others]
        if batch == 6:
            compiled = torch.compile(sample.ours, fullgraph=True, dynamic=True)
            counters.clear()
        output, expected = compiled(*tensors), sample.torchs(*tensors)
        grad_output = torch.randn_like(expected)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            torch.autograd.grad(output, sample.inputs, grad_output), sample.gradients(sample.torchs, grad_output)
        )
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.support("compile(fullgraph=True), dynamic batch sizes")
@every_op
def test_the_kernels_are_in_the_graph(device, op):
    """What is compiled is the op, not what it is made of."""
    sample = op(device, torch.float32, 3)
    nodes = []

    def backend(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        torch.compile(
            sample.ours, fullgraph=True, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=backend)
        )(*sample.inputs, *sample.others)
    assert any(node.startswith("torch_mlp.") for node in nodes)
    assert not any(word in node for node in nodes for word in ("addmm", "sigmoid", "softmax", "nll_loss"))


@pytest.mark.support("compile of vmap and grad")
@every_op
def test_transforms_inside(device, op):
    sample, tensors = stacked(op, 3, device)

    def per_sample(function):
        return torch.func.vmap(torch.func.grad(lambda *tensors: function(*tensors).square().sum()))

    compiled = torch.compile(per_sample(sample.ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), per_sample(sample.ours)(*tensors))


@pytest.mark.support("compiled autograd")
@every_op
def test_compiled_autograd(device, op):
    """The backward pass of a graph recorded by an eager forward pass, compiled when it is run."""
    sample = op(device, torch.float64, 5)
    output = sample.ours(*sample.inputs, *sample.others)
    grad_output = torch.randn_like(output)
    expected = torch.autograd.grad(output, sample.inputs, grad_output, retain_graph=True)
    before = counters["compiled_autograd"]["captures"]
    with compiled_autograd._enable(torch.compile(backend="eager")):
        output.backward(grad_output)
    assert counters["compiled_autograd"]["captures"] == before + 1
    torch.testing.assert_close([tensor.grad for tensor in sample.inputs], list(expected))


@pytest.mark.support("compile")
@every_layer
def test_layers(device, layer):
    ours, torchs, arguments = layer(device, torch.float32)
    arguments = (arguments[0].requires_grad_(), *arguments[1:])
    wanted = [[arguments[0], *module.parameters()] for module in (ours, torchs)]
    output, expected = torch.compile(ours, fullgraph=True)(*arguments), torchs(*arguments)
    grad_output = torch.randn_like(expected)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, wanted[0], grad_output), torch.autograd.grad(expected, wanted[1], grad_output)
    )


@pytest.mark.support("compiled training step")
@every_layer
def test_a_whole_training_step(device, layer):
    """Forward and backward pass and optimizer, the backward pass by compiled autograd."""
    ours, torchs, arguments = layer(device, torch.float64)
    steps = []
    for module in (ours, torchs):
        leaf = arguments[0].clone().requires_grad_()
        optimizer = torch.optim.SGD([leaf, *module.parameters()], lr=0.1, momentum=0.9)

        def step(module=module, leaf=leaf, optimizer=optimizer):
            optimizer.zero_grad()
            loss = module(leaf, *arguments[1:]).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        if module is ours:
            with config.patch(compiled_autograd=True):
                step = torch.compile(step, backend="aot_eager")
                losses = [step().item() for _ in range(3)]
        else:
            losses = [step().item() for _ in range(3)]
        steps.append((losses, leaf.detach(), [parameter.detach() for parameter in module.parameters()]))
    torch.testing.assert_close(*steps)
    assert steps[0][0][2] != steps[0][0][0]
