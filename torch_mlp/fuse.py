"""Rewrites a model to fused layers, and back.

A linear layer becomes a :class:`torch_mlp.nn.LinearAct` by a change of its class, so that it stays the same object with
the same parameters, buffers and hooks wherever it is used. The activation behind it is taken out in one of two ways: in
a ``Sequential`` by a :class:`FusedActivation` in its place; in any other module by a ``forward`` that torch.fx writes,
in a class derived from the module's own.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn import Linear, Module, Sequential
from torch.nn import functional as F

from torch_mlp import ops
from torch_mlp.graph import Rewritten, Tracer, rewrite
from torch_mlp.nn import LinearAct

__all__ = ["Explanation", "FusedActivation", "Layer", "explain", "fuse", "unfuse"]

# What can follow a linear layer: a class of modules, a function or the name of a method of tensors.
_ACTIVATIONS: dict[Any, str] = {
    kind: name
    for name, kinds in {
        "sigmoid": (torch.nn.Sigmoid, torch.sigmoid, torch.sigmoid_, torch.special.expit, F.sigmoid, "sigmoid_"),
        "tanh": (torch.nn.Tanh, torch.tanh, torch.tanh_, F.tanh, "tanh_"),
        "relu": (torch.nn.ReLU, torch.relu, torch.relu_, F.relu, F.relu_, "relu_"),
    }.items()
    for kind in (*kinds, name)
}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layer(NamedTuple):
    """A linear layer of a model and what :func:`fuse` makes of it."""

    name: str
    state: str  # "fused", "fusable" or "left"
    activation: str | None  # of a layer that is fused or fusable
    reason: str  # why it is left


class Explanation(tuple[Layer, ...]):
    """The linear layers of a model, printed as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [(layer.name or "(the model)", layer.state, layer.activation or layer.reason) for layer in self]
        width = max((len(name) for name, *_ in rows), default=0)
        return "\n".join(f"{name:{width}}  {state:7}  {rest}" for name, state, rest in rows) or "no linear layers"

    __repr__ = __str__


class FusedActivation(torch.nn.Identity):
    """Keeps the place of an activation that the layer before it computes."""

    activation: Module

    def __init__(self, activation: Module) -> None:
        super().__init__()
        self.__dict__["activation"] = activation  # not a submodule: whoever visits those finds only what is called
        self.training = activation.training

    def extra_repr(self) -> str:
        """The activation whose place this is."""
        return repr(self.activation)


def explain(model: Module) -> Explanation:
    """List the linear layers of a model: which are fused, which :func:`fuse` would fuse, which not and why.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        >>> explain(model)
        0  fusable  tanh
        2  left     nothing follows it in its Sequential
        >>> explain(fuse(model))[0]
        Layer(name='0', state='fused', activation='tanh', reason='')
    """
    return _plan(model).explanation


def fuse(model: Module) -> Module:
    """Fuse every linear layer of a model with the sigmoid, tanh or ReLU behind it, in place.

    ``torch.nn.Linear`` layers become :class:`torch_mlp.nn.LinearAct`. All parameters, and all modules but activations
    in a ``Sequential``, stay the same objects, so that optimizers go on; the keys of the state_dict, hooks, device,
    dtype and training mode stay as they are. The model computes what it did and can be copied, saved and compiled.
    :func:`explain` lists what is fused and why a layer is left; :func:`unfuse` undoes it.

    Layers are found in every ``Sequential`` and, through ``torch.fx``, in every other module whose ``forward`` can be
    traced: ``self.act(self.fc(x))``, ``torch.relu(self.fc(x))``, ``self.fc(x).tanh()``. Such a module gets a generated
    ``forward``, in a class derived from its own, which reads the module's attributes anew at each call. A ``forward``
    that branches on those or on inputs, sets them, computes something of no input, or switches gradients or autocast is
    left. What else it does in Python, such as printing, is not repeated.

    A fused layer gives the activation's output to all who call it. Every call in a ``forward`` that can be traced is
    looked at; what other methods do with the layer is not, and a ``Sequential`` in a module that cannot be traced is
    taken to be called as a whole. To hook, wrap or replace single layers, do so before, or :func:`unfuse` first.

    Args:
        model: any module; one that is fused already is left as it is.

    Returns:
        The model.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(inplace=True), torch.nn.Linear(3, 2))
        >>> fuse(model)
        Sequential(
          (0): LinearAct(in_features=2, out_features=3, bias=True, activation=relu)
          (1): FusedActivation(ReLU(inplace=True))
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    plan = _plan(model)
    fusable = {layer: row.activation for layer, row in plan.layers.items() if row.state == "fusable"}
    uses = [use for layer in fusable for use in plan.uses[layer]]
    # All that could fail comes before the first change.
    for use in uses:
        if isinstance(use.place, fx.Node):
            use.place.replace_all_uses_with(use.place.all_input_nodes[0])
            use.place.graph.erase_node(use.place)
    rewritten = {
        use.owner: rewrite(type(use.owner), plan.graphs[use.owner]) for use in uses if use.owner in plan.graphs
    }
    for module, cls in rewritten.items():
        module.__class__ = cls
    for use in uses:
        if isinstance(use.place, str):
            use.owner._modules[use.place] = FusedActivation(use.owner.get_submodule(use.place))
    for layer, activation in fusable.items():
        layer.__class__ = LinearAct
        layer.__dict__.update(activation=activation, _is_fused=True)
    return model


def unfuse(model: Module) -> Module:
    """Undo :func:`fuse`, in place: every layer, activation and class is again what it was.

    Args:
        model: what :func:`fuse` was given, or a copy of it; layers made as ``LinearAct`` are left as they are.

    Returns:
        The model.

    Example:
        >>> unfuse(fuse(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())))
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
          (1): Tanh()
        )
    """
    for module in list(model.modules()):
        if isinstance(module, Rewritten):
            module.__class__ = module._stock_class
        if module.__dict__.pop("_is_fused", False):
            module.__class__ = Linear
            del module.__dict__["activation"]
        for name, child in module._modules.items():
            if isinstance(child, FusedActivation):
                child.activation.training = child.training
                module._modules[name] = child.activation
    return model


class _Use(NamedTuple):
    """A call of a linear layer, and the activation that is all that its output goes to, or the reason why not."""

    owner: Module  # whose forward calls it
    activation: str | None = None
    place: str | fx.Node | None = None  # of the activation, in a Sequential or in a graph
    reason: str = ""


class _Plan(NamedTuple):
    layers: dict[Module, Layer]
    uses: dict[Module, list[_Use]]
    graphs: dict[Module, fx.Graph]

    @property
    def explanation(self) -> Explanation:
        return Explanation(self.layers.values())


def _plan(model: Module) -> _Plan:
    names = {module: name for name, module in model.named_modules() if isinstance(module, Linear)}
    obstacles = {layer: _obstacle(layer) for layer in names}
    candidates = {layer for layer, obstacle in obstacles.items() if not obstacle}
    uses: dict[Module, list[_Use]] = defaultdict(list)
    graphs: dict[Module, fx.Graph] = {}
    tracer = Tracer()
    for owner in model.modules():
        if owner in candidates or not _has_forward(owner) or candidates.isdisjoint(owner.modules()):
            continue
        if _is_sequential(owner):
            found = _uses_in_sequential(owner)
        else:
            try:
                graphs[owner] = tracer.trace_module(owner)
                found = _uses_in_graph(owner, graphs[owner])
            except Exception as error:  # of any kind: it comes from within forward
                reason = f"{type(owner).__name__}.forward cannot be traced: {str(error).strip().partition(chr(10))[0]}"
                found = ((layer, _Use(owner, reason=reason)) for layer in _own_children(owner))
        for layer, use in found:
            if layer in candidates:
                uses[layer].append(use)
    return _Plan({layer: _decide(names[layer], layer, obstacles[layer], uses[layer]) for layer in names}, uses, graphs)


def _decide(name: str, layer: Module, obstacle: str, uses: list[_Use]) -> Layer:
    if "_is_fused" in layer.__dict__:
        return Layer(name, "fused", str(layer.activation), "")
    activations = [use.activation for use in uses if use.activation]
    reasons = [obstacle, *(use.reason for use in uses)]
    if not uses:
        reasons.append("no forward within the model calls it")
    if len(set(activations)) > 1:
        reasons.append(f"it is shared, and followed by {' and '.join(sorted(set(activations)))}")
    reason = next(filter(None, reasons), "")
    return Layer(name, "left", None, reason) if reason else Layer(name, "fusable", activations[0], "")


def _obstacle(layer: Linear) -> str:
    """Why this linear layer cannot be fused whatever follows it, or an empty string."""
    if type(layer) is not Linear:
        return f"it is of class {type(layer).__name__}"
    if changed := _changed(layer):
        return f"it has {changed}"
    device, dtype = layer.weight.device.type, layer.weight.dtype
    if dtype not in _DTYPES:
        return f"it is of dtype {dtype}"
    if device not in ("cpu", "meta") and not (device == "cuda" and ops.has_cuda_kernels()):
        return f"there are no kernels for its device, {device}"
    special = [type(tensor).__name__ for tensor in layer.parameters() if type(tensor) is not torch.nn.Parameter]
    return f"its parameters are of class {special[0]}" if special else ""


def _changed(module: Module) -> str:
    """What makes a call of the module do more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "hooks" if any(hooks) else "a forward of its own" if "forward" in module.__dict__ else ""


def _has_forward(module: Module) -> bool:
    return type(module).forward is not Module.forward


def _is_sequential(module: Module) -> bool:
    return getattr(type(module), "forward", None) is Sequential.forward and "forward" not in module.__dict__


def _own_children(module: Module) -> Iterator[Module]:
    """The children that the module's forward can call as its own, those in a ModuleList and the like too."""
    for child in module.children():
        yield child
        if not _has_forward(child):
            yield from _own_children(child)


def _uses_in_sequential(owner: Module) -> Iterator[tuple[Module, _Use]]:
    for (_, layer), (place, follower) in pairwise([*owner._modules.items(), ("", None)]):
        if follower is None:
            use = _Use(owner, reason="nothing follows it in its Sequential")
        else:
            use = _use(owner, type(follower), place, follower)
        if layer is not None:
            yield layer, use


def _uses_in_graph(owner: Module, graph: fx.Graph) -> Iterator[tuple[Module, _Use]]:
    for node in graph.find_nodes(op="call_module"):
        parent, layer = (owner.get_submodule(path) for path in (node.target.rpartition(".")[0], node.target))
        users = list(node.users)
        if _is_sequential(parent):  # whose places are as its own forward needs them
            reason = f"{type(owner).__name__}.forward calls the layers of its Sequential one by one"
            yield from ((child, _Use(owner, reason=reason)) for child in parent.children())
        elif len(users) != 1:
            yield layer, _Use(owner, reason=f"its output has {len(users)} uses in {type(owner).__name__}.forward")
        elif users[0].op == "output":
            yield layer, _Use(owner, reason=f"{type(owner).__name__}.forward returns its output")
        elif users[0].op == "call_module":
            follower = owner.get_submodule(users[0].target)
            yield layer, _use(owner, type(follower), users[0], follower)
        else:
            yield layer, _use(owner, users[0].target, users[0])


def _use(owner: Module, kind: Any, place: str | fx.Node, follower: Module | None = None) -> _Use:
    """A use of an output that goes to one function or module of this kind and nowhere else."""
    name = getattr(kind, "__name__", str(kind))
    if kind not in _ACTIVATIONS:
        return _Use(owner, reason=f"it is followed by {name}")
    if isinstance(place, fx.Node) and len(place.all_input_nodes) > 1:  # out=buffer, for one
        return _Use(owner, reason=f"it is followed by {name}, which takes more than its output")
    if follower is not None and (changed := _changed(follower)):
        return _Use(owner, reason=f"it is followed by {name}, which has {changed}")
    return _Use(owner, _ACTIVATIONS[kind], place)
