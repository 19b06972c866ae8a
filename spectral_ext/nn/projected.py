"""Which weights a projection takes: of a model or of a list, with their dimensions, or why not."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from ..validation import check_weight, refuse_sharded
from .apply import LAYER_TYPES
from .dynamic_class import parametrization_lists
from .parametrization import default_dim
from .select import Selector, is_selected

__all__ = ["projectable", "weights_of_model", "weights_of_parameters"]

# Name, parameter, and the dimension that counts the outputs; None where a parameter does not tell.
Found = tuple[str, Tensor, int | None]


def weights_of_model(
    model: Module,
    types: tuple[type[Module], ...],
    include: Selector | None,
    exclude: Selector | None,
    name: str,
    skipped: dict[str, str],
) -> Iterator[Found]:
    """Yield the selected weights of a model; say in ``skipped`` why others were not."""
    for module_name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{module_name or 'the model'}: torch.jit has compiled this module and hides its "
                "layers; pass model.named_parameters() instead"
            )
        weight = module._parameters.get(name)
        # A hook leaves its result among the plain attributes.
        is_computed = name in parametrization_lists(module) or isinstance(
            module.__dict__.get(name), Tensor
        )
        if weight is None and not is_computed:
            continue
        qualified_name = f"{module_name}.{name}" if module_name else name
        if not isinstance(module, types):
            skipped[qualified_name] = f"{type(module).__name__} is not among the types"
        elif not is_selected(include, exclude, module_name, name, module):
            skipped[qualified_name] = "excluded"
        elif weight is None:
            raise ValueError(
                f"{qualified_name}: a parametrization or a hook, such as a spectral norm, computes "
                "this weight; it cannot be projected, leave it out with exclude"
            )
        else:
            is_known = isinstance(module, LAYER_TYPES)
            yield qualified_name, weight, _dim_of(weight, default_dim(module), is_known)


def weights_of_parameters(weights: Any) -> Iterator[Found]:
    """Yield parameters by the names that they came with, or by their positions."""
    if isinstance(weights, Tensor) or not isinstance(weights, Iterable):
        raise TypeError(
            "weights must be a torch.nn.Module, or parameters or pairs of name and parameter, "
            f"got {type(weights).__name__}"
        )
    for position, item in enumerate(weights):
        is_named = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        name, weight = item if is_named else (str(position), item)
        yield name, weight, _dim_of(weight, 0, False)


def _dim_of(weight: Any, default: int, is_known: bool) -> int | None:
    """Return ``default``, or None where a 3-D parameter may be a kernel or a stack of matrices."""
    is_unclear = not is_known and isinstance(weight, Tensor) and weight.ndim == 3
    return None if is_unclear else default


def projectable(
    found: Iterable[Found], dim: int | None, skipped: dict[str, str]
) -> dict[str, tuple[Tensor, int]]:
    """Return weights and their ``dim`` by name; say in ``skipped`` why others are left out."""
    chosen: dict[str, tuple[Tensor, int]] = {}
    known: dict[int, str] = {}
    for name, weight, default in found:
        if name in chosen or name in skipped:
            raise ValueError(f"{name}: two parameters have this name")
        reason = _obstacle(weight)
        if id(weight) in known:
            reason = f"the same parameter as {known[id(weight)]}"
        if reason is not None:
            skipped[name] = reason
            continue
        refuse_sharded(name, weight)
        wanted = default if dim is None else dim
        if wanted is None:
            raise ValueError(
                f"{name}: a parameter of shape {tuple(weight.shape)} may be the kernel of a convolution, "
                "which is one matrix, or a stack of matrices, such as experts, which cannot be projected "
                "one by one; pass dim to project it as one matrix, or leave it out"
            )
        of_weight = check_weight(name, weight, wanted)
        if not weight.is_leaf:
            raise ValueError(f"{name}: it is the result of a computation and not a parameter")
        if not weight.isfinite().all():
            raise ValueError(f"{name}: the weight is not finite and has no singular vectors")
        chosen[name] = weight, of_weight
        known[id(weight)] = name
    return chosen


def _obstacle(weight: Any) -> str | None:
    """Return why a parameter is left out, or None."""
    if isinstance(weight, Tensor) and not isinstance(weight, UninitializedTensorMixin):
        if weight.ndim < 2:
            return "it has fewer than two dimensions"
        if weight.numel() == 0:
            return "it has no elements"
    return None
