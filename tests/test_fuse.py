"""torch_mlp/fuse.py: fused models compute and learn the same, and come back as they were."""

import copy
import io
import pickle
import random

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import Dropout, Identity, Linear, Module, ModuleList, ReLU, Sequential, Sigmoid, Tanh
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import torch_mlp
from torch_mlp import explain, fuse, unfuse
from torch_mlp.engine import choose_engine
from torch_mlp.nn import LinearAct


class Modules(Module):
    """One activation for several layers."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act, self.out = Linear(5, 4), Linear(4, 4), ReLU(inplace=True), Linear(4, 3)

    def forward(self, input):
        return self.out(self.act(self.fc2(self.act(self.fc1(input)))))


class Functions(Modules):
    """Every way to write an activation, and dropout that is to follow the training mode."""

    def forward(self, input):
        hidden = F.dropout(torch.sigmoid(self.fc1(input)), 0.5, self.training)
        return F.relu(self.out(self.fc2(hidden).tanh()), inplace=True).mul(2)


class Mixed(Module):
    """Whose forward cannot be traced, but those of its children can, and which uses one activation everywhere."""

    def __init__(self):
        super().__init__()
        self.head, self.act = Linear(3, 3), Tanh()
        self.first = Sequential(Linear(5, 5), self.act, Sequential(Dropout(0.5), Linear(5, 5), self.act), Linear(5, 5))
        self.blocks = ModuleList([Modules(), Modules()])

    def forward(self, input):
        if input.sum() > 0:
            input = input + 1
        input = self.first(input)
        return self.act(self.head(self.blocks[0](input) + self.act(self.blocks[1](input))))


class Loop(Module):
    """Layers in a ModuleList, an activation in front of them too, and inputs that are no tensors."""

    def __init__(self):
        super().__init__()
        self.layers, self.act = ModuleList([Linear(5, 5) for _ in range(3)]), Sigmoid()

    def forward(self, input, *others, scale=1.0, **options):
        input = self.act(input)
        for layer in self.layers:
            input = self.act(layer(input)) * scale
        return input


class Shared(Module):
    """One layer in several places, with an activation behind it in each, which once is used without the layer."""

    def __init__(self):
        super().__init__()
        layer, act = Linear(5, 5), Tanh()
        self.net, self.layer, self.act = Sequential(layer, act, Sequential(layer, act)), layer, act

    def forward(self, input):
        return torch.tanh(self.layer(self.act(self.net(input))))


def torchvision_mlp():
    ops = pytest.importorskip("torchvision.ops", exc_type=ImportError)
    return ops.MLP(5, [4, 6, 3], inplace=False, dropout=0.3)


def one_activation():
    relu = ReLU()
    return Sequential(Linear(5, 4), relu, Linear(4, 4), relu, Linear(4, 3))


# How to make it, the number of its layers that are fused, and of the activations that are computed on their own then.
MODELS = {
    "Sequential": (lambda: Sequential(Linear(5, 4), Sigmoid(), Sequential(Linear(4, 3, bias=False), ReLU())), 2, 0),
    "one activation": (one_activation, 2, 0),
    "torchvision": (torchvision_mlp, 2, 0),
    "modules": (Modules, 2, 0),
    "functions": (Functions, 3, 0),
    "mixed": (Mixed, 6, 2),
    "loop": (Loop, 3, 1),
    "shared": (Shared, 1, 1),
}
models = pytest.mark.parametrize(("make", "count"), [model[:2] for model in MODELS.values()], ids=MODELS)


def states(model):
    return [layer.state for layer in explain(model)]


def snapshot(model):
    """Everything about a model that has an identity or can be read, for ``==``."""
    modules = list(model.named_modules(remove_duplicate=False))
    return (
        repr(model),
        [(name, id(module), type(module), list(module.__dict__), module.training) for name, module in modules],
        [(name, id(tensor), tensor.requires_grad, tensor.device) for name, tensor in model.named_parameters()],
        [(name, list(hooks)) for name, module in modules for hooks in (module._forward_hooks, module._backward_hooks)],
        list(model.state_dict()),
    )


def output_and_gradients(model, input, grad_output=None):
    torch.manual_seed(1)  # of dropout
    output = model(input)
    grad_output = torch.randn(output.shape, dtype=torch.float64).to(output) if grad_output is None else grad_output
    return [output, *torch.autograd.grad(output, [input, *model.parameters()], grad_output, allow_unused=True)]


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def make_pair(make, device="cpu", dtype=torch.float64):
    model = make().to(device, dtype)
    return fuse(copy.deepcopy(model)), model, torch.randn(7, 5, dtype=dtype, device=device, requires_grad=True)


@models
def test_fused_models_compute_the_same(device, make, count):
    fused, stock, input = make_pair(make, device)
    assert states(fused).count("fused") == sum(type(module) is LinearAct for module in fused.modules()) == count
    assert list(fused.state_dict()) == list(stock.state_dict())
    ours, theirs = ([name for name, _ in model.named_modules(remove_duplicate=False)] for model in (fused, stock))
    assert ours == theirs
    for training in (True, False, True):
        assert_same(*(output_and_gradients(model.train(training), input) for model in (fused, stock)))


class Calls(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("make", "fused", "left"), MODELS.values(), ids=MODELS)
def test_activations_are_computed_by_the_layers(make, fused, left):
    model, stock, input = make_pair(make)

    def activations(of):
        with Calls() as calls:
            of(input)
        return sum(name in ("sigmoid", "tanh", "relu") for name in calls.names), calls.names.count("linear_act")

    assert activations(model) == (left, {"shared": 3}.get(make.__name__.lower(), fused))
    assert activations(stock) == (sum(activations(model)), 0)


@models
def test_unfuse_gives_back_the_very_model(make, count):
    model = make()
    model.train(False).register_forward_hook(lambda *_: None)
    next(module for module in model.modules() if isinstance(module, Linear)).weight.requires_grad_(False)
    before = snapshot(model)
    assert fuse(model) is model
    assert states(model).count("fused") == count
    assert unfuse(model) is model
    assert snapshot(model) == before


@models
def test_explain_and_a_second_fuse_change_nothing(make, count):
    model = make()
    before = snapshot(model)
    explanation = explain(model)
    assert snapshot(model) == before
    assert unfuse(model) is model
    assert snapshot(model) == before
    fused = snapshot(fuse(model))
    after = explain(model)
    assert [layer._replace(state=layer.state.replace("fusable", "fused")) for layer in explanation] == list(after)
    assert snapshot(fuse(model)) == fused
    unfuse(model)
    assert snapshot(model) == before


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@models
def test_copies_can_be_unfused(make, count, copied):
    fused, stock, input = make_pair(make)
    twin = copied(fused)
    assert states(twin) == states(fused)
    assert_same(output_and_gradients(twin, input), output_and_gradients(stock, input))
    unfuse(twin)
    assert [type(module) for module in twin.modules()] == [type(module) for module in stock.modules()]
    assert repr(twin) == repr(stock)
    assert_same(output_and_gradients(twin, input), output_and_gradients(stock, input))
    assert states(fused).count("fused") == count


@pytest.mark.parametrize("name", ["one activation", "functions", "shared", "loop"])
def test_compile_fullgraph(device, name):
    fused, stock, input = make_pair(MODELS[name][0], device, torch.float32)
    compiled = torch.compile(fused.eval(), fullgraph=True)
    assert_same(output_and_gradients(compiled, input), output_and_gradients(stock.eval(), input))


@models
def test_an_optimizer_made_before_goes_on(make, count):
    stock = make().double()
    model, start = copy.deepcopy(stock), copy.deepcopy(stock.state_dict())
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.1) for one in (model, stock)]
    input = torch.randn(7, 5, dtype=torch.float64)
    for step, change in enumerate((fuse, fuse, unfuse, fuse)):
        change(model)
        for one, optimizer in zip((model, stock), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(step)
            output = one(input)
            (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
            optimizer.step()
    assert_same(model.state_dict().values(), stock.state_dict().values())
    assert all((value != start[name]).any() for name, value in model.state_dict().items())


def test_training_mode_and_dtype_follow_a_fused_model():
    model = Sequential(Linear(5, 4), ReLU(), Functions()).eval()
    activation = model[1]
    fuse(model).train().double()
    assert all(module.training for module in model.modules())
    unfuse(model)
    assert model[1] is activation
    assert activation.training
    assert model[0].weight.dtype == torch.float64


def hooked(which, register):
    model = Sequential(Linear(5, 4), ReLU())
    getattr(model[which], register)(lambda *_: None)
    return model


def changed(layer, change):
    change(layer)
    return Sequential(layer, ReLU())


def replace_forward(layer):
    layer.forward = lambda input: input


def give_a_tensor_subclass(layer):
    class Special(torch.Tensor):
        pass

    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Special))


def followed_by(*modules):
    return Sequential(Linear(5, 5), *modules)


def module_with(forward):
    return type("Net", (Modules,), {"forward": forward})()


def two_activations():
    layer = Linear(5, 5)
    return Sequential(layer, ReLU(), layer, Tanh())


def bare_elsewhere():
    layer = Linear(5, 5)
    return Sequential(layer, ReLU(), layer)


def in_what_cannot_be_traced():
    layer = Linear(5, 5)
    model = module_with(lambda self, input: self.layers[0](input) if input.any() else input)
    model.layers = ModuleList([layer])
    return Sequential(Sequential(layer, ReLU()), model)


def without_kernels():
    model = followed_by(ReLU())
    with FakeTensorMode():
        model[0].weight = torch.nn.Parameter(torch.empty(5, 5, device="xpu"))
    return model


def taken_apart():
    model = module_with(lambda self, input: self.net[1](self.net[0](input)) + self.net[0](input))
    model.net = Sequential(Linear(5, 5), ReLU())
    return Sequential(model.net, model)


class MoreThanLinear(Linear):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Linear(5, 5), "no forward within the model calls it"),
        (lambda: ModuleList([Linear(5, 5), ReLU()]), "no forward within the model calls it"),
        (lambda: Sequential(LinearAct(5, 5)), "it is of class LinearAct"),
        (followed_by, "nothing follows it in its Sequential"),
        (lambda: Sequential(followed_by(), ReLU()), "nothing follows it in its Sequential"),
        (lambda: followed_by(Dropout(), ReLU()), "it is followed by Dropout"),
        (lambda: followed_by(torch.nn.GELU()), "it is followed by GELU"),
        (lambda: followed_by(type("MyReLU", (ReLU,), {})()), "it is followed by MyReLU"),
        (lambda: Sequential(MoreThanLinear(5, 5), ReLU()), "it is of class MoreThanLinear"),
        (lambda: Sequential(torch.nn.LazyLinear(5), ReLU()), "it is of class LazyLinear"),
        (lambda: changed(Linear(5, 5), parametrizations.weight_norm), "it is of class ParametrizedLinear"),
        (lambda: changed(Linear(5, 5), torch.nn.utils.spectral_norm), "it has hooks"),
        (lambda: changed(Linear(5, 5), lambda x: prune.random_unstructured(x, "weight", 0.5)), "it has hooks"),
        (lambda: changed(Linear(5, 5), replace_forward), "it has a forward of its own"),
        (lambda: changed(Linear(5, 5), give_a_tensor_subclass), "its parameters are of class Special"),
        (lambda: Sequential(Linear(5, 5, dtype=torch.complex64), ReLU()), "it is of dtype torch.complex64"),
        (lambda: followed_by(ReLU()).to(torch.float8_e4m3fn), "it is of dtype torch.float8_e4m3fn"),
        (without_kernels, "there are no kernels for its device, xpu"),
        (lambda: hooked(0, "register_forward_hook"), "it has hooks"),
        (lambda: hooked(0, "register_forward_pre_hook"), "it has hooks"),
        (lambda: hooked(0, "register_full_backward_hook"), "it has hooks"),
        (lambda: hooked(0, "register_full_backward_pre_hook"), "it has hooks"),
        (lambda: hooked(1, "register_forward_hook"), "it is followed by ReLU, which has hooks"),
        (lambda: hooked(1, "register_full_backward_pre_hook"), "it is followed by ReLU, which has hooks"),
        (two_activations, "it is shared, and followed by relu and tanh"),
        (bare_elsewhere, "nothing follows it in its Sequential"),
        (in_what_cannot_be_traced, "Net.forward cannot be traced: symbolically traced variables cannot be used as"),
        (taken_apart, "Net.forward calls the layers of its Sequential one by one"),
        (lambda: module_with(lambda self, x: self.fc1(x)), "Net.forward returns its output"),
        (lambda: module_with(lambda self, x: F.gelu(self.fc1(x))), "it is followed by gelu"),
        (lambda: module_with(lambda self, x: self.fc1(x).relu() + self.fc1(x).add(1)), "it is followed by add"),
        (lambda: module_with(lambda self, x: [h := self.fc1(x), self.act(h)]), "its output has 2 uses in Net.forward"),
        (lambda: module_with(lambda self, x: [self.fc1(x), x][1]), "its output has 0 uses in Net.forward"),
        (lambda: module_with(lambda self, x: torch.clamp(self.fc1(x), 0)), "it is followed by clamp"),
        (
            lambda: module_with(lambda self, x: torch.sigmoid(self.fc1(x), out=x)),
            "it is followed by sigmoid, which takes more than its output",
        ),
        (lambda: module_with(lambda self, x: self.fc2(x)), "no forward within the model calls it"),
    ],
)
def test_what_is_left_and_why(make, reason):
    model = make()
    before = snapshot(model)
    first = explain(model)[0]
    assert first.state == "left"
    assert first.activation is None
    assert first.reason.startswith(reason)
    assert "fusable" not in states(model)
    assert snapshot(fuse(model)) == before
    assert snapshot(unfuse(model)) == before


def test_hooks_of_containers_see_what_they_saw():
    model, seen = Sequential(Linear(5, 4), ReLU(), Sequential(Linear(4, 3), Tanh())), []
    for module in (model, model[2]):
        module.register_forward_hook(lambda _, args, output: seen.extend([*args, output]))
    input = torch.randn(7, 5)
    model(input)
    fuse(model)(input)
    assert states(model) == ["fused", "fused"]
    assert_same(seen[:4], seen[4:])


def test_explain_prints_a_table():
    assert str(explain(fuse(Sequential(Functions(), LinearAct(3, 5), Modules())))) == (
        "0.fc1  fused    sigmoid\n"
        "0.fc2  fused    tanh\n"
        "0.out  fused    relu\n"
        "1      left     it is of class LinearAct\n"
        "2.fc1  fused    relu\n"
        "2.fc2  fused    relu\n"
        "2.out  left     Modules.forward returns its output"
    )
    assert repr(explain(ReLU())) == "no linear layers"
    assert repr(explain(Linear(2, 2))) == "(the model)  left     no forward within the model calls it"


def test_train_epoch_trains_fused_models_as_one_op():
    images, labels = torch.randint(256, (60, 5), dtype=torch.uint8), torch.randint(3, (60,))
    stock = Sequential(torch.nn.Flatten(), Linear(5, 8), Tanh(), Linear(8, 3), Identity())
    fused = fuse(copy.deepcopy(stock))
    assert states(fused) == ["fused", "left"]
    for model in (fused, stock):
        assert choose_engine(model) == "epoch"
        torch_mlp.train_epoch(model, images, labels, batch_size=20, lr=0.1, order=torch.arange(60))
    assert_same(fused.state_dict().values(), stock.state_dict().values())


def random_model(depth, choice, activations):
    """Nested Sequentials of layers of five features; some layers and activations appear several times."""
    layers, modules = [Linear(5, 5) for _ in range(2)], []
    for _ in range(choice.randint(0, 6)):
        kind = choice.randrange(8)
        if kind < 3:
            modules.append(choice.choice([*layers, Linear(5, 5, bias=choice.random() < 0.5)]))
        elif kind < 6:
            modules.append(choice.choice(activations))
        elif kind == 6:
            modules.append(choice.choice([Dropout(0.5), torch.nn.LayerNorm(5), Identity(), LinearAct(5, 5), Modules]))
            modules[-1] = Sequential(Modules(), Linear(3, 5)) if modules[-1] is Modules else modules[-1]
        elif depth:
            modules.append(random_model(depth - 1, choice, activations))
    return Sequential(*modules)


def test_random_models_come_back_as_they_were():
    choice, seen = random.Random(0), {"fused": 0, "left": 0}
    for _ in range(300):
        activations = [kind() for kind in (ReLU, Tanh, Sigmoid) for _ in range(2)]
        model = random_model(3, choice, activations).double().train(choice.random() < 0.5)
        input = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        before, expected = snapshot(model), output_and_gradients(model, input)
        for state in states(fuse(model)):
            seen[state] += 1
        assert_same(output_and_gradients(model, input), expected)
        unfuse(model)
        assert snapshot(model) == before
        assert_same(output_and_gradients(model, input), expected)
    assert min(seen.values()) > 100, seen
