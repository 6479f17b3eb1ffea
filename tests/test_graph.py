"""torch_mlp/graph.py: what is traced, what is refused, and that a generated forward does the same."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from torch_mlp.graph import Rewritten, Tracer, rewrite


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)
        self.sub = torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 3)})
        self.register_buffer("steps", torch.zeros(3))
        self.flag, self.number, self.config, self.seen = True, 2, {"a": 1.5}, []

    def forward(self, input, *, scale: float = 2.0):
        """Everything that is read anew at each call."""
        self.seen.append(scale)
        hidden = F.dropout(self.fc(input), 0.5, self.training) * self.number + self.config["a"]
        return self.sub["fc"](hidden).view(-1, self.number) * scale + self.steps[0]


def net_with(forward):
    return type("Net", (Net,), {"forward": forward})()


def branches(self, input):
    return self.fc(input) if self.flag else input


def branches_on_training(self, input):
    return self.fc(input) if self.training else input


def branches_on_a_shape(self, input):
    return self.fc(input) if input.shape[0] > 3 else input


def loops(self, input):
    for _ in range(self.number):
        input = self.fc(input)
    return input


def loops_over_a_list(self, input):
    for number in self.seen:
        input = input + number
    return self.fc(input)


def draws(self, input):
    return self.fc(input) + torch.randn(3)


def branches_on_a_draw(self, input):
    return self.fc(input) if torch.rand(()).item() < 0.5 else input


def makes_a_constant(self, input):
    return self.fc(input) + torch.tensor([1.0, 2.0, 3.0])


def without_gradients(self, input):
    with torch.no_grad():
        return self.fc(input)


def with_gradients(self, input):
    with torch.enable_grad():
        return self.fc(input)


@torch.no_grad()
def decorated(self, input):
    return self.fc(input)


def in_inference_mode(self, input):
    with torch.inference_mode():
        return self.fc(input)


def without_autocast(self, input):
    with torch.autocast("cpu", enabled=False):
        return self.fc(input)


def checkpoints(self, input):
    return torch.utils.checkpoint.checkpoint(self.fc, input, use_reentrant=False)


def sets_an_attribute(self, input):
    self.hidden = self.fc(input)
    return self.hidden


def sets_a_buffer(self, input):
    self.steps += 1
    return self.fc(input)


def sets_an_attribute_of_a_child(self, input):
    self.fc.last = input
    return self.fc(input)


def calls_another_module(self, input):
    return torch.nn.ReLU()(self.fc(input))


def asks_for_none(self, input, mask=None):
    return self.fc(input) if mask is None else self.fc(input * mask)


def asks_for_either(self, input, mask=None, other=None):
    return self.fc(input) if mask is None and other is None else self.fc(input).relu()


def asks_for_one_of_two(self, input, mask=None, other=None):
    return self.fc(input) if (mask is None) == (other is None) else self.fc(input).relu()


def asks_for_a_class(self, input):
    return self.fc(input) if isinstance(input, torch.Tensor) else self.fc(input[0])


def asks_torch_for_a_class(self, input):
    return self.fc(input) if torch.is_tensor(input) else self.fc(input[0])


def default_without_literal(self, input, other=object()):  # noqa: B008
    return self.fc(input)


CONTROL_FLOW = "symbolically traced variables cannot be used as inputs to control flow"


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        (branches, CONTROL_FLOW),
        (branches_on_training, CONTROL_FLOW),
        (branches_on_a_shape, CONTROL_FLOW),
        (loops, "cannot be interpreted as an integer"),
        (loops_over_a_list, "Proxy object cannot be iterated"),
        (draws, "it calls randn of no input"),
        (branches_on_a_draw, "it calls rand of no input"),
        (makes_a_constant, "it calls tensor of no input"),
        (without_gradients, "it calls _set_grad_enabled of no input"),
        (with_gradients, "it calls _set_grad_enabled of no input"),
        (decorated, "it calls _set_grad_enabled of no input"),
        (in_inference_mode, "it switches autocast, inference mode"),
        (without_autocast, "it switches autocast, inference mode"),
        (checkpoints, "hooks of saved tensors|calls empty of no input"),  # the latter in torch 2.10
        (sets_an_attribute, "it sets hidden"),
        (sets_a_buffer, "it sets steps"),
        (sets_an_attribute_of_a_child, "it sets last"),
        (calls_another_module, "it calls a ReLU that is not a submodule"),
        (asks_for_none, "it branches on an argument being None"),
        (asks_for_either, "it branches on an argument being None"),
        (asks_for_one_of_two, "it branches on an argument being None"),
        (asks_for_a_class, "it calls isinstance, whose answer depends on the call"),
        (asks_torch_for_a_class, "it calls is_tensor"),
        (default_without_literal, "argument of type"),
    ],
)
def test_what_a_graph_would_not_repeat_is_refused(forward, sentence):
    module = net_with(forward)
    state, random, before = dict(module.__dict__), torch.get_rng_state(), module.steps.clone()
    with pytest.raises(Exception, match=sentence):
        Tracer().trace_module(module)
    assert module.__dict__ == state
    assert torch.equal(module.steps, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not module.fc.__dict__.keys() - torch.nn.Linear(1, 1).__dict__.keys()
    assert torch.is_grad_enabled()


def test_arguments_that_can_be_none_are_passed_on():
    def forward(self, input, mask=None):
        return F.relu(torch.clamp(input, 0, mask))

    module, input = net_with(forward), torch.randn(4, 3)
    module.__class__ = rewrite(type(module), Tracer().trace_module(module))
    for arguments in ((input,), (input, 0.5)):
        assert torch.equal(module(*arguments), input.clamp(0, *arguments[1:]))


def test_a_forward_of_the_instance_is_refused():
    module = Net()
    module.forward = lambda input: input
    with pytest.raises(TypeError, match="it is not that of the class"):
        Tracer().trace_module(module)


def rewritten():
    module = Net()
    module.__class__ = rewrite(Net, Tracer().trace_module(module))
    return module


def test_attributes_are_read_at_each_call():
    module, input = rewritten(), torch.randn(4, 3)
    stock = copy.copy(module)
    stock.__class__ = Net
    for change in ({}, {"number": 3}, {"training": False}, {"config": {"a": 7.0}}, {"steps": torch.ones(3)}):
        for one in (module, stock):
            for name, value in change.items():
                setattr(one, name, value)
        outputs = []
        for one in (module, stock):
            torch.manual_seed(5)
            outputs.append(one(input, scale=3.0))
        assert torch.equal(*outputs)
    assert module.seen == [3.0] * 10  # one list, which both have filled


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_the_generated_forward(copied):
    module, input = rewritten().eval(), torch.randn(4, 3)
    twin = copied(copied(module))
    assert isinstance(twin, Rewritten)
    assert isinstance(twin, Net)
    assert torch.equal(twin(input), module(input))
    assert twin.fc.weight is not module.fc.weight


def test_a_new_one_is_stock():
    module = rewritten()
    assert type(type(module)()) is Net
    assert repr(module) == repr(Net())
    assert rewrite(type(module), Tracer().trace_module(module))._stock_class is Net
