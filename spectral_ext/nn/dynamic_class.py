"""The classes that are made at run time: of parametrized modules and of the roots of fused models.

``torch.nn.utils.parametrize`` gives every parametrized module a class of its own, to have
properties in it. Modules with that class cannot be pickled, and copies share it, so that a
parametrization removed from one is gone from all. The modules that we touch get a class of ours in
its place, with faster properties; pickle and ``copy`` make the class anew for every copy.

The root of a fused model gets a subclass whose ``forward`` enters the group.

These classes have the names of the classes below them (quiet_class.py).
"""

import functools
import weakref
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn import Module, ModuleDict
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as StockSpectralNorm
from torch.nn.utils.parametrize import ParametrizationList

from .active import (
    Record,
    active,
    graph_task,
    in_force,
    is_plain,
    lookup,
    top_hooks,
)
from .history import forward_grad_enabled
from .hook_keys import read_hook_layout
from .quiet_class import class_of_stock, quiet_class, subclass

__all__ = [
    "GROUP",
    "add_properties",
    "class_for_parametrizations",
    "class_of_parametrizations",
    "exchange_class",
    "fused_class",
    "is_fused",
    "own_class",
    "parametrization_lists",
    "refuse_to_trace_what_is_cached",
    "register",
    "stock_class",
    "take_off",
    "unwrap",
]

# The attribute of a fused root that holds its group.
GROUP = "_spectral_group"
# The attribute, in the dictionary of a class of this file, that says what made it.
_KIND = "_spectral_class"

# FX exchanges it while it traces.
_MODULE_CALL = Module.__call__

_fused_classes: "weakref.WeakKeyDictionary[type, weakref.ref[type]]" = weakref.WeakKeyDictionary()


def parametrization_lists(module: Module) -> dict[str, ParametrizationList]:
    """Return the live dictionary of a module's parametrizations by tensor name, or an empty one."""
    registered = module._modules.get("parametrizations")
    if not isinstance(registered, ModuleDict):
        return {}
    return cast("dict[str, ParametrizationList]", registered._modules)


def fused_class(base: type[Module]) -> type[Module]:
    """Return the subclass of a module class whose forward runs inside the module's group."""
    reference = _fused_classes.get(base)
    cls = None if reference is None else reference()
    if cls is not None:
        return cls

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        group = self.__dict__.get(GROUP)
        # The layers of a model that FX traces are traced alone, as stock's are.
        if group is None or (Module.__call__ is not _MODULE_CALL and is_fx_symbolic_tracing()):
            return base.forward(self, *args, **kwargs)
        group = group.of(self)
        visible = group.visible
        if is_dynamo_compiling():
            above, visible.record = visible.record, group.trace()
            try:
                output = base.forward(self, *args, **kwargs)
                visible.has_run = True
                return output
            finally:
                visible.record = above
        record = group.enter()
        record.below = below = active.record
        above = None if below is None else visible.record
        # An interrupt is raised at a call, and there is none in this `finally`.
        try:
            visible.record = active.record = record
            output = base.forward(self, *args, **kwargs)
            visible.has_run = True
            return output
        finally:
            visible.record, active.record = above, below

    def set_state(self: Any, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        group = self.__dict__.get(GROUP)
        if group is not None and group.root is None:  # not so in copy.copy, which shares it
            group.bind(self)

    body = {
        _KIND: "fused",
        "__doc__": base.__doc__,
        "__prepare_scriptable__": _refuse_to_script,
        "__reduce_ex__": _reduce_ex,
        "__setstate__": set_state,
        "forward": forward,
    }
    cls = subclass(base, body)
    _fused_classes[base] = weakref.ref(cls)
    return cls


def is_fused(cls: type) -> bool:
    """Return whether a class was made by :func:`fused_class`."""
    return cls.__dict__.get(_KIND) == "fused"


def class_for_parametrizations(module: Module) -> type[Module]:
    """Return the class of ours that a module with parametrizations gets; the module is left as it is."""
    if not parametrize.is_parametrized(module):
        return _parametrized_class(type(module), {})
    cls = class_of_parametrizations(module)
    if cls.__dict__.get(_KIND) == "parametrized":
        return type(module)
    return _exchanged(type(module), cls, _parametrized_class(cls.__bases__[0], {}))


def own_class(module: Module) -> None:
    """Put a class of ours in the place of the one that ``parametrize`` gave a module."""
    module.__class__ = class_for_parametrizations(module)
    add_properties(module)


def add_properties(module: Module) -> None:
    """Give the class of a parametrized module, which is ours, a property for each of its tensors."""
    cls, tensors = class_of_parametrizations(module), _kinds_of_tensors(module)
    for name, property_ in _properties(tensors).items():
        setattr(cls, name, property_)
    cls.__name__ = _name_of_class(cls.__bases__[0], tensors)


def register(module: Module, name: str, parametrization: Module, *, unsafe: bool) -> None:
    """Do what ``register_parametrization`` of PyTorch does, with a class of ours.

    PyTorch takes the tensor off the module before it makes a class, which may fail.
    """
    if parametrize.is_parametrized(module):
        parametrize.register_parametrization(module, name, parametrization, unsafe=unsafe)
        own_class(module)
        return
    parametrization.train(module.training)
    cls = class_for_parametrizations(module)
    list_ = ParametrizationList([parametrization], getattr(module, name), unsafe=unsafe)
    delattr(module, name)
    module.__class__ = cls
    module.parametrizations = ModuleDict()
    module.parametrizations[name] = list_
    add_properties(module)


def take_off(module: Module, name: str) -> Tensor:
    """Take the parametrizations of a tensor off a module with a class of ours; return the original."""
    lists, cls = parametrization_lists(module), class_of_parametrizations(module)
    for property_ in _properties({name: _kinds_of_tensors(module)[name]}):
        if property_ in cls.__dict__:
            delattr(cls, property_)
    original: Tensor = lists.pop(name).original
    if not lists:
        del module._modules["parametrizations"]
        exchange_class(module, cls, cls.__bases__[0])
    return original


def stock_class(module: Module) -> None:
    """Give a parametrized module the class that ``parametrize`` would give it."""
    whole, ours = type(module), class_of_parametrizations(module)
    module.__class__ = class_of_stock(ours.__bases__[0])
    for name in parametrization_lists(module):
        parametrize._inject_property(module, name)
    module.__class__ = _exchanged(whole, ours, type(module))


def class_of_parametrizations(module: Module) -> type[Any]:
    """Return the class that holds a module's parametrizations: the first, or below that of FSDP."""
    cls = type(module)
    first = cls.__bases__[0]
    is_of_fsdp = first.__module__.startswith("torch.distributed.") and len(cls.__bases__) == 2
    return cls.__bases__[1] if is_of_fsdp else cls


def exchange_class(module: Module, old: type[Any], new: type[Any]) -> None:
    """Exchange one of the classes of a module, and leave those on top of it as they are."""
    module.__class__ = _exchanged(type(module), old, new)


def _exchanged(cls: type[Any], old: type[Any], new: type[Any]) -> type[Any]:
    if cls is old:
        return new
    bases = (
        _exchanged(base, old, new) if issubclass(base, old) else base for base in cls.__bases__
    )
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return quiet_class(cls.__name__, tuple(bases), body)


def unwrap(root: Module) -> None:
    """Give a fused root its class back, and forget its group."""
    root.__dict__.pop(GROUP, None)
    fused = next(cls for cls in type(root).__mro__ if is_fused(cls))
    exchange_class(root, fused, fused.__bases__[0])


def _parametrized_class(base: type[Module], tensors: dict[str, bool]) -> type[Module]:
    """Make the class of a module; ``tensors`` says of each tensor whether it came with a hook."""
    body: dict[str, Any] = _properties(tensors)
    body |= {
        _KIND: "parametrized",
        "__doc__": base.__doc__,
        "__prepare_scriptable__": _refuse_to_script,
        "__reduce_ex__": _reduce_ex,
        "_load_from_state_dict": _load_from_state_dict,
        "register_parameter": _register_parameter,
    }
    cls = subclass(base, body)
    cls.__name__ = _name_of_class(base, tensors)
    return cls


def _name_of_class(base: type[Module], tensors: dict[str, bool]) -> str:
    """Return the name that the class of a module has in PyTorch, where a hook makes none."""
    return base.__name__ if all(tensors.values()) else f"Parametrized{base.__name__}"


def _kinds_of_tensors(module: Module) -> dict[str, bool]:
    """Return for each parametrized tensor of a module whether it came with PyTorch's hook."""
    return {
        name: getattr(list_._modules.get("0"), "_hook", None) is not None
        for name, list_ in parametrization_lists(module).items()
    }


def _properties(tensors: dict[str, bool]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, came_with_hook in tensors.items():
        if came_with_hook:
            properties |= _properties_of_hook(name)
        else:
            properties[name] = _tensor_property(name)
    return properties


def _properties_of_hook(tensor_name: str) -> dict[str, Any]:
    """Return the attributes that PyTorch's hook gives a module; see hook.py."""

    def get(self: Any) -> Any:
        if is_dynamo_compiling():
            return self.parametrizations[tensor_name][0]._hook.read(self)
        lists = self._modules["parametrizations"]._modules
        return lists[tensor_name]._modules["0"]._hook.read(self)

    def set_(self: Any, value: Tensor) -> None:
        self.parametrizations[tensor_name][0]._hook.assign(self, value)

    def vector(name: str) -> property:
        return property(
            lambda self: getattr(self.parametrizations[tensor_name][0], name),
            lambda self, value: setattr(self.parametrizations[tensor_name][0], name, value),
        )

    original = property(
        lambda self: self.parametrizations[tensor_name].original,
        lambda self, value: setattr(self.parametrizations[tensor_name], "original", value),
    )
    return {
        tensor_name: property(get, set_),
        f"{tensor_name}_orig": original,
        f"{tensor_name}_u": vector("_u"),
        f"{tensor_name}_v": vector("_v"),
    }


def _lowest(module: Module) -> type[Module]:
    """Return the class of this file that is right above the module's own class."""
    return [cls for cls in type(module).__mro__ if _KIND in cls.__dict__][-1]


def _load_from_state_dict(
    self: Any, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
) -> None:
    """Load checkpoints of stock's hook, of a plain model, and of weights alone too."""
    for name, list_ in parametrization_lists(self).items():
        norm = list_[0]
        if not isinstance(norm, StockSpectralNorm):
            continue
        read_hook_layout(norm, name, state_dict, prefix, local_metadata)
        original = f"{prefix}parametrizations.{name}.original"
        if len(list_) == 1 and f"{prefix}{name}" in state_dict and original not in state_dict:
            state_dict[original] = state_dict.pop(f"{prefix}{name}")
        if original in state_dict and type(norm) is not StockSpectralNorm:
            norm.__dict__["_start_from"] = list_  # for its vectors, once the weight is there
    super(_lowest(self), self)._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _register_parameter(self: Any, name: str, param: Any) -> None:
    """Take a parameter that is assigned to the ``weight_orig`` of PyTorch's hook.

    ``remove_parametrizations`` puts the tensor back in this way; a hook that came with it has nothing to do
    any more.
    """
    tensor_name = name.removesuffix("_orig")
    if tensor_name != name and _kinds_of_tensors(self).get(tensor_name):
        parametrization_lists(self)[tensor_name].original = param
        return
    if name not in parametrization_lists(self):
        for key, hook in list(self._forward_pre_hooks.items()):
            if getattr(hook, "is_left_behind", None) and hook.name == name:
                del self._forward_pre_hooks[key]
    super(_lowest(self), self).register_parameter(name, param)


def refuse_to_trace_what_is_cached() -> None:
    """Raise where ``torch.jit.trace`` would write a cached weight down as a constant, as PyTorch does."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")


def _tensor_property(tensor_name: str) -> property:
    """Return the property of a tensor, as ``parametrize`` has it, but faster inside of a group."""

    def get(self: Any) -> Tensor:
        if is_dynamo_compiling():
            return self.parametrizations[tensor_name]()
        parametrizations = self._modules["parametrizations"]._modules[tensor_name]
        record = active.record
        if record is not None:
            modules = parametrizations._modules
            original = parametrizations._parameters.get("original")
            if original is not None and len(modules) == 1:
                found = lookup(record, id(modules["0"]), original)
                if found is not None:
                    # As is_plain says, without a call; what a checkpoint reads is noted.
                    if forward_grad_enabled() and top_hooks(False) is None and graph_task() == -1:
                        return found
                    return found if is_plain(record) else parametrizations()
        if not parametrize._cache_enabled:
            return parametrizations()
        refuse_to_trace_what_is_cached()
        key = (id(self), tensor_name)
        tensor = parametrize._cache.get(key)
        if tensor is None:
            tensor = parametrize._cache[key] = parametrizations()
        return tensor

    def set_(self: Any, value: Tensor) -> None:
        list_ = self.parametrizations[tensor_name]
        for norm in list_:
            if isinstance(norm, StockSpectralNorm):  # the group may hold what is swapped
                getattr(norm, "forget_calls", lambda: None)()
        list_.right_inverse(value)

    return property(get, set_)


def _refuse_to_script(self: Any) -> Any:
    """Raise for ``torch.jit.script``, which calls it for every module first."""
    raise TypeError(
        f"{type(self).__name__} has spectral norms, which torch.jit.script cannot compile; script "
        "spectral_ext.bake(model), or use torch.jit.trace"
    )


def _reduce_ex(self: Any, protocol: int) -> Any:
    """Reduce a module as its own class would, with the classes of this file on top of it."""
    made_of = [cls.__dict__[_KIND] for cls in type(self).__mro__ if _KIND in cls.__dict__]
    lowest = _lowest(self)
    own = lowest.__bases__[0]
    with in_force(_originals(self)):
        reduced = super(lowest, self).__reduce_ex__(protocol)
    if isinstance(reduced, str):
        return reduced
    constructor, arguments, *rest = reduced
    arguments = tuple(own if argument is type(self) else argument for argument in arguments)
    tensors = _kinds_of_tensors(self)
    hooked = [name for name, came_with_hook in tensors.items() if came_with_hook]
    return (_rebuild, (made_of, list(tensors), constructor, arguments, hooked), *rest)


def _originals(module: Module) -> Record:
    """Return a record that leaves the weights of a module as they are.

    RNNs keep their weights in a list that they renew when they are copied.
    """
    norms, weights = [], []
    for list_ in parametrization_lists(module).values():
        if list_.is_tensor:
            norms.append(list_[0])
            weights.append(list_.original)
    index = {id(norm): place for place, norm in enumerate(norms)}
    return Record(index, weights, list(weights), [], lambda place: weights[place])


def _rebuild(
    made_of: list[str],
    tensor_names: list[str],
    constructor: Any,
    arguments: Any,
    hooked: Collection[str] = (),
) -> Any:
    """Make the module that :func:`_reduce_ex` took apart; its state comes later."""
    module = constructor(*arguments)
    cls, tensors = type(module), {name: name in hooked for name in tensor_names}
    for kind in reversed(made_of):
        cls = fused_class(cls) if kind == "fused" else _parametrized_class(cls, tensors)
    module.__class__ = cls
    return module
