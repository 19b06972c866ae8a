"""The weights in force: what an entered group has computed, on this thread, for its layers.

Entering a fused model pushes a :class:`Record` on the thread's stack; leaving it pops the record.
An access of a weight asks the stack first. A record knows its layers by the identity of their
parametrization modules and by the tensors that it was computed from. A copied layer, a layer that
was taken out of the group or a weight that was exchanged are therefore not found, and computed
alone.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..normalization import Results, refuse_changed
from .history import NO_REGIONS, Entry, Regions, forward_grad_enabled
from .sharded import ShardedResults, ShardedUnit

__all__ = [
    "Part",
    "Record",
    "Visible",
    "active",
    "hidden_saves",
    "in_force",
    "is_plain",
    "lookup",
    "serving",
]


# A computation, and the places of its layers.
Part = tuple[Results, Sequence[int]]


class Record:
    """The weights of one entry of a group.

    Args:
        index: the place of every parametrization in the lists below, by ``id``. The group keeps the
            parametrizations alive.
        weights: the tensors that the record was computed from.
        normalized: the normalized weights; None where the layer was not computed.
        parts: the computations that it was made of.
        recompute: computes one place again, without update, in the graph.
        finish: makes the weight of a place from what is attached to the graph.
        gains: the learned factors of the places, if any has one.
        sizes: the lengths of ``u`` and ``v`` of every place.
        regions: the checkpoints that were open.

    A unit whose weight was sharded is found by its parametrization alone: FSDP puts the whole weight into
    its place before the layer asks for it.
    """

    __slots__ = (
        "below",
        "detached",
        "finish",
        "gains",
        "index",
        "normalized",
        "of_compiled",
        "on_trial",
        "parts",
        "recompute",
        "regions",
        "sharded",
        "sizes",
        "weights",
    )
    below: "Record | None"  # the record that this one covers

    def __init__(
        self,
        index: dict[int, int],
        weights: list[Tensor],
        normalized: list[Tensor | None],
        parts: list[Part],
        recompute: Callable[[int], Tensor] | None,
        finish: Callable[[int, Tensor], Tensor] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        regions: Regions = NO_REGIONS,
        gains: Sequence[Tensor | None] = (),
    ) -> None:
        self.index = index
        self.weights = weights
        self.normalized = normalized
        self.parts = parts
        self.recompute = recompute
        self.finish = finish
        self.gains = gains
        self.sizes = sizes
        self.regions = regions
        # Computed without gradients: an access that wants them attaches its layer then.
        self.detached = not torch.is_grad_enabled()
        # Computed by code that torch.compile has made, which does not put it on the thread's stack.
        self.of_compiled = False
        # The vectors of layers whose hooks have not run yet, by place; their own have not advanced.
        self.on_trial: dict[int, tuple[Tensor, Tensor]] = {}
        self.sharded: dict[int, ShardedUnit] = {}
        for results, part in parts:
            if isinstance(results, ShardedResults):
                for place, unit in zip(part, results.units, strict=True):
                    self.sharded[place] = unit.of_a_forward()

    @property
    def entry(self) -> Entry | None:
        """The vectors that the weights were computed with; None if they are not known."""
        if self.sizes is None:
            return None
        saved = [
            (vectors, [part[i] for i in members])
            for results, part in self.parts
            for vectors, members in results.saved
        ]
        return Entry(self.index, saved, self.sizes)

    def normalized_of_shards(self, place: int, weight: Tensor) -> Tensor | None:
        """Return the weight of a unit that was sharded; None if another tensor is in its place."""
        unit = self.sharded[place]
        if weight.shape != unit.shape:
            return None
        finish = self.finish
        with hidden_saves():
            return unit.normalized(weight, lambda x: x if finish is None else finish(place, x))

    def wants_grad(self, place: int) -> bool:
        """Return whether the weight at ``place`` has a gradient where gradients are on."""
        gain = self.gains[place] if self.gains else None
        return self.weights[place].requires_grad or (gain is not None and gain.requires_grad)

    def attach(self, place: int) -> Tensor:
        """Give the layer at ``place`` a graph node of its own, and return its weight."""
        weight, attached, before = self.weights[place], None, self.normalized[place]
        if self.gains and self.gains[place] is not None and before is not None:
            refuse_changed(before, 0)  # the product with a gain
        with hidden_saves():
            for results, part in self.parts:
                if place in part and not results.normalized[part.index(place)].is_inference():
                    attached = results.attached(part.index(place), weight)
            if attached is None and self.recompute is not None:  # autograd must see the computation
                attached = self.recompute(place)
        assert attached is not None
        if self.finish is not None:
            attached = self.finish(place, attached)
        self.normalized[place] = attached
        return attached


class Visible:
    """The record of a group that compiled code sees: the last one, of whatever thread.

    ``torch.compile`` follows neither threads nor ``id``. Threads that share a model in training
    disturb each other there, as they do in stock; in evaluation they see the same weights.
    """

    def __init__(self) -> None:
        self.record: Record | None = None
        # Whether a forward of the model has come to its end.
        self.has_run = False


class _Active(threading.local):
    """The topmost record of a thread."""

    record: Record | None = None


active = _Active()


# Bound once: every access of every weight asks for them.
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
graph_task = torch._C._current_graph_task_id


def is_plain(record: Record | None, training: bool = True) -> bool:
    """Return whether no checkpoint can be open that was not when a weight was computed.

    Where gradients were off on entry, a reentrant one is not recomputed.

    Args:
        record: that of the weight; None to compute the layer alone, in ``training`` or in eval mode.
    """
    off = not training if record is None else record.detached and record.below is None
    return top_hooks(False) is None and graph_task() == -1 and (off or forward_grad_enabled())


def serving(record: Record | None, parametrization: int, weight: Tensor) -> Record | None:
    """Return the record that :func:`lookup` takes a weight from."""
    while record is not None:
        place = record.index.get(parametrization)
        if place is not None:
            if place in record.sharded:
                return record if weight.shape == record.sharded[place].shape else None
            if record.weights[place] is weight and record.normalized[place] is not None:
                return record
        record = record.below
    return None


def lookup(record: Record | None, parametrization: int, weight: Tensor) -> Tensor | None:
    """Return the weight in force for a parametrization; None to compute it alone.

    Args:
        record: the topmost record of this thread, ``active.record``.
        parametrization: ``id`` of the parametrization module.
        weight: the tensor to be normalized. A record holds for no other one.
    """
    while record is not None:
        place = record.index.get(parametrization)
        if place is not None and place in record.sharded:
            return record.normalized_of_shards(place, weight)
        if place is not None and record.weights[place] is weight:
            normalized = record.normalized[place]
            if normalized is not None:
                # The cheap questions first: this is asked for every access of every weight.
                if not record.detached or not torch.is_grad_enabled():
                    return normalized
                if normalized.requires_grad or not record.wants_grad(place):
                    return normalized
                return record.attach(place)
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
