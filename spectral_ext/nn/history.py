"""The vectors of the last forwards, for blocks that activation checkpointing computes again.

A checkpointed block runs a second time in the backward, long after the forward of its model. By then
``u`` and ``v`` may have gone on. What the block saw is found by number: autograd numbers its nodes, and
the block that is computed again belongs to the last forward that began before the node that needs it.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Entry", "History"]

# Forwards that wait for their backward. Each holds the vectors of its layers, which are small.
_LENGTH = 8


class Entry(NamedTuple):
    """One forward in training."""

    number: int
    """Of the first node that may belong to it."""
    places: Mapping[int, int]
    """The place of each layer, by ``id`` of its parametrization."""
    saved: Sequence[tuple[Tensor, Sequence[int]]]
    """Flat ``u`` and ``v`` of native calls, each with the places of its layers."""
    sizes: Sequence[tuple[int, int]]
    """Of ``u`` and ``v`` of the layer at each place."""

    def vectors(self, parametrization: int) -> tuple[Tensor, Tensor] | None:
        """Return ``u`` and ``v`` of a layer; None if they were not kept."""
        return self.vectors_at(self.places.get(parametrization, -1))

    def vectors_at(self, place: int) -> tuple[Tensor, Tensor] | None:
        """Return the same by the place of the layer."""
        for saved, members in self.saved:
            if place in members:
                before = [self.sizes[i] for i in members[: members.index(place)]]
                begin = sum(map(sum, before))
                rows, columns = self.sizes[members[len(before)]]
                return saved[begin : begin + rows], saved[begin + rows : begin + rows + columns]
        return None


class History:
    """The last forwards of a layer or of a group."""

    def __init__(self) -> None:
        self._entries: deque[tuple[Any, ...]] = deque(maxlen=_LENGTH)

    def add(
        self,
        places: Mapping[int, int],
        saved: Sequence[tuple[Tensor, Sequence[int]]],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Note a forward, before any node of what comes after it."""
        number = torch._C._autograd._get_sequence_nr()
        if not torch.is_grad_enabled():
            number -= 1  # of a reentrant checkpoint, whose node is made before its block runs
        self._entries.append((number, places, saved, sizes))  # a plain tuple: in every forward

    def find(self) -> Entry | None:
        """Return the forward that the node in work belongs to."""
        node = torch._C._current_autograd_node()
        number = None if node is None else node._sequence_nr()
        for entry in reversed(self._entries):
            if number is None or entry[0] <= number:
                return Entry(*entry)
        return None
