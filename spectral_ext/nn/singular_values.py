"""The largest singular values of a model's weights, without a trace in the model."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.parametrize import ParametrizationList

from ..reference import weight_matrix
from ..spectrum import matrix
from ..validation import check_weight
from .apply import LAYER_TYPES
from .dynamic_class import parametrization_lists
from .evaluation import in_evaluation
from .find import NormSite, norms_of, qualified
from .parametrization import StockSpectralNorm, default_dim

__all__ = ["singular_values"]


def singular_values(
    model: Module,
    k: int = 1,
    *,
    names: Collection[str] | None = None,
    normalized: bool = False,
    tol: float = 1e-6,
    max_iterations: int = 1000,
) -> dict[str, Tensor]:
    """Return the largest singular values of the weights of a model, each seen as a matrix.

    These are the values themselves, not the σ that one step of power iteration has found. Looked at
    are all tensors with a spectral norm (ours, fused or not, or either of stock's) and, in layers
    without one, the weights of ``Linear``, ``Conv1d/2d/3d``, ``ConvTranspose1d/2d/3d`` and
    ``Embedding``. The model stays as it is: its mode, ``u`` and ``v``, gradients and random numbers.

    Args:
        model: a model, or a single layer.
        k: how many values of each; a weight with fewer rows or columns gives those that it has.
        names: the qualified names of the tensors to look at, such as ``"block1.conv.weight"``; None
            for all.
        normalized: whether to look at the weight in use, as in evaluation, and not at the weight
            before its spectral norm.
        tol, max_iterations: see :func:`spectral_ext.spectrum.singular_values`.

    Returns:
        By qualified name a tensor with at most ``k`` values in descending order, float64 for double
        precision, else float32. A weight's rows are those of its norm, or its outputs.

    Raises:
        TypeError, ValueError: an argument does not fit, or a weight has no matrix; the message
            names it.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    matrix.check_positive("k", k)
    matrix.check_iteration(tol, max_iterations)
    if isinstance(names, str):
        raise TypeError(f"names must be a collection of names, got the text {names!r}")
    with torch.no_grad(), in_evaluation(model.modules()):
        found = {name: (w, dim) for name, w, dim in _weights(model, names, normalized)}
    if names is not None and not found.keys() >= set(names):
        unknown = sorted(set(names) - found.keys())
        raise ValueError(f"names: there are no such weights in the model: {unknown}")
    values = {}
    for name, (weight, dim) in found.items():
        as_matrix = weight_matrix(weight, check_weight(name, weight, dim))
        values[name] = matrix.singular_values(
            as_matrix, min(k, *as_matrix.shape), tol=tol, max_iterations=max_iterations
        )
    return values


def _weights(
    model: Module, names: Collection[str] | None, normalized: bool
) -> Iterator[tuple[str, Tensor, int]]:
    """Yield the qualified name, the weight and its ``dim`` of the tensors to look at."""
    for module_name, module in model.named_modules():
        sites: dict[str, NormSite] = {}
        for site in norms_of(module, module_name):
            sites.setdefault(site.tensor_name, site)  # the first norm of a tensor
        plain = ["weight"] if not sites and isinstance(module, LAYER_TYPES) else []
        for tensor_name in (*sites, *plain):
            name = qualified(module_name, tensor_name)
            if names is None or name in names:
                yield name, *_weight(module, tensor_name, sites.get(tensor_name), normalized)


def _weight(
    module: Module, name: str, site: NormSite | None, normalized: bool
) -> tuple[Tensor, int]:
    """Return one tensor, before or after its spectral norm, and the dimension of its rows."""
    if site is not None and site.is_hook:
        if normalized:
            return site.norm.compute_weight(module, do_power_iteration=False), site.norm.dim
        return site.original, site.norm.dim
    list_ = parametrization_lists(module).get(name)
    if list_ is None:
        return getattr(module, name), default_dim(module)
    is_spectral = site is not None and isinstance(site.norm, StockSpectralNorm)
    dim = site.norm.dim if site is not None and is_spectral else default_dim(module)
    # Not the attribute, which parametrize.cached() would keep.
    return (list_() if normalized else _before_norm(list_, site)), dim


def _before_norm(list_: ParametrizationList, site: NormSite | None) -> Tensor:
    """Return what the first spectral norm of a list gets; without one, what the list gives."""
    tensors = [list_.original] if list_.is_tensor else _originals(list_)
    for parametrization in list(list_)[: None if site is None else site.position]:
        tensors = [parametrization(*tensors)]
    return tensors[0]


def _originals(list_: ParametrizationList) -> list[Tensor]:
    return [getattr(list_, f"original{i}") for i in range(list_.ntensors)]
