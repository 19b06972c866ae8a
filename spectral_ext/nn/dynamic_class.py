"""The classes that are made at run time: of parametrized modules and of the roots of fused models.

``torch.nn.utils.parametrize`` gives every parametrized module a class of its own, to have properties
in it. Modules with that class cannot be pickled, and copies share it, so that a parametrization
removed from one is gone from all. The modules that we touch get a class of ours in its place, with
faster properties; pickle and ``copy`` make the class anew for every copy.

The root of a fused model gets a subclass whose ``forward`` enters the group.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from .active import active, lookup

__all__ = ["GROUP", "fused_class", "is_fused", "own_class", "set_base", "stock_class"]

# The attribute of a fused root that holds its group.
GROUP = "_spectral_group"
# The attribute, in the dictionary of a class of this file, that says what made it.
_KIND = "_spectral_class"

_fused_classes: "weakref.WeakKeyDictionary[type, weakref.ref[type]]" = weakref.WeakKeyDictionary()


def fused_class(base: type) -> type:
    """Return the subclass of a module class whose forward runs inside the module's group."""
    reference = _fused_classes.get(base)
    cls = None if reference is None else reference()
    if cls is not None:
        return cls

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        group = self.__dict__.get(GROUP)
        if group is None:
            return base.forward(self, *args, **kwargs)
        with group.of(self).normalized():
            return base.forward(self, *args, **kwargs)

    def set_state(self: Any, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        group = self.__dict__.get(GROUP)
        if group is not None:
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


def is_fused(module: Module) -> bool:
    """Return whether a module is the root of a fused model."""
    return any(cls.__dict__.get(_KIND) == "fused" for cls in type(module).__mro__)


def own_class(module: Module) -> None:
    """Put a class of ours in the place of the one that ``parametrize`` gave a module."""
    cls = type(module)
    if cls.__dict__.get(_KIND) != "parametrized":
        module.__class__ = _parametrized_class(cls.__bases__[0], list(module.parametrizations))
    else:
        for name in module.parametrizations:
            setattr(cls, name, _tensor_property(name))


def stock_class(module: Module) -> None:
    """Give a parametrized module the class that ``parametrize`` would give it."""
    module.__class__ = type(module).__bases__[0]
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)


def set_base(module: Module, base: type) -> None:
    """Exchange the class of a module, below the class that holds its parametrizations."""
    if parametrize.is_parametrized(module):
        type(module).__bases__ = (base,)
    else:
        module.__class__ = base


def _parametrized_class(base: type, tensor_names: list[str]) -> type:
    body: dict[str, Any] = {name: _tensor_property(name) for name in tensor_names}
    body |= {
        _KIND: "parametrized",
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
    }
    return type(f"Parametrized{base.__name__}", (base,), body)


def _tensor_property(tensor_name: str) -> property:
    """Return the property of a parametrized tensor; that of ``parametrize``, but faster in a group."""

    def get(self: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self.parametrizations[tensor_name]()
        parametrizations = self._modules["parametrizations"]._modules[tensor_name]
        if active.record is not None and len(parametrizations._modules) == 1:
            original = parametrizations._parameters.get("original")
            if original is not None:
                found = lookup(id(parametrizations._modules["0"]), original)
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
    cls = type(self)
    made_of = []
    while _KIND in cls.__dict__:
        made_of.append(cls.__dict__[_KIND])
        cls = cls.__bases__[0]
    reduced = cls.__reduce_ex__(self, protocol)
    if isinstance(reduced, str):
        return reduced
    constructor, arguments, *rest = reduced
    arguments = tuple(cls if argument is type(self) else argument for argument in arguments)
    parametrizations = self._modules.get("parametrizations")
    tensor_names = [] if parametrizations is None else list(parametrizations._modules)
    return (_rebuild, (made_of, tensor_names, constructor, arguments), *rest)


def _rebuild(made_of: list[str], tensor_names: list[str], constructor: Any, arguments: Any) -> Any:
    """Make the module that :func:`_reduce_ex` took apart; its state comes later."""
    module = constructor(*arguments)
    cls = type(module)
    for kind in reversed(made_of):
        cls = fused_class(cls) if kind == "fused" else _parametrized_class(cls, tensor_names)
    module.__class__ = cls
    return module
