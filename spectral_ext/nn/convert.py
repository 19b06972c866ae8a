"""Checkpoints for stock: the state dict of a model in either of stock's layouts."""

from collections import OrderedDict
from typing import Any, Literal

from torch.nn import Module

from .dynamic_class import parametrization_lists
from .hook import stock_hooks
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
        for tensor_name, norm in _norms(module, name, layout):
            if isinstance(norm, StockHook) and layout == "parametrization":
                pairs = keys(prefix, tensor_name)
                _rename(result, dict(pairs))
                _describe_parametrization(metadata, name, tensor_name)
            elif isinstance(norm, StockSpectralNorm) and layout == "hook":
                _rename(result, {key: hook for hook, key in keys(prefix, tensor_name)})
                _describe_hook(metadata, name, tensor_name)
            _fix_vectors_of_1d(result, prefix, tensor_name, norm.eps, layout)
    result._metadata = metadata  # type: ignore[attr-defined]
    return result


def _norms(
    module: Module, name: str, layout: Layout
) -> list[tuple[str, StockHook | StockSpectralNorm]]:
    """Return the spectral norms of a module by tensor name."""
    found: list[tuple[str, StockHook | StockSpectralNorm]] = [
        (hook.name, hook) for hook in stock_hooks(module)
    ]
    for tensor_name, list_ in parametrization_lists(module).items():
        norms = [norm for norm in list_ if isinstance(norm, StockSpectralNorm)]
        if norms and len(list_) > 1 and layout == "hook":
            raise ValueError(
                f"{name or type(module).__name__}: {len(list_)} parametrizations are stacked on "
                f"{tensor_name}; the layout of the hook has no place for that"
            )
        if norms and norms[0] is list_[0]:
            found.append((tensor_name, norms[0]))
    return found


def _rename(state: OrderedDict[str, Any], names: dict[str, str]) -> None:
    """Rename keys in place, and keep their order."""
    for key in list(state):
        state[names.get(key, key)] = state.pop(key)


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
