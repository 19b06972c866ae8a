"""Spectral normalization for all layers of a model in one statement."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from ..reference import Order
from ..settings import LayerSettings
from ..validation import check_bool
from .dynamic_class import parametrization_lists
from .foreign import computed_by_others, other_matrices
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
    pending_norm,
)
from .select import (
    Selector,
    check_module,
    check_name,
    check_selector,
    checked_types,
    is_selected,
)

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
            names of the module and of the tensor, or a predicate of module name and module. It must
            select at least one tensor of the types.
        exclude: leave out what this selects.
        name: of the tensor in each module.
        n_power_iterations, eps, order, scale, bound, gain, detach_sigma: as in
            :func:`spectral_ext.spectral_norm`.
        tol, max_power_iterations, init, backend: as there.
        per_group: the same, for convolutions with groups; others are one block.

    Returns:
        The names of what was normalized, and of what was not with the reason. Mentioned are modules that
        have a tensor of that name, and for ``"weight"`` also matrices that have another name, such as
        ``weight_ih_l0`` of an RNN and ``in_proj_weight`` of an attention. A weight that has a norm already,
        also one of other code such as ``weight_norm``, is left alone.

    Raises:
        TypeError, ValueError: an argument does not fit, or ``include`` selects nothing. Nothing was
            changed.
        RuntimeError: the backend cannot run. Nothing was changed.
    """
    check_module("model", model)
    check_name(name)
    types = checked_types(types)
    label = "apply_spectral_norm"
    check_bool(label, "per_group", per_group)
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
    chosen, skipped = _chosen(model, types, include, exclude, name, backend)
    for qualified_name, module in chosen.items():
        label = f"{qualified_name} of {parametrize.type_before_parametrizations(module).__name__}"
        in_groups = per_group and isinstance(getattr(module, "groups", None), int)
        of_layer = settings._replace(
            dim=default_dim(module), blocks=blocks_of(label, module, 1, in_groups)
        )
        normalize_parameter(module, name, of_layer, gain, init, backend, label)
    return AppliedSpectralNorm(tuple(chosen), skipped)


def _chosen(
    model: Module,
    types: tuple[type[Module], ...],
    include: Selector | None,
    exclude: Selector | None,
    name: str,
    backend: str | None,
) -> tuple[dict[str, Module], dict[str, str]]:
    """Return the modules to normalize, and why others are skipped, by the names of their tensors."""
    chosen: dict[str, Module] = {}
    skipped: dict[str, str] = {}
    known: dict[Module, str] = {}
    available: dict[str, bool] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        if isinstance(module, torch.jit.ScriptModule):
            if name in module._parameters:
                skipped[prefix + name] = "torch.jit has compiled the module"
            continue
        for other in other_matrices(module, name) if name == "weight" else ():
            is_meant = is_selected(include, exclude, module_name, other, module)
            skipped[prefix + other] = _of_other_name(module, other) if is_meant else "excluded"
        if not _has_tensor(module, name):
            continue
        qualified_name = prefix + name
        if isinstance(module, types):
            available[qualified_name] = is_selected(include, None, module_name, name, module)
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
    if not any(available.values()) and include is not None:
        shown = ", ".join([*available][:20]) + (", …" if len(available) > 20 else "")
        raise ValueError(
            f"include={include!r} selects none of the tensors that could be normalized; "
            f"{f'they are: {shown}' if shown else 'the model has none'}"
        )
    return chosen, skipped


def _of_other_name(module: Module, name: str) -> str:
    return f"{type(module).__name__} has no 'weight'; use spectral_norm(module, {name!r})"


def _has_tensor(module: Module, name: str) -> bool:
    return (
        name in module._parameters
        or name in module._buffers
        or name in parametrization_lists(module)
        or stock_hook(module, name) is not None
        or computed_by_others(module, name) is not None
    )


def _obstacle(module: Module, name: str, backend: str | None) -> str | None:
    """Return why a tensor cannot be normalized, or None."""
    list_ = parametrization_lists(module).get(name, ())
    if stock_hook(module, name) or any(
        isinstance(p, (StockSpectralNorm, OperatorNorm)) for p in list_
    ):
        return "already normalized"
    if pending_norm(module, name) is not None:
        return "it gets a norm in its first forward already"
    if is_lazy(module, name):
        return None
    reason = computed_by_others(module, name)
    if reason is not None:
        return reason
    try:
        weight, _ = checked_weight(module, name, default_dim(module), type(module).__name__)
    except (TypeError, ValueError) as error:
        return str(error)
    check_backend(backend, weight)
    return None
