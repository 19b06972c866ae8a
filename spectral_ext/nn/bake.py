"""A model without spectral norms that computes what one with them does in evaluation."""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..layout import compute_dtype, without_autocast
from ..reference import norm_of, weight_matrix
from .dynamic_class import (
    GROUP,
    class_of_parametrizations,
    exchange_class,
    parametrization_lists,
    stock_class,
    unwrap,
)
from .evaluation import in_evaluation
from .find import find_norms
from .group import group_of
from .hook import GroupHook
from .hook_layout import remove_hook, was_called
from .parametrization import SpectralNorm, StockHook
from .register import LazyNorm
from .sharded import is_sharded

__all__ = ["bake"]

_Model = TypeVar("_Model", bound=Module)


def bake(model: _Model, *, inplace: bool = False) -> _Model:
    """Fold spectral norms into the weights: return a plain model with ``W/σ`` in their place.

    For deployment (``torch.export``, ONNX, TorchScript, quantization, C++): the result has the classes,
    parameters and ``state_dict`` keys that the model had before it was normalized, and needs no
    spectral_ext. Weights are as in evaluation, also where the model is in training; ``u`` and ``v`` stay
    as they are. Gains, bounds, blocks and operator norms are folded like all else. The layers of a
    fused model are computed in one call.

    A tensor with a spectral norm is folded whole, with all parametrizations that are stacked on it, before
    or after the norm. Parametrizations of other tensors stay. Layers that share a weight share the new
    one where it is the same for both: always in a fused model with equal settings, while stock's
    layers each have a σ of their own.

    Some modules read the weight of a layer with PyTorch's hook and never call the layer, as
    ``nn.MultiheadAttention`` does with its ``out_proj``. The hook never runs, and the weight is used before
    normalization. So a layer that was not called keeps its weight as it is, if its ``u`` and ``v`` were
    never iterated. A trained layer that was not called in the last forwards is folded: its ``u`` and ``v``
    show that it was called before. In a model of which no layer has ever run, all but the ``out_proj`` of
    ``nn.MultiheadAttention`` are folded, as they are in evaluation.

    Args:
        model: any model, or a single layer; its layers may have our spectral norm, fused or not, or
            either of stock's.
        inplace: change ``model`` itself; else it stays as it is, and a copy is changed.

    Returns:
        The plain model, in the mode (training or evaluation) of ``model``. Its new weights are parameters
        (or buffers) that require gradients where the old ones do.

    Raises:
        TypeError: it is no module, or was compiled or scripted: bake the model that went in.
        ValueError: there is no spectral norm in it, or a lazy layer that has no weight yet. The message
            names the layer. Nothing was changed.

    Warns:
        UserWarning: the ``u`` and ``v`` of a layer with PyTorch's hook were never iterated. The message names
            the layer, and says whether it keeps its weight (it was not called) or is folded with a wrong σ
            (it was). The ``out_proj`` of ``nn.MultiheadAttention`` keeps its weight without a warning.
    """
    _check(model)
    raw = _find_raw(model)
    with torch.inference_mode(False), torch.no_grad():
        if not inplace:
            model = copy.deepcopy(model, _results_of_hooks(model))
        tensors = list(_find(model))
        values = _values_in_evaluation(model, tensors)
        for place in raw:
            values[place] = tensors[place].raw
        # Nothing below raises.
        for root in model.modules():
            if GROUP in root.__dict__:
                unwrap(root)
        made: dict[tuple[int, ...], list[Tensor]] = {}
        for tensor, value in zip(tensors, values, strict=True):
            known = made.setdefault(tensor.original_ids, [])
            plain = next((other for other in known if torch.equal(other, value)), None)
            if plain is None:
                plain = tensor.plain(value)
                known.append(plain)
            tensor.replace(plain)
    return model


@dataclass(frozen=True)
class _Normalized:
    """A tensor of a module that has a spectral norm, of any make."""

    module: Module
    name: str
    hook: StockHook | None

    @property
    def norms(self) -> Iterable[Module]:
        """The parametrizations, and what is in them."""
        return () if self.hook else parametrization_lists(self.module)[self.name].modules()

    @property
    def originals(self) -> list[Tensor]:
        """What the tensor is computed from; several with some parametrizations below ours."""
        if self.hook:
            return [self.module.get_parameter(f"{self.name}_orig")]
        list_ = parametrization_lists(self.module)[self.name]
        return [*list_.parameters(recurse=False), *list_.buffers(recurse=False)]

    @property
    def original_ids(self) -> tuple[int, ...]:
        """What layers with a tied weight have in common."""
        return tuple(map(id, self.originals))

    @property
    def raw(self) -> Tensor:
        """The weight before normalization, of a layer that came with PyTorch's hook."""
        if self.hook:
            return self.originals[0]
        return parametrization_lists(self.module)[self.name].original

    @property
    def fused_norm(self) -> SpectralNorm | None:
        """The parametrization of a fused layer that came with PyTorch's hook."""
        norm = None if self.hook else parametrization_lists(self.module)[self.name][0]
        return norm if isinstance(norm, SpectralNorm) and norm._hook is not None else None

    @property
    def was_called(self) -> bool:
        """Whether PyTorch's hook has run, as far as the module knows."""
        if self.hook:
            return was_called(self.module, self.hook)
        norm = self.fused_norm
        return norm is not None and (norm._hook.called or norm._last_weight is not None)

    @property
    def was_iterated(self) -> bool:
        """Whether ``u`` and ``v`` come from power iterations: ``W`` maps each near to the other.

        Random vectors do not pass, but for small weights by chance: both products are needed, since in a
        weight with one row ``u`` is ±1 and always fits. A σ of 0 does not pass: it shows no iteration, and
        a weight of 0 is best left alone (PyTorch's hook makes NaN of it).
        """
        norm = self.fused_norm
        if not self.hook and norm is None:
            return True  # it was iterated when it was made
        weight: Any = self.raw
        if self.hook:
            vectors = [self.module._buffers[self.name + end] for end in ("_u", "_v")]
            dim = self.hook.dim
        else:
            assert norm is not None
            norm.check(weight)
            vectors, dim = [norm._u, norm._v], norm.dim
        u, v = vectors
        assert u is not None and v is not None
        if weight.is_meta or u.is_meta:
            return True  # not known
        with torch.no_grad(), without_autocast(u.device):
            weight = weight.full_tensor() if is_sharded(weight) else weight
            dtype = compute_dtype(u.dtype)
            u, v, matrix = u.to(dtype), v.to(dtype), weight_matrix(weight, dim).to(u.device, dtype)
            forward, backward = matrix @ v, matrix.T @ u
            sigma, largest = u.dot(forward).real, torch.maximum(norm_of(forward), norm_of(backward))
            return bool((sigma > 0) & (sigma >= 0.5 * largest))

    def value(self) -> Tensor:
        """Return the tensor as it is now."""
        if self.hook:
            weight: Tensor = self.hook.compute_weight(self.module, do_power_iteration=False)
            return weight
        return parametrization_lists(self.module)[self.name]()

    def plain(self, value: Tensor) -> Tensor:
        """Return a parameter with a value, or a tensor for a buffer."""
        originals, value = self.originals, value.detach().clone()
        if not any(isinstance(original, Parameter) for original in originals):
            return value
        return Parameter(value, any(original.requires_grad for original in originals))

    def replace(self, plain: Tensor) -> None:
        """Take the norm off, and put a plain tensor there."""
        module, name = self.module, self.name
        if self.hook:
            remove_hook(module, self.hook)
        else:
            lists = parametrization_lists(module)
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, GroupHook) and hook.name == name:
                    del module._forward_pre_hooks[key]
            del lists[name]
            if lists:
                stock_class(module)
            else:
                del module._modules["parametrizations"]
                cls = class_of_parametrizations(module)
                exchange_class(module, cls, cls.__bases__[0])
        if isinstance(plain, Parameter):
            setattr(module, name, plain)  # RNNs listen
        else:
            module.register_buffer(name, plain)


def _find(model: Module) -> Iterator[_Normalized]:
    """Yield each tensor with a norm once, whatever is stacked on it."""
    found = {(id(site.module), site.tensor_name): site for site in find_norms(model)}
    for site in found.values():
        yield _Normalized(site.module, site.tensor_name, site.norm if site.is_hook else None)


def _find_raw(model: Module) -> list[int]:
    """Return the places of the tensors that keep their weight; warn of vectors that were never iterated."""
    raw = []
    names = {module: name for name, module in model.named_modules()}
    tensors = list(_find(model))
    of_hooks = [tensor for tensor in tensors if tensor.hook or tensor.fused_norm is not None]
    has_run = any(tensor.was_called or tensor.was_iterated for tensor in of_hooks)
    for place, tensor in enumerate(tensors):
        if tensor.was_iterated:
            continue
        name = names[tensor.module]
        label = f"{name}.{tensor.name}" if name else tensor.name
        is_read = _is_read_by_attention(model, name)
        if tensor.was_called or not (
            has_run or is_read
        ):  # a model that never ran is as in evaluation
            warnings.warn(
                f"{label}: the u and v of the layer were never iterated, so its baked weight is divided by "
                "a wrong σ, as in evaluation. Run the model in training before bake, or load trained u and v",
                stacklevel=3,
            )
            continue
        raw.append(place)
        if not is_read:
            warnings.warn(
                f"{label}: the layer was never called and its u and v were never iterated, so bake leaves "
                "its weight as it is. That is right if another module reads the weight. If not, run the "
                "model in training before bake, or load trained u and v",
                stacklevel=3,
            )
    return raw


def _is_read_by_attention(model: Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    attention = torch.nn.MultiheadAttention
    return child == "out_proj" and isinstance(model.get_submodule(parent), attention)


def _check(model: Module) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        label = name or type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{label} is a ScriptModule; bake the model before scripting it")
        if "_orig_mod" in module._modules:
            raise TypeError(f"{label} was made by torch.compile; bake the model that went in")
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, LazyNorm):
                raise ValueError(f"{label} is lazy and has no weight before its first forward")
    if not any(True for _ in _find(model)):
        raise ValueError(f"{type(model).__name__} has no spectral norm to bake")


def _results_of_hooks(model: Module) -> dict[int, Tensor]:
    """Return what ``deepcopy`` takes for tensors in a graph, which hooks have left in the modules."""
    attributes = (value for module in model.modules() for value in module.__dict__.values())
    return {id(x): x.detach() for x in attributes if isinstance(x, Tensor) and not x.is_leaf}


def _values_in_evaluation(model: Module, tensors: list[_Normalized]) -> list[Tensor]:
    """Return all tensors as they are in evaluation; the layers of a group are computed together."""
    norms = (norm for tensor in tensors for norm in tensor.norms)
    with in_evaluation(norms), ExitStack() as entered:
        for device in {original.device for tensor in tensors for original in tensor.originals}:
            entered.enter_context(without_autocast(device))
        for root in model.modules():
            if GROUP in root.__dict__:
                entered.enter_context(group_of(root).normalized())
        return [tensor.value() for tensor in tensors]
