"""Which layers a call means: regular expressions and predicates."""

import re
from collections.abc import Callable

from torch.nn import Module

__all__ = ["Selector", "check_selector", "is_selected"]

Selector = str | re.Pattern[str] | Callable[[str, Module], bool]


def check_selector(argument: str, selector: Selector | None) -> None:
    """Raise unless ``selector`` is one; ``argument`` is its name."""
    if isinstance(selector, str):
        try:
            re.compile(selector)
        except re.error as error:
            message = f"{argument}={selector!r} is no regular expression: {error}"
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
