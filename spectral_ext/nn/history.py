"""The vectors that checkpointed forwards used, for their recomputation.

Activation checkpointing runs a block a second time in the backward. By then ``u`` and ``v`` may have
advanced, and the recomputation must use the ones of its own forward. What a forward used is therefore
noted on the object of the checkpoint that autograd keeps as long as the graph: the frame of a
non-reentrant checkpoint, or the ``ctx`` of a reentrant one. The notes are in the order of use, and the
recomputation, which repeats the forward, reads them in that order. Without a checkpoint nothing is kept.

Which checkpoints are open is read from autograd's state:

- A non-reentrant checkpoint puts saved-tensor hooks in force, one kind for the forward and another for
  the recomputation. Both lead to its frame.
- A reentrant checkpoint is a ``torch.autograd.Function`` with "checkpoint" or "recompute" in its name, as
  in PyTorch, DeepSpeed, FairScale and Megatron. Its ``forward`` is found on the stack, where
  gradients of forward mode are off. In the recomputation it is the node that autograd evaluates.

Everything else that runs in a backward, such as the right-hand side of an adjoint solver, is an ordinary
forward, which advances ``u`` and ``v`` as it does in PyTorch.
"""

import inspect
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.utils import parametrize
from torch.utils import checkpoint

from ..normalization import is_traced

__all__ = ["NO_REGIONS", "Entry", "Notes", "Regions", "forward_grad_enabled", "open_regions"]

_NAMES = ("checkpoint", "recompute")
# False in the forward of an ``autograd.Function``, and in ``inference_mode``.
forward_grad_enabled = torch._C._is_fwd_grad_enabled
# Where the notes are kept, in the frame or in the ``ctx``.
_ATTRIBUTE = "_spectral_ext_notes"


class Entry(NamedTuple):
    """The vectors of one computation."""

    places: Mapping[int, int]
    """The place of each layer, by ``id`` of its parametrization."""
    saved: Sequence[tuple[Tensor, Sequence[int]]]
    """Flat ``u`` and ``v`` of native calls, each with the places of its layers."""
    sizes: Sequence[tuple[int, int]]
    """The lengths of ``u`` and ``v`` of the layer at each place."""
    is_in_force: bool = False
    """Whether a layer took the weight that its group had in force: all its uses there have these vectors."""

    def vectors(self, parametrization: int) -> tuple[Tensor, Tensor] | None:
        """Return ``u`` and ``v`` of a layer; None if they were not kept."""
        place = self.places.get(parametrization, -1)
        for saved, members in self.saved:
            if place in members:
                before = [self.sizes[i] for i in members[: members.index(place)]]
                begin = sum(map(sum, before))
                rows, columns = self.sizes[members[len(before)]]
                return saved[begin : begin + rows], saved[begin + rows : begin + rows + columns]
        return None

    def vectors_again(self, parametrization: Any) -> tuple[Tensor, Tensor] | None:
        """Return ``u`` and ``v`` of a layer for its recomputation; None if it has none.

        Raises:
            RuntimeError: the forward took the weight from ``parametrize.cached()``.
        """
        found = self.vectors(id(parametrization))
        if found is not None or parametrization.is_vector or is_traced():
            return found
        if not parametrize._cache_enabled:  # inside of it u and v have not moved
            raise RuntimeError(
                f"{parametrization.label}: the forward of a checkpoint took this weight from "
                f"parametrize.cached(), and the u and v that it was computed with are not known; {_ADVICE}"
            )
        return found


_ADVICE = "call backward() inside of parametrize.cached() too"


class Notes:
    """What the forward of one checkpoint used.

    Args:
        complete: whether every use is noted. Under a reentrant checkpoint a layer in eval mode is not.
    """

    __slots__ = ("_complete", "_entries", "_next", "_token")

    def __init__(self, complete: bool) -> None:
        self._complete = complete
        self._entries: dict[Any, list[Entry]] = {}
        self._token: Any = None
        self._next: dict[Any, int] = {}

    def add(self, owner: Any, entry: Entry) -> None:
        """Note what a layer or a group used."""
        self._entries.setdefault(owner, []).append(entry)

    def next(self, owner: Any, token: Any) -> Entry | None:
        """Return what a layer or a group used at this point of the forward.

        Args:
            owner: the layer or the group.
            token: equal within one recomputation; another one starts from the first entry.

        Raises:
            RuntimeError: the forward has not used the layer as often, and each use advanced ``u`` and ``v``.
        """
        if token != self._token:
            self._token, self._next = token, {}
        entries, place = self._entries.get(owner, ()), self._next.get(owner, 0)
        if place < len(entries):
            self._next[owner] = place + 1
            return entries[place]
        if entries and entries[-1].is_in_force:  # a second access of the same weight
            return entries[-1]
        if not entries and not self._complete:
            return None
        raise RuntimeError(
            f"{owner.label}: the recomputation of a checkpoint computes this weight more often than its "
            f"forward did ({len(entries)} times), so that the u and v of that forward are not known; "
            f"run the same code both times; if the forward ran inside of parametrize.cached(), {_ADVICE}"
        )


class _Region(NamedTuple):
    """An open checkpoint."""

    notes: Notes
    token: Any
    """None in the forward; else what tells this recomputation from others."""


class Regions(NamedTuple):
    """The open checkpoints that matter to a computation."""

    replayed: _Region | None
    """The innermost one that is recomputed."""
    recorded: Sequence[_Region]
    """Those inside of it that are in their forward."""

    def replay(self, owner: Any) -> Entry | None:
        """Return what the forward that is recomputed used; see :meth:`Notes.next`."""
        assert self.replayed is not None
        return self.replayed.notes.next(owner, self.replayed.token)

    def note(self, owner: Any, entry: Entry, known: Sequence[_Region] = ()) -> None:
        """Note a use in all checkpoints that are in their forward, but for those in ``known``."""
        for region in self.recorded:
            if region not in known:
                region.notes.add(owner, entry)


NO_REGIONS = Regions(None, ())


def open_regions() -> Regions:
    """Return the open checkpoints of this thread.

    Raises:
        RuntimeError: the checkpoint is of a kind that is not known.
    """
    of_hooks = [region for region in map(_region_of_hook, _pack_hooks()) if region is not None]
    last = max((i for i, region in enumerate(of_hooks) if region.token is not None), default=-1)
    replayed = of_hooks[last] if last >= 0 else None
    task = torch._C._current_graph_task_id()
    if task != -1:
        node = torch._C._current_autograd_node()
        if _is_checkpoint(node) and (replayed is None or _is_innermost(node)):
            replayed = _Region(_notes_of(node, False), task)
    recorded = of_hooks[last + 1 :]
    if not forward_grad_enabled():
        recorded += [_Region(_notes_of(ctx, False), None) for ctx in _contexts()]
    return Regions(replayed, recorded) if recorded or replayed else NO_REGIONS


def _notes_of(holder: Any, complete: bool) -> Notes:
    notes: Notes | None = getattr(holder, _ATTRIBUTE, None)
    if notes is None:
        notes = Notes(complete)
        setattr(holder, _ATTRIBUTE, notes)
    return notes


def _pack_hooks() -> list[Any]:
    """Return the hooks that pack saved tensors, the ones that were put in force first in front."""
    autograd = torch._C._autograd
    if autograd._top_saved_tensors_default_hooks(False) is None:
        return []
    if not autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return [autograd._top_saved_tensors_default_hooks(False)[0]]  # could not be put back
    found: list[Any] = []
    try:  # only the top can be read
        while (top := autograd._top_saved_tensors_default_hooks(False)) is not None:
            found.append(top)
            autograd._pop_saved_tensors_default_hooks()
    finally:
        for hooks in reversed(found):
            autograd._push_saved_tensors_default_hooks(*hooks)
    return [pack for pack, _ in reversed(found)]


def _region_of_hook(pack: Any) -> _Region | None:
    """Return the checkpoint that a hook belongs to; None if the hook has nothing to do with one."""
    module = getattr(pack, "__module__", None)
    if module != checkpoint.__name__ and "checkpoint" not in getattr(pack, "__qualname__", ""):
        return None
    for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
        frame = cell.cell_contents
        token = pack if isinstance(frame, weakref.ref) else None
        frame = frame() if isinstance(frame, weakref.ref) else frame
        if isinstance(frame, checkpoint._CheckpointFrame):
            return _Region(_notes_of(frame, True), token)
    raise RuntimeError(
        f"spectral_ext does not know the activation checkpointing of {module}, and cannot find "
        "the u and v that a recomputation must use; use torch.utils.checkpoint"
    )


def _is_checkpoint(node: Any) -> bool:
    if not isinstance(node, BackwardCFunction):
        return False
    name = type(node).__name__.lower()
    return any(word in name for word in _NAMES)


def _is_innermost(node: Any) -> bool:
    """Return whether the backward of a checkpoint runs inside of another one's recomputation.

    Otherwise the other one is recomputed for the tensors that the backward of the first one needs.
    """
    for name, first in _functions():
        if name == "unpack_hook" or first is node:
            return first is node
    return True


def _contexts() -> list[Any]:
    """Return the ``ctx`` of the checkpoints whose forward is on the stack."""
    return [ctx for name, ctx in _functions() if name == "forward" and _is_checkpoint(ctx)]


_FUNCTIONS = ("forward", "backward", "unpack_hook")
_ENGINE = torch.autograd.graph._engine_run_backward.__code__


def _functions() -> Iterator[tuple[str, Any]]:
    """Yield the functions on the stack that may belong to a checkpoint: name and first argument.

    The innermost comes first. What called the backward that now runs does not matter to it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in _FUNCTIONS and code.co_argcount:
            name = code.co_varnames[0]
            if name != "self":  # that of a module
                yield code.co_name, frame.f_locals.get(name)
        elif code is _ENGINE:
            return
        frame = frame.f_back  # type: ignore[assignment]
