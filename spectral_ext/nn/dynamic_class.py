"""The classes that are made at run time: of parametrized modules and of the roots of fused models.

``torch.nn.utils.parametrize`` gives every parametrized module a class of its own, to have
properties in it. Modules with that class cannot be pickled, and copies share it, so that a
parametrization removed from one is gone from all. The modules that we touch get a class of ours in
its place, with faster properties; pickle and ``copy`` make the class anew for every copy.

The root of a fused model gets a subclass whose ``forward`` enters the group.
"""

import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn import Module, ModuleDict
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as StockSpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook

from .active import Record, active, in_force, lookup
from .hook_keys import read_hook_layout

__all__ = [
    "GROUP",
    "class_of_parametrizations",
    "exchange_class",
    "fused_class",
    "is_fused",
    "own_class",
    "parametrization_lists",
    "spectral_norms",
    "stock_class",
    "unwrap",
]

# The attribute of a fused root that holds its group.
GROUP = "_spectral_group"
# The attribute, in the dictionary of a class of this file, that says what made it.
_KIND = "_spectral_class"

# FX exchanges it while it traces.
_MODULE_CALL = Module.__call__

_fused_classes: "weakref.WeakKeyDictionary[type, weakref.ref[type]]" = weakref.WeakKeyDictionary()


def spectral_norms(modules: Iterable[Module]) -> Iterator[tuple[Any, tuple[Module, str]]]:
    """Yield stock's and our spectral norms of modules, each with its module and the name of its tensor."""
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if type(hook) is StockHook:
                yield hook, (module, hook.name)
        for name, list_ in parametrization_lists(module).items():
            for norm in list_:
                if isinstance(norm, StockSpectralNorm):
                    yield norm, (module, name)


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
                return base.forward(self, *args, **kwargs)
            finally:
                visible.record = above
        record = group.enter()
        record.below = below = active.record
        above = None if below is None else visible.record
        # An interrupt is raised at a call, and there is none in this `finally`.
        try:
            visible.record = active.record = record
            return base.forward(self, *args, **kwargs)
        finally:
            visible.record, active.record = above, below

    def set_state(self: Any, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        group = self.__dict__.get(GROUP)
        if group is not None and group.root is None:  # not so in copy.copy, which shares it
            group.bind(self)

    body = {
        _KIND: "fused",
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "__setstate__": set_state,
        "forward": forward,
    }
    cls = type(f"Fused{base.__name__}", (base,), body)
    _fused_classes[base] = weakref.ref(cls)
    return cls


def is_fused(cls: type) -> bool:
    """Return whether a class was made by :func:`fused_class`."""
    return cls.__dict__.get(_KIND) == "fused"


def own_class(module: Module) -> None:
    """Put a class of ours in the place of the one that ``parametrize`` gave a module."""
    cls, names = class_of_parametrizations(module), list(parametrization_lists(module))
    if cls.__dict__.get(_KIND) != "parametrized":
        exchange_class(module, cls, _parametrized_class(cls.__bases__[0], names))
    else:
        for name in names:
            setattr(cls, name, _tensor_property(name))


def stock_class(module: Module) -> None:
    """Give a parametrized module the class that ``parametrize`` would give it."""
    whole, ours = type(module), class_of_parametrizations(module)
    module.__class__ = ours.__bases__[0]
    parametrize._inject_new_class(module)
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
    return type(cls.__name__, tuple(bases), body)


def unwrap(root: Module) -> None:
    """Give a fused root its class back, and forget its group."""
    root.__dict__.pop(GROUP, None)
    fused = next(cls for cls in type(root).__mro__ if is_fused(cls))
    exchange_class(root, fused, fused.__bases__[0])


def _parametrized_class(base: type[Module], tensor_names: list[str]) -> type[Module]:
    body: dict[str, Any] = {name: _tensor_property(name) for name in tensor_names}
    body |= {
        _KIND: "parametrized",
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_load_from_state_dict": _load_from_state_dict,
    }
    return type(f"Parametrized{base.__name__}", (base,), body)


def _lowest(module: Module) -> type[Module]:
    """Return the class of this file that is right above the module's own class."""
    return [cls for cls in type(module).__mro__ if _KIND in cls.__dict__][-1]


def _load_from_state_dict(
    self: Any, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
) -> None:
    """Load checkpoints of stock's hook too."""
    for name, list_ in parametrization_lists(self).items():
        if isinstance(list_[0], StockSpectralNorm):
            read_hook_layout(list_[0], name, state_dict, prefix, local_metadata)
            keys = f"{prefix}parametrizations.{name}."
            if f"{keys}original" in state_dict and f"{keys}0._u" not in state_dict:
                list_[0].__dict__["_start_from"] = list_  # new vectors, once the weight is there
    super(_lowest(self), self)._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


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
                    return found
        if not parametrize._cache_enabled:
            return parametrizations()
        key = (id(self), tensor_name)
        tensor = parametrize._cache.get(key)
        if tensor is None:
            tensor = parametrize._cache[key] = parametrizations()
        return tensor

    def set_(self: Any, value: Tensor) -> None:
        self.parametrizations[tensor_name].right_inverse(value)

    return property(get, set_)


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
    tensor_names = list(parametrization_lists(self))
    return (_rebuild, (made_of, tensor_names, constructor, arguments), *rest)


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


def _rebuild(made_of: list[str], tensor_names: list[str], constructor: Any, arguments: Any) -> Any:
    """Make the module that :func:`_reduce_ex` took apart; its state comes later."""
    module = constructor(*arguments)
    cls = type(module)
    for kind in reversed(made_of):
        cls = fused_class(cls) if kind == "fused" else _parametrized_class(cls, tensor_names)
    module.__class__ = cls
    return module
