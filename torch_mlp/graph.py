"""The forward of a module as a torch.fx graph, and a forward generated from one in its place.

fx evaluates whatever does not come from an input while it traces, and keeps the result for ever: a flag, a random draw,
whether gradients are enabled. The tracer here refuses all that, so that a generated forward does what was written.
"""

import inspect
from collections.abc import Callable, Collection
from types import ModuleType, new_class
from typing import Any

import torch
from torch import fx
from torch.nn import Module
from torch.overrides import TorchFunctionMode

# What asks about a value or a mode without fx noticing.
_UNSEEN = {"hasattr", "is_autocast_enabled", "is_grad_enabled", "is_tensor", "isinstance"}
_MODULE_FIELDS = set(Module().__dict__) - {"training"}


class Tracer(fx.Tracer):
    """Traces one forward at a time, submodules as leaves.

    What is traced are twins of the modules, whose attributes are read by nodes of the graph: a generated forward reads
    them anew at each call, and no branch can depend on them.

    Example:
        >>> graph = Tracer().trace_module(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
        >>> [node.op for node in graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.twins: dict[Module, Module] = {}

    def trace_module(self, module: Module) -> fx.Graph:
        """The graph of a module's forward; what fails, in whatever way, cannot be traced."""
        if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
            raise TypeError("it is not that of the class")
        if names := _UNSEEN.intersection(inspect.unwrap(type(module).forward).__code__.co_names):
            raise TypeError(f"it calls {min(names)}, whose answer depends on the call")
        self.contexts = _contexts()
        graph = self._trace(module, ())
        optional = [node.target for node in graph.nodes if node.op == "placeholder" and node.args == (None,)]
        # Python lets nobody see a test for None, but it shows in what is computed.
        for absent in [optional, *([name] for name in optional)] if optional else []:
            if _steps(self._trace(module, absent)) != _steps(graph):
                raise TypeError("it branches on an argument being None")
        return graph

    def _trace(self, module: Module, absent: Collection[Any]) -> fx.Graph:
        """The graph where these arguments are None."""
        self.absent = absent
        with _NothingComputed():
            return self.trace(self.twin(module))

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """As fx does, but None for an argument that is to be absent."""
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        return None if kind == "placeholder" and target in self.absent else proxy

    def twin(self, module: Module) -> Module:
        """A copy of a tree of modules that shares the parameters, and keeps what forward does to it to itself."""
        if isinstance(module, torch.jit.ScriptModule):
            return module
        if module not in self.twins:
            twin: Any = object.__new__(new_class(type(module).__name__, (_Twin, type(module))))
            children = {name: child if child is None else self.twin(child) for name, child in module._modules.items()}
            twin.__dict__.update(module.__dict__, _modules=children, _tracer=self)
            self.twins[module] = twin
        return self.twins[module]

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        """Always: submodules are traced on their own."""
        return True

    def path_of_module(self, mod: Module) -> str:
        """The shortest, so that a module which is an attribute is not called by its place in a Sequential."""
        paths = [path for path, module in self.root.named_modules(remove_duplicate=False) if module is mod]
        if not paths:
            raise NameError(f"it calls a {type(mod).__name__} that is not a submodule")
        return min(paths, key=lambda path: path.count("."))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As fx does, outside of contexts that the graph would not enter."""
        if _contexts() != self.contexts:
            raise RuntimeError("it switches autocast, inference mode or the hooks of saved tensors")
        return super().create_node(*args, **kwargs)

    def read(self, module: Module, name: str) -> fx.Proxy:
        """An attribute of a module as a node of the graph."""
        return self.create_proxy("get_attr", f"{self.path_of_module(module)}.{name}".lstrip("."), (), {})


class _Twin(Module):
    """Mixed into the classes of twins: reading a plain attribute is recorded, setting one refused."""

    def __getattribute__(self, name: str) -> Any:
        value, state = super().__getattribute__(name), super().__getattribute__("__dict__")
        if name not in state or name in _MODULE_FIELDS or value is None or isinstance(value, (Module, fx.Tracer)):
            return value
        return state["_tracer"].read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError(f"it sets {name}")


class _NothingComputed(TorchFunctionMode):
    """Refuses all functions of torch that fx does not see, those that switch gradients off and on among them."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(issubclass(kind, fx.Proxy) for kind in types):
            raise TypeError(f"it calls {getattr(func, '__name__', func)} of no input")
        return func(*args, **(kwargs or {}))


def _steps(graph: fx.Graph) -> list[tuple[str, Any]]:
    return [(node.op, node.target) for node in graph.nodes]


def _contexts() -> tuple[Any, ...]:
    torch.autocast_increment_nesting()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # those of checkpoint, for one
    return torch.autocast_decrement_nesting(), torch.is_inference_mode_enabled(), hooks


class Rewritten(Module):
    """Mixed into the class of a module whose forward is generated; the class it had is ``_stock_class``."""

    _stock_class: Any  # a class of modules
    _code: tuple[str, dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__class__ = self._stock_class  # a new module, by type(self)(...), is a stock one

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = tuple(super().__reduce_ex__(protocol))[2:]
        return _new_rewritten, (self._stock_class, *self._code), *state  # no import finds this class


def rewrite(cls: type[Module], graph: fx.Graph) -> Any:
    """A class derived from this one, or from the one this was derived from here, with the graph as its forward.

    Example:
        >>> class Twice(Module):
        ...     def forward(self, input):
        ...         return input + input
        >>> module = Twice()
        >>> graph = Tracer().trace_module(module)
        >>> list(graph.nodes)[1].target = torch.sub
        >>> module.__class__ = rewrite(Twice, graph)
        >>> module, module(torch.ones(2))
        (Twice(), tensor([0., 0.]))
    """
    code = graph.python_code("self")
    names = {name: value for name, value in code.globals.items() if not isinstance(value, ModuleType)}
    return _rewritten_class(getattr(cls, "_stock_class", cls), code.src, names)


def _rewritten_class(cls: type[Module], source: str, names: dict[str, Any]) -> Any:
    body: dict[str, Any] = {}
    exec(source, {"torch": torch, **names}, body)
    body.update(_stock_class=cls, _code=(source, names), __module__=cls.__module__, __doc__=cls.__doc__)
    return new_class(cls.__name__, (Rewritten, cls), exec_body=lambda namespace: namespace.update(body))


def _new_rewritten(*code: Any) -> Module:
    return object.__new__(_rewritten_class(*code))
