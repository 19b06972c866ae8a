"""What a group keeps from one forward to the next, for ``update="step"`` and ``"manual"``.

The weights are computed again when one of them, or of the vectors, has changed. In-place operations
count up a tensor's version, and a new memory shows by its address. Optimizers may do neither: fused
ones, and those that write to ``.data``. A hook that torch calls after every step of any optimizer tells
the groups which parameters it has.

A weight that FSDP gathers has another memory each time and a version that says nothing. It changes with
its shards: by a step of an optimizer, or together with the vectors by a checkpoint.
"""

import weakref
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .active import Part
from .parametrization import SpectralNorm
from .plan import Plan, UnitTensors
from .sharded import local_part

__all__ = ["Kept", "Update", "is_capturing", "watch_optimizers"]

Update = Literal["forward", "step", "manual"]
"""When a group computes: in every forward, once between two changes of a weight, or when it is told."""


class Kept:
    """A computation of all units without gradient, of a forward in training.

    A forward in evaluation keeps nothing and takes nothing that was kept: averaged weights are swapped in
    through ``weight.data`` for it, and nothing shows that.

    Args:
        plan, tensors: what was computed.
        updated: for each unit whether ``u`` and ``v`` were advanced.
        parts: the results.
        dtype: that of the weights under autocast, if it was heeded.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: UnitTensors,
        updated: list[bool],
        parts: list[Part],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.parts = parts
        self._dtype = dtype
        self._plan, self._updated = plan, updated
        self._state = _state_of(plan, tensors)
        self._outputs = [y for results, _ in parts for y in results.normalized if y is not None]
        self._versions = [y._version for y in self._outputs]
        self._attachable = {
            part[i]
            for results, part in parts
            for _, members in results.computations
            for i in members
        }

    def serves(
        self, plan: Plan, tensors: UnitTensors, wanted: list[bool], dtype: torch.dtype | None = None
    ) -> bool:
        """Return whether nothing has changed, and all that want an update have had it."""
        return (
            plan is self._plan
            and dtype == self._dtype
            and self._state is not None
            and _state_of(plan, tensors) == self._state
            and self._versions == [y._version for y in self._outputs]
            and not any(w and not u for w, u in zip(wanted, self._updated, strict=True))
        )

    def renew(self, norm: SpectralNorm) -> None:
        """Take the vectors of a layer itself for the copies that it had on trial."""
        place = self._plan.index.get(id(norm))
        if place is None or self._state is None:
            return
        if norm._u.is_inference() or norm._v.is_inference():
            self._state = None
        else:
            self._state[1][place], self._state[2][place] = map(_trace_of, (norm._u, norm._v))

    def can_attach(self, place: int) -> bool:
        """Return whether a unit can get a graph node without being computed again."""
        return place in self._attachable


# The version and the address of a tensor; None where they say nothing.
_Trace = tuple[int, int] | None


def _state_of(plan: Plan, tensors: UnitTensors) -> list[list[_Trace]] | None:
    """Return what shows a change of weights, ``u`` and ``v``; None where nothing would."""
    state = []
    for column, gathered in ((tensors.weights, plan.gathered), (tensors.us, ()), (tensors.vs, ())):
        traces: list[_Trace] = []
        for unit, tensor in enumerate(column):
            if tensor is None or unit in gathered:
                traces.append(None)
                continue
            tensor = local_part(tensor)
            if tensor.is_inference():  # has no version
                return None
            traces.append(_trace_of(tensor))
        state.append(traces)
    return state


def _trace_of(tensor: Tensor) -> _Trace:
    return tensor._version, tensor.data_ptr()


def is_capturing(device: torch.device) -> bool:
    """Return whether what is computed on a device now is captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Watcher(Protocol):
    """What is told of the steps of optimizers."""

    def stepped(self, parameters: set[int]) -> None:
        """Know that an optimizer has made a step; it gets the ``id`` of each of its parameters."""


_groups: "weakref.WeakSet[Watcher]" = weakref.WeakSet()
_handle: Any = None


def watch_optimizers(group: Watcher) -> None:
    """Tell a group of all steps of optimizers from now on."""
    global _handle
    _groups.add(group)
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _groups:
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for group in list(_groups):
            group.stepped(parameters)
