"""What ``torch.nn.utils.parametrize.cached()`` means for a group.

Inside of it a parametrization is computed once, however often and in however many forwards it is
used.
"""

from torch import Tensor
from torch.nn.utils import parametrize

from .dynamic_class import refuse_to_trace_what_is_cached
from .plan import Plan

__all__ = ["put_into_cache", "take_from_cache"]


def take_from_cache(plan: Plan, normalized: list[Tensor | None]) -> list[int]:
    """Fill in the weights that are cached; return the places that are still to compute."""
    refuse_to_trace_what_is_cached()
    known: set[int] = set()
    for layer, unit in zip(plan.layers, plan.unit_of_layer, strict=True):
        cached = parametrize._cache.get((id(layer.module), layer.tensor_name))
        if cached is not None:
            known.add(unit)
            if layer.is_alone():  # else it is the end of the stack, and not our part of it
                normalized[unit] = cached
    return [unit for unit in range(len(normalized)) if unit not in known]


def put_into_cache(plan: Plan, normalized: list[Tensor | None]) -> None:
    """Keep the weights beyond this forward."""
    for layer, unit in zip(plan.layers, plan.unit_of_layer, strict=True):
        if layer.is_alone() and normalized[unit] is not None:
            key = (id(layer.module), layer.tensor_name)
            parametrize._cache.setdefault(key, normalized[unit])
