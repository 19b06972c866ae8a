"""Checkpoints for stock: the state dict of a model in either of stock's layouts."""

from collections import OrderedDict
from typing import Any, Literal

from torch.nn import Module

from .find import NormSite, norms_of
from .hook_keys import keys, vectors_of_1d
from .parametrization import StockHook, StockSpectralNorm

__all__ = ["Layout", "stock_state_dict"]

Layout = Literal["parametrization", "hook"]


def stock_state_dict(model: Module, layout: Layout = "parametrization") -> dict[str, Any]:
    """Return the state dict of a model with the keys that stock's spectral norm uses.

    Args:
        model: any model; its layers may have our spectral norm, fused or not, or either of stock's.
        layout: ``"parametrization"`` for models made with
            ``torch.nn.utils.parametrizations.spectral_norm``, ``"hook"`` for
            ``torch.nn.utils.spectral_norm``.

    Returns:
        A new dictionary, with the metadata that ``load_state_dict`` of those models looks at. The
        tensors share memory with the model, as those of ``model.state_dict()`` do.

    Raises:
        ValueError: the layout is unknown, or the hook's layout cannot hold a layer: other
            parametrizations are stacked on its tensor. The message names the layer.
    """
    if layout not in ("parametrization", "hook"):
        raise ValueError(f"layout must be 'parametrization' or 'hook', got layout={layout!r}")
    state = model.state_dict()
    metadata: dict[str, Any] = getattr(state, "_metadata", {})
    result = OrderedDict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        sites = _sites(module, name, layout)
        for site in sites:
            pairs = keys(prefix, site.tensor_name)
            if site.is_hook and layout == "parametrization":
                _rename(result, dict(pairs))
                _describe_parametrization(metadata, name, site.tensor_name)
            elif not site.is_hook and layout == "hook":
                _rename(result, {key: hook for hook, key in pairs})
                _describe_hook(metadata, name, site.tensor_name)
            _fix_vectors_of_1d(result, prefix, site.tensor_name, site.norm.eps, layout)
        if layout == "hook" and len(sites) > 1:
            _weights_before_vectors(result, prefix, [site.tensor_name for site in sites])
    result._metadata = metadata  # type: ignore[attr-defined]
    return result


def _sites(module: Module, name: str, layout: Layout) -> list[NormSite]:
    """Return the spectral norms of a module that a layout can hold."""
    sites = [
        site
        for site in norms_of(module, name)
        if site.is_hook or isinstance(site.norm, StockSpectralNorm)
    ]
    for site in sites:
        if layout == "hook" and not site.is_alone:
            raise ValueError(
                f"{name or type(module).__name__}: {len(site.list_)} parametrizations are stacked on "
                f"{site.tensor_name}; the layout of the hook has no place for that"
            )
    return [site for site in sites if site.is_first]


def _rename(state: OrderedDict[str, Any], names: dict[str, str]) -> None:
    """Rename keys in place, and keep their order."""
    for key in list(state):
        state[names.get(key, key)] = state.pop(key)


def _weights_before_vectors(state: OrderedDict[str, Any], prefix: str, names: list[str]) -> None:
    """Order the keys of a module with several hooks: all weights first, as PyTorch's are parameters."""
    own = [[hook for hook, _ in keys(prefix, name)] for name in names]
    ordered = [key for key, *_ in own] + [key for _, *vectors in own for key in vectors]
    moved = iter(key for key in ordered if key in state)
    places = set(ordered)
    for key in [next(moved) if key in places else key for key in state]:
        state.move_to_end(key)


def _fix_vectors_of_1d(
    state: OrderedDict[str, Any], prefix: str, tensor_name: str, eps: float, layout: Layout
) -> None:
    """Add or take away ``u`` and ``v`` of a 1-D weight, which only the hook has."""
    weight_keys, *vector_keys = keys(prefix, tensor_name)
    weight = state[weight_keys[layout == "parametrization"]]
    if weight.ndim != 1:
        return
    for (hook_key, key), vector in zip(vector_keys, vectors_of_1d(weight, eps), strict=True):
        if layout == "hook":
            state.setdefault(hook_key, vector)
        else:
            state.pop(key, None)


def _describe_hook(metadata: dict[str, Any], name: str, tensor_name: str) -> None:
    """Write into the metadata what stock's hook looks for, and that there is no parametrization."""
    inner = f"{name}.parametrizations" if name else "parametrizations"
    for key in (inner, f"{inner}.{tensor_name}", f"{inner}.{tensor_name}.0"):
        metadata.pop(key, None)
    own = metadata.setdefault(name, {})
    own.setdefault("spectral_norm", {})[f"{tensor_name}.version"] = StockHook._version


def _describe_parametrization(metadata: dict[str, Any], name: str, tensor_name: str) -> None:
    """Write into the metadata what a parametrized module has."""
    metadata.get(name, {}).pop("spectral_norm", None)
    inner = f"{name}.parametrizations" if name else "parametrizations"
    for key in (inner, f"{inner}.{tensor_name}", f"{inner}.{tensor_name}.0"):
        metadata[key] = {"version": 1}
