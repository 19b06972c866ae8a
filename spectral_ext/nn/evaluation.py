"""Modules in evaluation for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.nn import Module

__all__ = ["in_evaluation"]


@contextmanager
def in_evaluation(modules: Iterable[Module]) -> Iterator[None]:
    """Switch modules to evaluation, without ``eval()``, which a model may have made its own."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
