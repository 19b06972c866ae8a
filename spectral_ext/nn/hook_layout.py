"""Stock's hook ``torch.nn.utils.spectral_norm`` taken off a module, and put on it again."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict, Parameter
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from .dynamic_class import parametrization_lists
from .parametrization import SpectralNorm, StockHook

__all__ = ["as_parametrization", "remove_hook", "replace_hook", "restore_hook"]


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


def replace_hook(module: Module, hook: StockHook, norm: SpectralNorm) -> None:
    """Take the hook off and register the parametrization; the weight stays the same object."""
    name = hook.name
    norm.hook_places = {
        name + suffix: _names_after(_home(module, suffix), name + suffix) for suffix in _SUFFIXES
    }
    weight = remove_hook(module, hook)
    if not parametrize.is_parametrized(module):
        parametrize._inject_new_class(module)
        module.parametrizations = ModuleDict()
    parametrize._inject_property(module, name)
    # The list calls `set_` on what it is given, and that loses the hooks of DistributedDataParallel.
    stand_in = Parameter(weight.detach(), requires_grad=weight.requires_grad)
    list_ = parametrize.ParametrizationList([norm], stand_in, unsafe=True)
    list_._parameters["original"] = cast(Parameter, weight)
    cast(ModuleDict, module.parametrizations)[name] = list_


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
    """Take the parametrization off and put stock's hook on."""
    registered = cast(ModuleDict, module.parametrizations)
    weight = parametrization_lists(module)[name].original
    delattr(type(module), name)
    del registered[name]
    if not registered:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    module.register_parameter(f"{name}_orig", cast(Parameter, weight))
    for suffix in ("_u", "_v"):
        module.register_buffer(name + suffix, norm._buffers[suffix])
    for suffix in _SUFFIXES:
        _move_to_end(_home(module, suffix), norm.hook_places[name + suffix])
    hook = StockHook(name, norm.n_power_iterations, norm.dim, norm.eps)
    with torch.no_grad():
        setattr(module, name, hook.compute_weight(module, do_power_iteration=False))
    module.register_forward_pre_hook(hook)
    module._register_state_dict_hook(SpectralNormStateDictHook(hook))
    module._register_load_state_dict_pre_hook(SpectralNormLoadStateDictPreHook(hook))


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
