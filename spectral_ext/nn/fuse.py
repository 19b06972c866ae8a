"""Fuse the spectral norms of a model into one group, and undo it."""

import dis
import warnings
from collections.abc import Iterator
from types import FunctionType
from typing import Any, TypeVar, cast, get_args

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from ..layout import compute_dtype
from ..validation import check_bool, check_number
from . import hook_layout
from .dynamic_class import (
    GROUP,
    add_properties,
    class_for_parametrizations,
    class_of_parametrizations,
    exchange_class,
    fused_class,
    is_fused,
    own_class,
    parametrization_lists,
    stock_class,
    unwrap,
)
from .find import NormSite, find_norms
from .group import SpectralGroup
from .hook import leave_groups
from .kept import Update
from .parametrization import SpectralNorm, StockSpectralNorm, check_backend
from .plan import Layer
from .register import LazyNorm
from .select import Selector, check_selector, is_selected

__all__ = ["fuse", "unfuse"]

_Module = TypeVar("_Module", bound=Module)


def fuse(
    model: Module,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    bucket_mb: float | None = None,
    update: Update = "forward",
    check_finite: bool = False,
    autocast: bool = False,
    backend: str | None = None,
) -> SpectralGroup:
    """Compute all spectral norms of a model together, in one native call for each forward.

    Takes over every layer with either spectral norm of ``torch.nn.utils`` or with ours, as it is:
    weight (the same ``Parameter``), ``u``, ``v``, eps, iterations, dimension and order of each.
    Vectors of half precision become float32 until they are unfused.
    From then on, entering ``model.forward`` computes all of them, and every access of a weight
    inside that forward gives the same tensor. An access outside of it is computed alone, as in
    stock. The state dict has stock's parametrization layout; checkpoints of both layouts load.

    What stays as it is: a spectral norm that is stacked on another parametrization, and subclasses
    of stock's. Layers that have one ``Parameter`` and the same settings are computed once, and
    share ``u`` and ``v`` until they are unfused; they are updated where one of them is in training.
    Fusing again makes a new group; a layer belongs to the group that took it last.

    A layer that had PyTorch's hook keeps a subclass of it, its attributes (``weight_orig``, ``weight_u``,
    ``weight_v``) and its rules. Outside of the forward of ``model``, each call of the layer makes one
    iteration, and an access gives the weight of the last call. Before the first call it gives the weight
    before normalization, and so it does for a layer that is never called since another module reads its
    weight (``nn.MultiheadAttention.out_proj``). After the first forward the group leaves such a layer out.

    ``DistributedDataParallel`` may be around the model before or after it is fused. ``u`` and ``v`` are the
    same on all ranks, if they have started so: DDP sends them once unless ``broadcast_buffers=False``.

    With ``fully_shard`` (FSDP2), fuse every unit, before or after it is sharded; or the whole model. Then
    ``u``, ``v`` and σ of the units are computed on entry from the shards, all ranks together, with one
    all-reduce of vectors for all layers and iteration (two for ``order="v_first"``, or where the columns
    of a weight's matrix are sharded), and a layer's weight is divided by σ once its unit is gathered.
    Autograd keeps normalized weights, whole, for the backward. Code that ``torch.compile`` has made
    computes such layers alone. Methods of the group that compute (``warm_start``, ``iterate``, and ``sigmas``
    before the first forward), and the access of a sharded weight outside of a forward, are collective.

    Args:
        model: the root: its forward is what enters the group. Its class is exchanged for a
            subclass.
        include: take only the layers that this selects: a regular expression, searched in the
            qualified names of the module and of the tensor, or a predicate of module name and
            module.
        exclude: leave out the layers that this selects.
        bucket_mb: let weights of so many MiB share a node of the autograd graph, so that gradients
            become ready bucket by bucket (``DistributedDataParallel``); default one node.
        update: when ``u``, ``v`` and the weights are computed. ``"forward"``: in every forward, as in
            stock. ``"step"``: in the first forward after a weight has changed, and the later ones
            take the same: the passes of one GAN step cost one computation, and one set of normalized
            weights stays in memory. In eval mode every forward computes. It makes the iterations of one
            forward: where weights move fast, set ``n_power_iterations`` to the number of passes that
            share them. A change by hand through ``weight.data`` needs ``group.invalidate()``. ``"manual"``:
            ``u`` and ``v`` advance by ``group.iterate()`` alone. Code that ``torch.compile`` has made
            computes in every forward in all cases.
        autocast: under ``torch.autocast`` write float32 weights in its dtype at once, instead of float32
            which every layer casts: less memory, and half the gradient to read. σ, ``u``, ``v`` and the
            gradients of the weights stay float32. For models whose normalized layers are all of those
            that autocast runs in half precision.
        check_finite: note on the device where a σ is not finite, for ``group.check()`` to raise.
        backend: see :func:`spectral_ext.functional.spectral_normalize`.

    Returns:
        The group; :func:`spectral_ext.group_of` finds it again.

    Raises:
        TypeError, ValueError: an argument or a layer does not fit, or nothing is there to fuse.
        RuntimeError: the backend cannot run, or the forward of the model cannot be entered.

    In all cases nothing was changed, and the message names the layer.

    Warns:
        UserWarning: the order of ``model.parameters()`` changes, by which optimizers load their state.
    """
    _check_root(model)
    _check_options(bucket_mb, check_finite, autocast)
    if update not in get_args(Update):
        raise ValueError(f"update must be one of {get_args(Update)}, got update={update!r}")
    check_selector("include", include)
    check_selector("exclude", exclude)
    everything = [site for site in find_norms(model) if site.is_fusible]
    chosen = [
        site
        for site in everything
        if is_selected(include, exclude, site.module_name, site.tensor_name, site.module)
    ]
    lazy = ", ".join(_lazy_layers(model))
    if not chosen:
        if lazy:
            why = f" yet: {lazy} have no weight before a forward; run the model once before fuse"
        else:
            why = ", they were all left out" if everything else "; apply one to its layers first"
        raise ValueError(f"{type(model).__name__} has no spectral norm to fuse{why}")
    for site in chosen:
        if site.is_hook:
            hook_layout.refuse_other_tensors(site.module, site.norm, _label(site))
    candidates = [_candidate(site) for site in chosen]
    for site, candidate in zip(chosen, candidates, strict=True):
        if site.is_hook:
            _refuse_to_move(site.module, _label(site), "fuse")
        candidate.check(site.original, _label(site))
        check_backend(backend, site.original)
    if lazy:
        warnings.warn(
            f"{type(model).__name__} is fused without {lazy}, which have no weight before their first "
            "forward and are computed alone; run the model once before fuse",
            stacklevel=2,
        )
    # The classes, made before anything changes; that of the model stays in a cache.
    classes = {site.module: class_for_parametrizations(site.module) for site in chosen}
    # A model that is fused already loses its class when its last layer leaves the old group.
    of_model = fused_class(next(c for c in own_class_of(model).__mro__ if not is_fused(c)))
    for module in {model, *classes}:
        _refuse_super_of_class(module)
    _warn_of_order(chosen)

    # Nothing below raises.
    kept = {id(site.norm) for site in chosen}
    left_out = [
        (site.module, site.tensor_name, site.norm)
        for site in everything
        if id(site.norm) not in kept
        and isinstance(site.norm, SpectralNorm)
        and _root_of(site.norm) is model
    ]
    leave_groups([*(norm for _, _, norm in left_out), *candidates])
    for layer in left_out:
        _restore(*layer)
    for module in classes:
        module.__class__ = class_for_parametrizations(module)
    layers = []
    for site, candidate in zip(chosen, candidates, strict=True):
        # What was made in inference mode can be written to and registered there alone.
        tensors = [site.original, *candidate._buffers.values()]
        with torch.inference_mode(any(x is not None and x.is_inference() for x in tensors)):
            layers.append(_take(site, candidate))
    for module in classes:
        add_properties(module)
    group = SpectralGroup(
        layers,
        backend=backend,
        bucket_mb=bucket_mb,
        update=update,
        check_finite=check_finite,
        autocast=autocast,
    )
    if not any(is_fused(cls) for cls in type(model).__mro__):
        if parametrize.is_parametrized(model):
            own_class(model)
            exchange_class(model, own_class_of(model), of_model)
        else:
            model.__class__ = of_model
    model.__dict__[GROUP] = group
    group.bind(model)
    return group


def unfuse(model: _Module) -> _Module:
    """Undo :func:`fuse`: give back the spectral norms that the layers had, as they are now.

    Layers that were stock's become stock's again, in the layout and with the kind of object that
    they had; ours stay ours, each computed alone. Fused models inside of ``model`` are unfused too.

    Args:
        model: a model, fused or not.

    Returns:
        ``model``.

    Raises:
        RuntimeError: a layer that had stock's hook is sharded (FSDP), which holds its weight by name.
    """
    for root in list(model.modules()):
        group = root.__dict__.get(GROUP)
        if group is None:
            continue
        layers = group.of(root).registered
        for layer in layers:
            if layer.parametrization.origin == "hook":
                _refuse_to_move(layer.module, layer.parametrization.label, "unfuse")
        root.__dict__[GROUP].release([layer.parametrization for layer in layers])
        for layer in layers:
            _restore(layer.module, layer.tensor_name, layer.parametrization)
        unwrap(root)
    return model


def _check_root(model: Module) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule; fuse the model before scripting it")
    if type(model).forward is Module.forward:
        raise TypeError(
            f"{name} has no forward, which is what computes a group; fuse the module whose forward runs "
            "its layers"
        )
    if "forward" in model.__dict__:
        raise RuntimeError(
            f"{name} has its forward in the instance, where it hides that of its class; fuse the model "
            "before torch.compile or Accelerate, or delete that attribute"
        )


def _check_options(bucket_mb: float | None, check_finite: bool, autocast: bool) -> None:
    check_bool("fuse", "check_finite", check_finite)
    check_bool("fuse", "autocast", autocast)
    if bucket_mb is not None:
        check_number("fuse", "bucket_mb", bucket_mb)
        if not bucket_mb > 0:
            raise ValueError(f"bucket_mb must be positive, got bucket_mb={bucket_mb}")


def _lazy_layers(model: Module) -> Iterator[str]:
    """Yield the names of tensors that get a spectral norm in the first forward of their modules."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, LazyNorm):
                yield f"{name}.{hook.name}" if name else hook.name


def _refuse_to_move(module: Module, label: str, what: str) -> None:
    """Raise if FSDP looks for a module's weight by the name that stock's hook gave it, or we did."""
    if getattr(module, "_is_fsdp_managed_module", False):
        raise RuntimeError(
            f"{label}: {what} gives the weight of torch.nn.utils.spectral_norm another place, where FSDP "
            f"would not find it; {what} before fully_shard"
        )


def _label(site: NormSite) -> str:
    return f"{site.qualified_name} of {own_class_of(site.module).__name__}"


def _candidate(site: NormSite) -> SpectralNorm:
    """Return a norm as a parametrization of ours that is not registered, sharing all tensors."""
    if isinstance(site.norm, SpectralNorm):
        return site.norm
    if site.is_hook:
        return hook_layout.as_parametrization(site.module, site.norm)
    return _from_stock(site.norm)


def _from_stock(norm: StockSpectralNorm) -> SpectralNorm:
    """Return a parametrization of ours with the contents of a stock one."""
    ours = SpectralNorm.__new__(SpectralNorm)
    ours.__dict__.update(norm.__dict__)
    if "_u" not in norm._buffers:
        object.__setattr__(ours, "n_power_iterations", 1)  # stock has none for a 1-D weight
    object.__setattr__(ours, "origin", "parametrization")
    return ours


def _take(site: NormSite, candidate: SpectralNorm) -> Layer:
    """Register a candidate in its module."""
    module, norm, label = site.module, site.norm, _label(site)
    if site.is_hook:
        hook_layout.replace_hook(module, norm, candidate)
    elif not isinstance(norm, SpectralNorm):
        # The object stays the one that it was, for those who hold it.
        norm.__dict__.update(candidate.__dict__)
        candidate = _with_class(norm, SpectralNorm)
    weight = site.list_.original
    candidate.convert_vectors(compute_dtype(weight.dtype))
    candidate.mend_vectors(weight)
    object.__setattr__(candidate, "label", label)
    return Layer(site.module_name, module, site.tensor_name, candidate)


def own_class_of(module: Module) -> type[Module]:
    """Return the class of a module below that of its parametrizations."""
    if parametrize.is_parametrized(module):
        return cast(type[Module], class_of_parametrizations(module).__bases__[0])
    return type(module)


def _refuse_super_of_class(module: Module) -> None:
    """Raise where ``super(self.__class__, self)`` would find the same method for ever in a subclass."""
    cls = own_class_of(module)
    for name, method in vars(cls).items():
        if name != "__init__" and isinstance(method, FunctionType) and _names_own_class(method):
            raise RuntimeError(
                f"{cls.__name__}.{name} calls super(self.__class__, self) or super(type(self), self), which "
                "calls itself without end once the class of the object is a subclass, and fuse gives it one; "
                "write super()"
            )


def _names_own_class(method: FunctionType) -> bool:
    """Return whether a method calls ``super`` with the class of its object."""
    code = method.__code__
    names: list[Any] = []
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        names += value if isinstance(value, tuple) else [value]
    of_object = (
        ["super", *code.co_varnames[:1], "__class__"],
        ["super", "type", *code.co_varnames[:1]],
    )
    return any(names[i : i + 3] in of_object for i in range(len(names)))


def _warn_of_order(chosen: list[NormSite]) -> None:
    """Warn of modules whose parameters get another order, since some follow a weight that is moved."""
    of_module: dict[Module, list[NormSite]] = {}
    for site in chosen:
        if site.is_hook:
            of_module.setdefault(site.module, []).append(site)
    for module, taken in of_module.items():
        if _order_after(module, taken) != list(map(id, module.parameters())):
            names = ", ".join(_label(site) for site in taken)
            warnings.warn(
                f"{names}: fuse changes the order of the module's parameters, since other parameters follow "
                "the weight. Optimizers find their state by position: load no optimizer checkpoint from "
                "before fuse (or from after unfuse) into the fused model, and fuse before the optimizer is "
                "made",
                stacklevel=3,
            )


def _order_after(module: Module, taken: list[NormSite]) -> list[int]:
    """Return the ids of a module's parameters in the order that they have once hooks are replaced."""
    moved = [module._parameters[f"{site.tensor_name}_orig"] for site in taken]
    own = [p for p in module.parameters(recurse=False) if all(p is not other for other in moved)]
    children = {name: list(child.parameters()) for name, child in module._modules.items() if child}
    if "parametrizations" in module._modules:
        children["parametrizations"] = [*moved, *children["parametrizations"]]  # type: ignore[list-item]
    else:
        children = {"parametrizations": moved, **children}  # type: ignore[dict-item]
    every = [*own, *(p for parameters in children.values() for p in parameters)]
    return list(dict.fromkeys(id(p) for p in every if p is not None))


def _with_class(module: Module, cls: type[_Module]) -> _Module:
    module.__class__ = cls
    return cast(_Module, module)


def _restore(module: Module, tensor_name: str, norm: SpectralNorm) -> None:
    """Make of a layer what it was before it was fused."""
    if norm.origin != "own":  # stock wants the dtype of the weight
        norm.convert_vectors(parametrization_lists(module)[tensor_name].original.dtype)
    if norm.origin == "hook":
        hook_layout.restore_hook(module, tensor_name, norm)
    elif norm.origin == "parametrization":
        _to_stock(norm)
    left = [p for list_ in parametrization_lists(module).values() for p in list_]
    if left and not any(isinstance(p, SpectralNorm) for p in left):
        stock_class(module)


def _to_stock(norm: SpectralNorm) -> None:
    for name in ("order", "backend", "label", "origin"):
        norm.__dict__.pop(name, None)
    if norm.is_vector:
        norm.__dict__.pop("n_power_iterations", None)
    _with_class(norm, StockSpectralNorm)


def _root_of(norm: SpectralNorm) -> Module | None:
    group = None if norm._group is None else norm._group()
    return None if group is None else group.root
