"""What torch does to modules: copies, files, hooks, parametrizations, pruning, optimizers, averages."""

import copy
import io
import pickle

import pytest
import torch
from conftest import assert_same_bits
from samples import every_layer, every_layer_with_weights
from torch.nn.utils import (
    clip_grad_norm_,
    parameters_to_vector,
    parametrizations,
    parametrize,
    prune,
    vector_to_parameters,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torch_mlp import nn


def saved_and_loaded(module):
    """The whole module, by torch.load's strict reader, which has to be told the names of its classes."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    classes = [torch.nn.Linear, *(getattr(nn, name) for name in nn.__all__)]
    with torch.serialization.safe_globals(classes):
        return torch.load(file, weights_only=True)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.support("deepcopy, pickle, torch.save with weights_only")
@pytest.mark.parametrize("how", COPIES)
@every_layer
def test_copies(device, layer, how):
    ours, _, arguments = layer(device, torch.float32)
    ours.eval()
    twin = COPIES[how](ours)
    assert_same_bits([ours(*arguments).detach()], [twin(*arguments)])
    assert_same_bits([t.detach() for t in ours.state_dict().values()], list(twin.state_dict().values()))
    assert repr(twin) == repr(ours)
    assert not twin.training
    tensors = list(twin.state_dict().values())
    assert all(new.data_ptr() != old.data_ptr() for new, old in zip(tensors, ours.state_dict().values(), strict=True))


@pytest.mark.support("deepcopy, pickle, torch.save with weights_only")
@every_layer
def test_state_dict_by_a_file(device, layer, tmp_path):
    ours, torchs, arguments = layer(device, torch.float32)
    torch.save(ours.state_dict(), tmp_path / "weights.pt")
    fresh = layer(device, torch.float32).ours
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True, mmap=True))
    torch.testing.assert_close(fresh(*arguments), torchs(*arguments))


@pytest.mark.support("meta device, to_empty, set_default_device, set_default_dtype")
@every_layer
def test_meta_device_and_defaults(device, layer):
    """Made on meta, given memory and then values; defaults hold for what a layer makes."""
    ours, torchs, arguments = layer(device, torch.float64)
    on_meta = copy.deepcopy(ours).to("meta")
    output = on_meta(*(argument.to("meta") for argument in arguments))
    assert output.is_meta
    assert output.shape == ours(*arguments).shape
    restored = on_meta.to_empty(device=device)
    restored.load_state_dict(ours.state_dict())
    torch.testing.assert_close(restored(*arguments), torchs(*arguments))
    assigned = copy.deepcopy(ours).to("meta")
    assigned.load_state_dict(ours.state_dict(), assign=True)
    torch.testing.assert_close(assigned(*arguments), torchs(*arguments))


def test_defaults_hold_for_new_layers(device):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model = nn.MLP(5, [4], 3)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
        torch.set_default_device(device)
        for module in (nn.MLP(5, [4], 3), nn.LinearAct(5, 4), nn.LinearSigmoid(5, 4)):
            assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, torch.float64)}
            assert module(torch.rand(2, 5)).dtype == torch.float64
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.support("hooks")
@every_layer
def test_hooks(device, layer):
    """Every kind of hook of the module itself, those that change values among them."""
    results = []
    ours, torchs, arguments = layer(device, torch.float64)
    for module in (ours, torchs):
        calls = []
        leaf = arguments[0].clone().requires_grad_()
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda _, args, output: output.square())
        module.register_full_backward_pre_hook(lambda _, grads: tuple(-3 * grad for grad in grads))
        module.register_full_backward_hook(lambda _, grads, __, calls=calls: calls.extend(grads))
        output = module(leaf, *arguments[1:])
        torch.manual_seed(1)
        output.backward(torch.randn_like(output))
        results.append((output, leaf.grad, calls[0], [p.grad for p in module.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.support("hooks", rows=["MLP"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("where", ["the model", "a layer", "all modules"])
def test_hooks_are_called_by_the_loss_of_a_model(device, kind, where):
    """MLP.loss, that computes network and loss as one node, takes the long way where somebody watches."""
    model = nn.MLP(5, [4], 3).to(device)
    input, target = torch.randn(7, 5, device=device), torch.randint(3, (7,), device=device)
    expected, calls = model.loss(input, target), []
    module = {"the model": model, "a layer": model.get_submodule("2"), "all modules": torch.nn.modules.module}[where]
    name = f"register_module_{kind}_hook" if where == "all modules" else f"register_{kind}_hook"
    handle = getattr(module, name)(lambda *_: calls.append(1))
    try:
        loss = model.loss(input.requires_grad_(), target)
        loss.backward()
    finally:
        handle.remove()
    assert calls
    torch.testing.assert_close(loss, expected)


def weight_of(module):
    """The layer with the first weight: a module of ours, or torch's in a Sequential."""
    return next(part for part in module.modules() if isinstance(part, torch.nn.Linear))


class Halved(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


CHANGES = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda part: parametrizations.spectral_norm(part, n_power_iterations=5),
    "orthogonal": parametrizations.orthogonal,
    "parametrize": lambda part: parametrize.register_parametrization(part, "weight", Halved()),
    "prune": lambda part: prune.l1_unstructured(part, "weight", amount=0.35),
    "prune, for good": lambda part: prune.remove(prune.random_structured(part, "weight", amount=1, dim=0), "weight"),
    "frozen": lambda part: part.weight.requires_grad_(False),
}


@pytest.mark.support("parametrize, weight_norm, spectral_norm, prune")
@pytest.mark.parametrize("change", CHANGES)
@every_layer_with_weights
def test_changed_weights(device, layer, change):
    ours, torchs, arguments = layer(device, torch.float64)
    results = []
    for module in (ours, torchs):
        torch.manual_seed(1)
        CHANGES[change](weight_of(module))
        output = module(*arguments)
        output.backward(torch.randn_like(output))
        results.append((output, [p.grad for p in module.parameters() if p.requires_grad]))
    torch.testing.assert_close(*results)
    fresh = layer(device, torch.float64).ours
    assert change == "frozen" or not torch.equal(fresh(*arguments), ours(*arguments))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}


@pytest.mark.support("optimizers, clip_grad_norm_, AveragedModel")
@pytest.mark.parametrize("name", OPTIMIZERS)
@every_layer
def test_training(device, layer, name):
    """The same weights as torch's layers after some steps, with clipped gradients and an average of the weights."""
    ours, torchs, arguments = layer(device, torch.float64)
    results = []
    for module in (ours, torchs):
        leaf = arguments[0].clone().requires_grad_()
        parameters = [leaf, *module.parameters()]
        optimizer = OPTIMIZERS[name](parameters)
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if len(parameters) > 1 else None

        def closure(module=module, leaf=leaf, parameters=parameters, optimizer=optimizer):
            optimizer.zero_grad()
            loss = module(leaf, *arguments[1:]).square().sum()
            loss.backward()
            if name != "LBFGS":  # whose line search needs gradients of the loss it is given
                clip_grad_norm_(parameters, 0.5)
            return loss

        losses = []
        for _ in range(5):
            losses.append(optimizer.step(closure).item())
            if average is not None:
                average.update_parameters(module)
        averaged = [] if average is None else list(average.parameters())
        results.append((losses, parameters, averaged))
    torch.testing.assert_close(*results)
    assert losses[-1] < losses[0]


def test_parameters_as_one_vector(device):
    """Views of one memory, as vector_to_parameters makes them."""
    model = nn.MLP(5, [4], 3).to(device)
    input, target = torch.randn(7, 5, device=device), torch.randint(3, (7,), device=device)
    expected = model.loss(input, target)
    vector_to_parameters(parameters_to_vector(model.parameters()).clone(), model.parameters())
    loss = model.loss(input, target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
