"""Fuse the spectral norms of a model into one group, and undo it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from .. import backends
from . import hook_layout
from .dynamic_class import GROUP, fused_class, is_fused, own_class, set_base, stock_class
from .group import SpectralGroup
from .parametrization import SpectralNorm, StockHook, StockSpectralNorm
from .plan import Layer

__all__ = ["Selector", "fuse", "selects", "unfuse"]

Selector = str | re.Pattern[str] | Callable[[str, Module], bool]


@dataclass(frozen=True)
class _Found:
    """A spectral norm in a model, of any make."""

    name: str
    module: Module
    tensor_name: str
    norm: StockSpectralNorm | StockHook

    @property
    def label(self) -> str:
        cls = parametrize.type_before_parametrizations(self.module)
        path = f"{self.name}.{self.tensor_name}" if self.name else self.tensor_name
        return f"{path} of {cls.__name__}"

    def candidate(self) -> SpectralNorm:
        """Return it as a parametrization of ours that is not registered, sharing all tensors."""
        if isinstance(self.norm, SpectralNorm):
            return self.norm
        if isinstance(self.norm, StockHook):
            return hook_layout.as_parametrization(self.module, self.norm)
        return _from_stock(self.norm)

    @property
    def weight(self) -> Tensor:
        if isinstance(self.norm, StockHook):
            return self.module._parameters[f"{self.tensor_name}_orig"]
        return self.module.parametrizations[self.tensor_name].original


def fuse(
    model: Module,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    bucket_mb: float | None = None,
    backend: str | None = None,
) -> SpectralGroup:
    """Compute all spectral norms of a model together, in one native call for each forward.

    Takes over every layer with either spectral norm of ``torch.nn.utils`` or with ours, as it is:
    weight (the same ``Parameter``), ``u``, ``v``, eps, iterations, dimension and order of each. From
    then on, entering ``model.forward`` computes all of them, and every access of a weight inside that
    forward gives the same tensor. An access outside of it is computed alone, as in stock. The state
    dict has stock's parametrization layout; checkpoints of both layouts load.

    What stays as it is: a spectral norm that is stacked on another parametrization, and subclasses of
    stock's. Layers that have one ``Parameter`` and the same settings are computed once, and share
    ``u`` and ``v`` until they are unfused; they are updated where one of them is in training. Fusing
    again makes a new group; a layer belongs to the group that took it last.

    Args:
        model: the root: its forward is what enters the group. Its class is exchanged for a subclass.
        include: take only the layers that this selects: a regular expression, searched in the
            qualified names of the module and of the tensor, or a predicate of module name and module.
        exclude: leave out the layers that this selects.
        bucket_mb: let weights of so many MiB share a node of the autograd graph, so that gradients
            become ready bucket by bucket (``DistributedDataParallel``); default one node.
        backend: see :func:`spectral_ext.functional.spectral_normalize`.

    Returns:
        The group; :func:`spectral_ext.group_of` finds it again.

    Raises:
        TypeError, ValueError: an argument or a layer does not fit, or nothing is there to fuse.
        RuntimeError: the backend cannot run, or the forward of the model cannot be entered.
        In all cases nothing was changed, and the message names the layer.
    """
    _check_root(model, bucket_mb)
    everything = list(_find(model))
    chosen = [
        found
        for found in everything
        if selects(include, found.name, found.tensor_name, found.module, default=True)
        and not selects(exclude, found.name, found.tensor_name, found.module, default=False)
    ]
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no spectral norm to fuse"
            + (", they were all left out" if everything else "; apply one to its layers first")
        )
    candidates = [found.candidate() for found in chosen]
    for found, candidate in zip(chosen, candidates, strict=True):
        candidate.check(found.weight, found.label)
        if not found.weight.is_complex():
            backends.select(backend, found.weight.device)

    # Nothing below raises.
    for found in everything:
        if found not in chosen and _root_of(found.norm) is model:
            _restore(found.module, found.tensor_name, found.norm)
    layers = [_take(*pair) for pair in zip(chosen, candidates, strict=True)]
    group = SpectralGroup(layers, backend=backend, bucket_mb=bucket_mb)
    if not is_fused(model):
        if parametrize.is_parametrized(model):
            own_class(model)
            set_base(model, fused_class(type(model).__bases__[0]))
        else:
            model.__class__ = fused_class(type(model))
    model.__dict__[GROUP] = group
    group.bind(model)
    return group


def unfuse(model: Module) -> Module:
    """Undo :func:`fuse`: give back the spectral norms that the layers had, with their present state.

    Layers that were stock's become stock's again, in the layout and with the kind of object that they
    had; ours stay ours, each computed alone. Fused models inside of ``model`` are unfused too.

    Args:
        model: a model, fused or not.

    Returns:
        ``model``.
    """
    for root in list(model.modules()):
        group = root.__dict__.get(GROUP)
        if group is None or not is_fused(root):
            continue
        for layer in group.of(root).layers:
            group = root.__dict__[GROUP]
            group.release(layer.parametrization)
            _restore(layer.module, layer.tensor_name, layer.parametrization)
        _unwrap(root)
    return model


def selects(
    selector: Selector | None, name: str, tensor_name: str, module: Module, *, default: bool
) -> bool:
    """Return whether a regular expression or predicate selects a layer."""
    if selector is None:
        return default
    if isinstance(selector, (str, re.Pattern)):
        qualified_name = f"{name}.{tensor_name}" if name else tensor_name
        return any(re.search(selector, text) for text in (name, qualified_name))
    if callable(selector):
        return bool(selector(name, module))
    raise TypeError(
        "include and exclude must be a regular expression or a predicate of name and module, "
        f"got {type(selector).__name__}"
    )


def _check_root(model: Module, bucket_mb: float | None) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule; fuse the model before scripting it")
    if "forward" in model.__dict__:
        raise RuntimeError(
            f"{type(model).__name__} has its forward in the instance, where it hides the one of its "
            "class; fuse the model before torch.compile, or delete that attribute"
        )
    if bucket_mb is not None and not bucket_mb > 0:
        raise ValueError(f"bucket_mb must be positive, got bucket_mb={bucket_mb}")


def _find(model: Module) -> Iterator[_Found]:
    """Find every spectral norm that can be taken over."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook) is StockHook:
                yield _Found(name, module, hook.name, hook)
        if parametrize.is_parametrized(module):
            for tensor_name, parametrizations in module.parametrizations.items():
                first = parametrizations[0]
                if type(first) in (StockSpectralNorm, SpectralNorm):
                    yield _Found(name, module, tensor_name, first)


def _from_stock(norm: StockSpectralNorm) -> SpectralNorm:
    """Return a parametrization of ours with the contents of a stock one."""
    ours = SpectralNorm.__new__(SpectralNorm)
    ours.__dict__.update(norm.__dict__)
    if "_u" not in norm._buffers:
        object.__setattr__(ours, "n_power_iterations", 1)  # stock has none for a 1-D weight
    object.__setattr__(ours, "origin", "parametrization")
    return ours


def _take(found: _Found, candidate: SpectralNorm) -> Layer:
    """Register a candidate in its module, out of any group that it was in."""
    module, tensor_name = found.module, found.tensor_name
    if isinstance(found.norm, SpectralNorm):
        _leave_group(found.norm)
    elif isinstance(found.norm, StockHook):
        hook_layout.replace_hook(module, found.norm, candidate)
    else:
        # The object stays the one that it was, for those who hold it.
        found.norm.__class__ = SpectralNorm
        found.norm.__dict__.update(candidate.__dict__)
        candidate = found.norm
    own_class(module)
    object.__setattr__(candidate, "label", found.label)
    return Layer(found.name, module, tensor_name, candidate)


def _restore(module: Module, tensor_name: str, norm: SpectralNorm) -> None:
    """Make of a layer what it was before it was fused."""
    _leave_group(norm)
    if norm.origin == "hook":
        hook_layout.restore_hook(module, tensor_name, norm)
    elif norm.origin == "parametrization":
        _to_stock(norm)
    if parametrize.is_parametrized(module):
        others = [p for list_ in module.parametrizations.values() for p in list_]
        if not any(isinstance(other, SpectralNorm) for other in others):
            stock_class(module)


def _to_stock(norm: SpectralNorm) -> None:
    for name in ("order", "backend", "label", "origin", "_group", "_traced"):
        norm.__dict__.pop(name, None)
    if norm.is_vector:
        norm.__dict__.pop("n_power_iterations", None)
    norm.__class__ = StockSpectralNorm


def _root_of(norm: object) -> Module | None:
    group = norm._group() if isinstance(norm, SpectralNorm) and norm._group else None
    return None if group is None else group.root


def _leave_group(norm: SpectralNorm) -> None:
    """Take a layer out of the group that it is in; the last one turns off the light."""
    group = None if norm._group is None else norm._group()
    if group is None:
        return
    group.release(norm)
    root = group.root
    if root is not None and not group.layers and root.__dict__.get(GROUP) is group:
        _unwrap(root)


def _unwrap(root: Module) -> None:
    """Give a fused root its class back."""
    root.__dict__.pop(GROUP, None)
    cls = type(root)
    fused = next(c for c in cls.__mro__ if c.__dict__.get("_spectral_class") == "fused")
    set_base(root, fused.__bases__[0])
