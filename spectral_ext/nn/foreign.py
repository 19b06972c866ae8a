"""Weights that other code normalizes or computes, and matrices that have another name than ``weight``."""

from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils.parametrize import ParametrizationList

from .dynamic_class import parametrization_lists

__all__ = ["computed_by_others", "other_matrices"]

# What hooks and wrappers leave in a module in place of a parameter or beside it: PyTorch's weight_norm
# and prune, and the wrappers that keep `weight_bar`, `weight_u` and `weight_v`.
_SUFFIXES = ("_orig", "_bar", "_g", "_v", "_u", "_mask")
# The vectors of layers that normalize in their own forward, as those of BigGAN-PyTorch.
_VECTORS = ("u", "u0")


def computed_by_others(module: Module, name: str) -> str | None:
    """Return why a tensor should not get a spectral norm on top of what other code does; else None."""
    cls = type(module).__name__
    for parametrization in parametrization_lists(module).get(name, ()):
        kind = type(parametrization).__name__
        if any(word in kind.lower() for word in ("norm", "orthogonal")):
            return f"the parametrization {kind} normalizes it already"
    sources = [name + suffix for suffix in _SUFFIXES if _has(module, name + suffix)]
    if sources:
        return f"{cls} computes it from {', '.join(sources)}"
    weight = module._parameters.get(name)
    if weight is not None and not isinstance(weight, UninitializedTensorMixin):
        for vector in _VECTORS:
            buffer = module._buffers.get(vector)
            if buffer is not None and weight.ndim > 1 and buffer.numel() in weight.shape[:2]:
                return f"{cls} has a spectral norm of its own, with the buffer {vector!r}"
    return None


def other_matrices(module: Module, name: str) -> list[str]:
    """Return the names of a module's matrices where it has none of the name: those of an RNN, say."""
    if isinstance(module, ParametrizationList) or _has(module, name):
        return []
    return [
        other
        for other, parameter in module._parameters.items()
        if parameter is not None
        and not isinstance(parameter, UninitializedTensorMixin)
        and parameter.ndim > 1
        and "bias" not in other
        and not _is_source(module, other)
    ]


def _is_source(module: Module, name: str) -> bool:
    """Return whether a hook computes another tensor from a parameter, which it puts beside it."""
    bases = (name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix))
    return any(isinstance(module.__dict__.get(base), Tensor) for base in bases)


def _has(module: Module, name: str) -> bool:
    return name in module._parameters or name in module._buffers
