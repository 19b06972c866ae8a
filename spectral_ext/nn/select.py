"""Which layers a call selects: types, regular expressions and predicates."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch.jit import ScriptModule
from torch.nn import Module

__all__ = [
    "Selector",
    "check_module",
    "check_name",
    "check_selector",
    "checked_types",
    "is_selected",
]

Selector = str | re.Pattern[str] | Callable[[str, Module], bool]


def check_module(argument: str, module: Any) -> None:
    """Raise TypeError unless ``module`` is a module that can be changed; ``argument`` is its name."""
    if not isinstance(module, Module):
        raise TypeError(f"{argument} must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, ScriptModule):
        raise TypeError(
            f"{argument} is a {type(module).__name__}, which torch.jit has compiled; apply the "
            "spectral norm before torch.jit.script or torch.jit.trace"
        )


def check_name(name: Any) -> None:
    """Raise TypeError unless ``name`` can be that of a tensor of a module."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")


def checked_types(types: Any) -> tuple[type[Module], ...]:
    """Return the types of layers as a tuple, or raise TypeError."""
    found = (types,) if isinstance(types, type) else types
    is_sequence = isinstance(found, Sequence) and not isinstance(found, str)
    if not is_sequence or not all(isinstance(each, type) for each in found):
        raise TypeError(
            f"types must be a class of modules or a sequence of them, got {types!r:.60}"
        )
    return tuple(found)


def check_selector(argument: str, selector: Selector | None) -> None:
    """Raise unless ``selector`` is one; ``argument`` is its name."""
    if isinstance(selector, str):
        try:
            re.compile(selector)
        except re.error as error:
            message = f"{argument}={selector!r} is not a regular expression: {error}"
            raise ValueError(message) from error
    elif not (selector is None or isinstance(selector, re.Pattern) or callable(selector)):
        raise TypeError(
            f"{argument} must be a regular expression or a predicate of name and module, "
            f"got {type(selector).__name__}"
        )


def is_selected(
    include: Selector | None, exclude: Selector | None, name: str, tensor_name: str, module: Module
) -> bool:
    """Return whether ``include`` selects a tensor, if given, and ``exclude`` does not."""
    return (include is None or _selects(include, name, tensor_name, module)) and not (
        exclude is not None and _selects(exclude, name, tensor_name, module)
    )


def _selects(selector: Selector, name: str, tensor_name: str, module: Module) -> bool:
    if isinstance(selector, (str, re.Pattern)):
        qualified_name = f"{name}.{tensor_name}" if name else tensor_name
        return any(re.search(selector, text) is not None for text in (name, qualified_name))
    return bool(selector(name, module))
