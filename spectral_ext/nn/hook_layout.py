"""Stock's hook ``torch.nn.utils.spectral_norm`` taken off a module, and put on it again."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict, Parameter
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from .dynamic_class import parametrization_lists, take_off
from .hook import GroupHook
from .parametrization import LastWeight, SpectralNorm, StockHook

__all__ = [
    "as_parametrization",
    "refuse_other_tensors",
    "remove_hook",
    "replace_hook",
    "restore_hook",
    "was_called",
]


def as_parametrization(module: Module, hook: StockHook) -> SpectralNorm:
    """Return a parametrization, not registered, with the settings and the vectors of a hook."""
    weight = module._parameters[f"{hook.name}_orig"]
    norm = SpectralNorm.__new__(SpectralNorm)
    Module.__init__(norm)
    norm.dim = hook.dim % weight.ndim if weight is not None and weight.ndim else hook.dim
    norm.eps, norm.n_power_iterations, norm.order = hook.eps, hook.n_power_iterations, "v_first"
    norm.origin = "hook"
    for name in ("_u", "_v"):
        norm.register_buffer(name, module._buffers[hook.name + name])
    norm.train(module.training)
    return norm


def refuse_other_tensors(module: Module, hook: StockHook, label: str) -> None:
    """Raise unless the tensors of a hook are where the hook has put them."""
    name = hook.name
    if f"{name}_orig" not in module._parameters:
        raise ValueError(
            f"{label}: {name}_orig of torch.nn.utils.spectral_norm is not a parameter any more; a pruning "
            f"mask on it, for instance, makes it before each call. Remove what has replaced it "
            f"(torch.nn.utils.prune.remove(module, '{name}_orig')), or leave the layer out with exclude"
        )
    for key in (f"{name}_u", f"{name}_v"):
        if key not in module._buffers:
            raise ValueError(
                f"{label}: {key} of torch.nn.utils.spectral_norm is not a buffer any more; make it one "
                "again, or leave the layer out with exclude"
            )


def replace_hook(module: Module, hook: StockHook, norm: SpectralNorm) -> None:
    """Put the parametrization, and a hook of ours, in the place of a hook.

    The module has a class of ours, without a property for the tensor yet. The weight stays the same object.
    """
    name = hook.name
    norm.hook_places = {
        name + suffix: _names_after(_home(module, suffix), name + suffix) for suffix in _SUFFIXES
    }
    ours = norm.__dict__["_hook"] = GroupHook(hook)
    norm.__dict__["_last_weight"] = _last_weight(module, hook)
    hooks = module._forward_pre_hooks
    hooks[next(key for key, other in hooks.items() if other is hook)] = ours
    weight = remove_hook(module, hook)
    if "parametrizations" not in module._modules:
        # PyTorch counts the parameters of a module before those of its children.
        children = dict(module._modules)
        module._modules.clear()
        module.parametrizations = ModuleDict()
        module._modules.update(children)
    # The list calls `set_` on what it is given, and that loses the hooks of DistributedDataParallel.
    stand_in = Parameter(weight.detach(), requires_grad=weight.requires_grad)
    list_ = parametrize.ParametrizationList([norm], stand_in, unsafe=True)
    list_._parameters["original"] = cast(Parameter, weight)
    # Before those that were parametrizations, which were in a child.
    lists = parametrization_lists(module)
    others = {key: other for key, other in lists.items() if not is_from_hook(other)}
    for key in others:
        del lists[key]
    lists[name] = list_
    lists.update(others)


def is_from_hook(list_: parametrize.ParametrizationList) -> bool:
    return getattr(list_._modules.get("0"), "_hook", None) is not None


def was_called(module: Module, hook: StockHook) -> bool:
    """Return whether the attribute that a hook sets in its module comes from a call of the hook.

    Until the first call it is the weight before normalization: in the same memory, or in other memory if the
    module was copied or moved since. What a call leaves has σ = 1 with the ``u`` and ``v`` of that call.
    """
    attribute, weight = module.__dict__.get(hook.name), module._parameters[f"{hook.name}_orig"]
    u, v = (module._buffers[hook.name + suffix] for suffix in ("_u", "_v"))
    if not isinstance(attribute, Tensor) or weight is None or u is None or v is None:
        return False
    if attribute.grad_fn is not None:
        return True
    if attribute.shape != weight.shape or attribute.is_meta or u.is_meta:
        return False
    if torch._C._is_alias_of(attribute, weight):  # type: ignore[attr-defined]
        return False
    with torch.no_grad():
        matrix = hook.reshape_weight_to_matrix(attribute.to(u.device, u.dtype))
        return abs(torch.dot(u, torch.mv(matrix, v)).item() - 1) < 0.01


def _last_weight(module: Module, hook: StockHook) -> LastWeight | None:
    """Return the weight that a hook has left in its module, if it was ever called."""
    if not was_called(module, hook):
        return None
    attribute, weight = module.__dict__[hook.name], module._parameters[f"{hook.name}_orig"]
    fits = (attribute.dtype, attribute.device) == (weight.dtype, weight.device)  # type: ignore[union-attr]
    return LastWeight(attribute) if fits else None


def remove_hook(module: Module, hook: StockHook) -> Tensor:
    """Take the hook off with all that it has put into the module; return the weight."""
    name = hook.name
    weight = cast(Tensor, module._parameters.pop(f"{name}_orig"))
    for suffix in ("_u", "_v"):
        del module._buffers[name + suffix]
    module.__dict__.pop(name, None)
    _remove(module._forward_pre_hooks, lambda h: h is hook)
    _remove(
        module._state_dict_hooks,
        lambda h: isinstance(h, SpectralNormStateDictHook) and h.fn.name == name,
    )
    _remove(
        module._load_state_dict_pre_hooks,
        lambda h: isinstance(h, SpectralNormLoadStateDictPreHook) and h.fn.name == name,
    )
    return weight


def restore_hook(module: Module, name: str, norm: SpectralNorm) -> None:
    """Take the parametrization off and put PyTorch's hook on."""
    ours = norm._hook
    with torch.no_grad():
        attribute = None if ours is None else ours.read(module).detach()
    weight = take_off(module, name)
    module.register_parameter(f"{name}_orig", cast(Parameter, weight))
    for suffix in ("_u", "_v"):
        module.register_buffer(name + suffix, norm._buffers[suffix])
    for suffix in _SUFFIXES:
        _move_to_end(_home(module, suffix), norm.hook_places[name + suffix])
    hook = StockHook(name, norm.n_power_iterations, norm.dim, norm.eps)
    if attribute is None:
        with torch.no_grad():
            attribute = hook.compute_weight(module, do_power_iteration=False)
    setattr(module, name, attribute)
    for key, other in module._forward_pre_hooks.items():
        if other is ours:
            module._forward_pre_hooks[key] = hook
            break
    else:
        module.register_forward_pre_hook(hook)
    module._register_state_dict_hook(SpectralNormStateDictHook(hook))
    module._register_load_state_dict_pre_hook(SpectralNormLoadStateDictPreHook(hook))
    for name_ in ("_hook", "_last_weight"):
        norm.__dict__.pop(name_, None)


_SUFFIXES = ("_orig", "_u", "_v")


def _home(module: Module, suffix: str) -> dict[str, Any]:
    return module._parameters if suffix == "_orig" else module._buffers


def _names_after(home: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return the names behind a name; optimizers count on the order of parameters."""
    names = list(home)
    return tuple(names[names.index(name) + 1 :])


def _move_to_end(home: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if name in home:
            home[name] = home.pop(name)


def _remove(hooks: dict[int, Any], is_it: Callable[[Any], bool]) -> None:
    for key in [key for key, hook in hooks.items() if is_it(getattr(hook, "hook", hook))]:
        del hooks[key]
