"""The weights in force: what an entered group has computed, on this thread, for its layers.

Entering a fused model pushes a :class:`Record` on the thread's stack; leaving it pops the record.
An access of a weight asks the stack first. A record knows its layers by the identity of their
parametrization modules and by the tensors that it was computed from. A copied layer, a layer that
was taken out of the group or a weight that was exchanged are therefore not found, and computed
alone.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..functional import Results

__all__ = ["Part", "Record", "active", "hidden_saves", "in_force", "lookup"]


# A computation, and the places of its layers.
Part = tuple[Results, list[int]]


class Record:
    """The weights of one entry of a group.

    Args:
        index: the place of every parametrization in the lists below, by ``id``. The group keeps the
            parametrizations alive.
        weights: the tensors that the record was computed from.
        normalized: the normalized weights; None where the layer was not computed.
        parts: the computations that it was made of.
        recompute: computes one place again, without update, in the graph.
    """

    __slots__ = ("below", "detached", "index", "normalized", "parts", "recompute", "weights")
    below: "Record | None"  # the record that this one covers

    def __init__(
        self,
        index: dict[int, int],
        weights: list[Tensor],
        normalized: list[Tensor | None],
        parts: list[Part],
        recompute: Callable[[int], Tensor],
    ) -> None:
        self.index = index
        self.weights = weights
        self.normalized = normalized
        self.parts = parts
        self.recompute = recompute
        # Computed without gradients: an access that wants them attaches its layer then.
        self.detached = not torch.is_grad_enabled()

    def attach(self, place: int) -> Tensor:
        """Give the layer at ``place`` a graph node of its own, and return its weight."""
        weight, attached = self.weights[place], None
        with hidden_saves():
            for results, part in self.parts:
                if place in part and not results.normalized[part.index(place)].is_inference():
                    attached = results.attached(part.index(place), weight)
            if attached is None:  # autograd must see the computation
                attached = self.recompute(place)
        self.normalized[place] = attached
        return attached


class _Active(threading.local):
    """The topmost record of a thread."""

    record: Record | None = None


active = _Active()


def lookup(parametrization: int, weight: Tensor) -> Tensor | None:
    """Return the weight in force for a parametrization, given by ``id``; None to compute it alone.

    Args:
        parametrization: ``id`` of the parametrization module.
        weight: the tensor to be normalized. The record holds for no other one.
    """
    record = active.record
    while record is not None:
        place = record.index.get(parametrization)
        if place is not None and record.weights[place] is weight:
            normalized = record.normalized[place]
            if normalized is not None:
                if (
                    record.detached
                    and weight.requires_grad
                    and torch.is_grad_enabled()
                    and not normalized.requires_grad
                ):
                    return record.attach(place)
                return normalized
        record = record.below
    return None


@contextmanager
def in_force(record: Record) -> Iterator[None]:
    """Put a record in force on this thread."""
    record.below = below = active.record
    try:
        active.record = record
        yield
    finally:
        active.record = below


@contextmanager
def hidden_saves() -> Iterator[None]:
    """Keep saved tensors from the hooks that are in force.

    Activation checkpointing counts what a block saves in the forward and in the recomputation. A
    weight is computed before the block in the one and inside of it in the other.
    """
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield
