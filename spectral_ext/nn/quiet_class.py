"""Subclasses that are made at run time, without a call of the user's code.

``__init_subclass__`` and a metaclass may register every subclass, require a keyword or refuse a second class
of one name. The classes that we make are none of the user's, and making them must not fail half way.
"""

import abc
from typing import Any

from torch.nn import Module
from torch.nn.utils import parametrize

__all__ = ["class_of_stock", "quiet_class", "subclass"]


class _Quiet:
    """The first base of a class while it is made, in front of bases that listen to it."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        pass


def quiet_class(name: str, bases: tuple[type[Any], ...], body: dict[str, Any]) -> type[Any]:
    """Make a class without a call of ``__init_subclass__`` or of the user's metaclass."""
    kinds = [type(base) for base in bases]
    kind = next(k for k in kinds if all(issubclass(k, other) for other in kinds))
    new = abc.ABCMeta.__new__ if issubclass(kind, abc.ABCMeta) else type.__new__
    cls = new(kind, name, (_Quiet, *bases), body)
    type.__dict__["__bases__"].__set__(cls, bases)
    return cls


def subclass(base: type[Any], body: dict[str, Any]) -> type[Any]:
    """Make a subclass that has the names of its base."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return quiet_class(base.__name__, (base,), names | body)


def class_of_stock(base: type[Module]) -> type[Any]:
    """Return the class that ``parametrize`` makes for a module."""
    stand_in = Module()
    parametrize._inject_new_class(stand_in)
    body = {
        key: value
        for key, value in type(stand_in).__dict__.items()
        if key in ("__module__", "__getstate__", "__deepcopy__")
    }
    if hasattr(base, "__deepcopy__"):
        body.pop("__deepcopy__", None)
    return quiet_class(f"Parametrized{base.__name__}", (base,), body)
