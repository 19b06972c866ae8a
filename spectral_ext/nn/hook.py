"""The forward pre-hook of a fused layer that came with PyTorch's hook ``torch.nn.utils.spectral_norm``.

PyTorch's hook computes a weight once for each call of its module, before the call, and leaves it there as
an attribute. Code that reads the attribute gets the weight of the last call, and before the first call the
raw weight. So does code that reads the weight of a layer whose module is never called: attention reads
``out_proj.weight`` itself, and the hook of ``out_proj`` never runs.

A fused layer keeps all of this. Its hook takes the weight that the group has computed, or computes the
layer alone. On entry the group computes the layers whose hooks have run before. A layer whose hook has not
run yet is on trial: the group advances copies of its ``u`` and ``v``, and its hook takes them over. The hook
of the root itself runs before the root enters its group, and leaves the weight to that entry.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module, Parameter
from torch.nn.utils.parametrize import ParametrizationList

from ..normalization import is_traced
from .active import Record, active, hidden_saves, is_plain, serving, top_hooks
from .dynamic_class import GROUP, parametrization_lists, take_off, unwrap
from .parametrization import LastWeight, Owner, SpectralNorm, StockHook
from .sharded import is_sharded

__all__ = ["GroupHook", "leave_groups"]


class GroupHook(StockHook):
    """PyTorch's hook, for a weight that is a parametrization and may be computed by a group.

    Code that looks for PyTorch's hook finds it, and ``torch.nn.utils.remove_spectral_norm`` removes it.
    Copies of a module that share its hooks (``DataParallel``) share what this one knows; the weight of the
    last call is in the parametrization, of which each copy has its own.

    Args:
        hook: the hook that it replaces.
    """

    def __init__(self, hook: StockHook) -> None:
        super().__init__(hook.name, hook.n_power_iterations, hook.dim, hook.eps)
        # Whether the module was ever called, as far as this hook knows.
        self.called = False
        # Whether it stays in the module when its parametrization is removed; PyTorch removes it itself
        # in remove_spectral_norm.
        self.is_left_behind = True

    def __call__(self, module: Module, inputs: Any) -> None:
        """Take the weight in force, or compute the layer alone, and keep it until the next call."""
        found = self._find(module)
        if found is None:
            return  # the parametrization was removed
        list_, norm = found
        weight = _original(list_)
        if _is_root(module, norm):
            norm._last_weight = None  # the forward, which comes next, computes it and keeps it
        elif is_dynamo_compiling():
            is_in_force = norm._visible_weight(weight) is not None
            if not self.called and is_in_force:
                _take_vectors(norm, norm._visible.record.on_trial.get(norm._place))  # type: ignore[union-attr]
            normalized = norm(weight)
            # What compiled code keeps is an output of its graph; so it keeps only what is not in force.
            norm._last_weight = None if is_in_force else LastWeight(normalized)
        else:
            self.give_settings(norm, weight)
            if not self.called:
                _end_trial(norm, weight)
            in_force = norm._weight_in_force(weight)
            if in_force is None or not is_plain(cast(Record, active.record)):
                in_force = norm(weight)  # alone, or as a checkpoint has to note it
            self.keep(list_, in_force)
        self.called = True

    def give_settings(self, norm: SpectralNorm, weight: Tensor) -> None:
        """Let the parametrization have the settings that were assigned to this hook."""
        norm.__dict__["n_power_iterations"], norm.__dict__["eps"] = (
            self.n_power_iterations,
            self.eps,
        )
        norm.__dict__["dim"] = self.dim % weight.ndim if -weight.ndim <= self.dim < 0 else self.dim

    @staticmethod
    def keep(list_: ParametrizationList, normalized: Tensor | None) -> None:
        """Keep the weight of a call, where it may be kept."""
        may_keep = normalized is not None and not (
            is_traced() or is_sharded(_original(list_)) or _is_gathered(list_)
        )
        last = LastWeight(cast(Tensor, normalized)) if may_keep else None
        list_._modules["0"].__dict__["_last_weight"] = last

    def read(self, module: Module) -> Tensor:
        """Return what an access of the weight gives."""
        list_, norm = cast("tuple[ParametrizationList, SpectralNorm]", self._find(module))
        weight = _original(list_)
        found = norm._weight_in_force(weight)
        if found is not None and (self.called or found is weight):
            if not is_dynamo_compiling() and not is_plain(cast(Record, active.record)):
                found = norm(weight)  # what a checkpoint reads is noted
        else:
            last = norm._last_weight
            if last is not None:
                found = last.weight
            else:
                found = _without_update(norm, weight) if self.called else weight.detach()
        if len(list_) > 1:
            for parametrization in list(list_)[1:]:
                found = parametrization(found)
        return found

    def assign(self, module: Module, value: Tensor) -> None:
        """Take a tensor that is assigned to the weight; it stays until the next call."""
        _, norm = cast("tuple[ParametrizationList, SpectralNorm]", self._find(module))
        norm._last_weight = LastWeight(value)

    def remove(self, module: Module) -> None:
        """Take the norm off and leave the normalized weight as a parameter, as PyTorch's hook does."""
        list_, norm = cast("tuple[ParametrizationList, SpectralNorm]", self._find(module))
        self.is_left_behind = False
        with torch.no_grad():
            weight = _without_update(norm, list_.original)
        leave_groups([norm])
        take_off(module, self.name)
        module.register_parameter(self.name, Parameter(weight.detach()))

    def _find(self, module: Module) -> tuple[ParametrizationList, SpectralNorm] | None:
        """Return the parametrizations of the tensor, and the one that came with this hook."""
        if is_dynamo_compiling():
            traced = cast("dict[str, Any]", module.parametrizations)[self.name]
            return traced, traced[0]
        list_ = parametrization_lists(module).get(self.name)
        norm = None if list_ is None else list_._modules.get("0")
        return (list_, norm) if isinstance(norm, SpectralNorm) else None  # type: ignore[return-value]


def leave_groups(norms: Iterable[SpectralNorm]) -> None:
    """Remove layers from their groups; give a model its class back when no layer is left."""
    groups: dict[Owner, list[SpectralNorm]] = {}
    for norm in norms:
        group = None if norm._group is None else norm._group()
        if group is not None:
            groups.setdefault(group, []).append(norm)
    for group, members in groups.items():
        group.release(members)
        root = group.root
        if root is not None and not group.registered and root.__dict__.get(GROUP) is group:
            unwrap(root)


def _is_root(module: Module, norm: SpectralNorm) -> bool:
    """Return whether a module is the root of its layer's group: its hook runs before it enters the group."""
    group = module.__dict__.get(GROUP)
    return group is not None and norm._visible is group.visible


def _original(list_: ParametrizationList) -> Tensor:
    if is_dynamo_compiling():
        return list_.original
    weight = list_._parameters.get("original")  # without a search for the attribute
    return list_.original if weight is None else weight


def _is_gathered(list_: ParametrizationList) -> bool:
    return bool(list_.__dict__.get("_is_fsdp_managed_module"))


def _end_trial(norm: SpectralNorm, weight: Tensor) -> None:
    """Give a layer the vectors of the forward that it is called in."""
    record = serving(active.record, id(norm), weight)  # of a shard, too, whose weight is whole now
    if record is None:
        record = norm.record_of_compiled
        if record is not None:
            _take_vectors(norm, record.on_trial.get(norm._place))
        return
    _take_vectors(norm, record.on_trial.pop(record.index[id(norm)], None))
    group = None if norm._group is None else norm._group()
    if group is not None:
        group.trial_ended(norm)


def _take_vectors(norm: SpectralNorm, vectors: tuple[Tensor, Tensor] | None) -> None:
    if vectors is not None:
        with torch.no_grad():
            norm._u.copy_(vectors[0])
            norm._v.copy_(vectors[1])


def _without_update(norm: SpectralNorm, weight: Tensor) -> Tensor:
    """Compute a layer alone with the vectors that it has."""
    if is_dynamo_compiling() or top_hooks(False) is None:
        return norm._compute(weight, False)[0]
    with hidden_saves():
        return norm._compute(weight, False)[0]
