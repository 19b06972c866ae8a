"""Spectral normalization for all layers of a model in one statement."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from ..reference import Order
from ..settings import LayerSettings
from .dynamic_class import parametrization_lists
from .operator_norm import OperatorNorm
from .parametrization import (
    Gain,
    Init,
    StockSpectralNorm,
    check_backend,
    checked_weight,
    default_dim,
    stock_hook,
)
from .register import (
    blocks_of,
    check_choices,
    is_lazy,
    iterations_of,
    normalize_parameter,
)
from .select import Selector, check_selector, is_selected

__all__ = ["LAYER_TYPES", "AppliedSpectralNorm", "apply_spectral_norm"]

LAYER_TYPES: tuple[type[Module], ...] = (
    torch.nn.Linear,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
    torch.nn.Embedding,
)


@dataclass(frozen=True)
class AppliedSpectralNorm:
    """What :func:`apply_spectral_norm` did."""

    normalized: tuple[str, ...]
    """Qualified names of the tensors that are normalized now."""
    skipped: dict[str, str]
    """Qualified names of the tensors that were left alone, with the reason."""

    def __repr__(self) -> str:
        names = [*self.normalized, *self.skipped]
        width = max(map(len, names), default=0)
        lines = [f"AppliedSpectralNorm({len(self.normalized)} normalized, {len(self.skipped)} not"]
        lines += [f"  {name:{width}}  normalized" for name in self.normalized]
        lines += [f"  {name:{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines) + ("\n)" if names else ")")


def apply_spectral_norm(
    model: Module,
    types: type[Module] | Sequence[type[Module]] = LAYER_TYPES,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    order: Order = "u_first",
    scale: float = 1.0,
    bound: float | None = None,
    gain: Gain | None = None,
    detach_sigma: bool = False,
    tol: float = 0.0,
    max_power_iterations: int | None = None,
    init: Init = "randn",
    per_group: bool = False,
    backend: str | None = None,
) -> AppliedSpectralNorm:
    """Apply :func:`spectral_ext.spectral_norm` to every layer of a model.

    Modules that share one ``Parameter`` are all normalized; :func:`spectral_ext.fuse` computes it
    once.

    Args:
        model: changed in place; modules in any depth, and itself.
        types: the types of modules to normalize, subclasses included.
        include: normalize only what this selects: a regular expression, searched in the qualified
            names of the module and of the tensor, or a predicate of module name and module.
        exclude: leave out what this selects.
        name: of the tensor in each module.
        n_power_iterations, eps, order, scale, bound, gain, detach_sigma: as in
            :func:`spectral_ext.spectral_norm`.
        tol, max_power_iterations, init, backend: as there.
        per_group: the same, for convolutions with groups; others are one block.

    Returns:
        The names of what was normalized, and of what was not with the reason. Only modules that
        have a tensor of that name are mentioned.

    Raises:
        TypeError, ValueError: an argument does not fit. Nothing was changed.
        RuntimeError: the backend cannot run. Nothing was changed.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    types = (types,) if isinstance(types, type) else tuple(types)
    label = "apply_spectral_norm"
    settings = LayerSettings(
        n_power_iterations=iterations_of(label, n_power_iterations, tol, max_power_iterations),
        eps=eps,
        order=order,
        tol=tol,
        scale=scale,
        bound=bound,
        detach_sigma=detach_sigma,
    )
    check_choices(label, settings, gain, init)
    check_selector("include", include)
    check_selector("exclude", exclude)
    chosen: dict[str, Module] = {}
    skipped: dict[str, str] = {}
    known: dict[Module, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if not _has_tensor(module, name):
            continue
        qualified_name = f"{module_name}.{name}" if module_name else name
        if module in known:
            reason: str | None = f"the same module as {known[module] or 'the model'}"
        elif not isinstance(module, types):
            reason = f"{type(module).__name__} is not among the types"
        elif not is_selected(include, exclude, module_name, name, module):
            reason = "excluded"
        else:
            reason = _obstacle(module, name, backend)
        known.setdefault(module, module_name)
        if reason is None:
            chosen[qualified_name] = module
        else:
            skipped[qualified_name] = reason
    for qualified_name, module in chosen.items():
        label = f"{qualified_name} of {parametrize.type_before_parametrizations(module).__name__}"
        in_groups = per_group and isinstance(getattr(module, "groups", None), int)
        of_layer = settings._replace(
            dim=default_dim(module), blocks=blocks_of(label, module, 1, in_groups)
        )
        normalize_parameter(module, name, of_layer, gain, init, backend, label)
    return AppliedSpectralNorm(tuple(chosen), skipped)


def _has_tensor(module: Module, name: str) -> bool:
    return (
        name in module._parameters
        or name in module._buffers
        or name in parametrization_lists(module)
        or stock_hook(module, name) is not None
    )


def _obstacle(module: Module, name: str, backend: str | None) -> str | None:
    """Return why a tensor cannot be normalized, or None."""
    list_ = parametrization_lists(module).get(name, ())
    if stock_hook(module, name) or any(
        isinstance(p, (StockSpectralNorm, OperatorNorm)) for p in list_
    ):
        return "already normalized"
    if is_lazy(module, name):
        return None
    try:
        weight, _ = checked_weight(module, name, default_dim(module), type(module).__name__)
    except (TypeError, ValueError) as error:
        return str(error)
    check_backend(backend, weight)
    return None
