"""Checks of a list of layers, before anything is written. The messages name the layer."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

__all__ = [
    "DimensionError",
    "check_layer",
    "check_lists",
    "check_overlap",
    "check_settings",
    "check_weight",
]


class DimensionError(IndexError, ValueError):
    """``dim`` is out of range. An IndexError as in stock, and a ValueError as for other bad values."""


def check_settings(name: str, n_power_iterations: int, eps: float, order: str) -> None:
    """Raise unless the settings of layer ``name`` make sense."""
    if isinstance(n_power_iterations, bool) or not isinstance(n_power_iterations, int):
        raise TypeError(
            f"{name}: n_power_iterations must be an int, got {type(n_power_iterations).__name__}"
        )
    if n_power_iterations < 1:
        # The first words are stock's, for those who match on them.
        raise ValueError(
            "Expected n_power_iterations to be positive, but "
            f"got n_power_iterations={n_power_iterations} for {name}"
        )
    if n_power_iterations > 2**31 - 1:
        raise ValueError(f"{name}: n_power_iterations={n_power_iterations} is too large")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{name}: eps must be a float, got {type(eps).__name__}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"{name}: eps must be positive and finite, got eps={eps}")
    if order not in ("u_first", "v_first"):
        raise ValueError(f"{name}: order must be 'u_first' or 'v_first', got order={order!r}")


def check_weight(name: str, weight: Tensor, dim: int) -> int:
    """Raise unless the weight of layer ``name`` can be normalized; return ``dim`` as not negative."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: the weight must be a tensor, got {type(weight).__name__}")
    if isinstance(weight, UninitializedTensorMixin):
        raise ValueError(
            f"{name}: the weight of a lazy module is not initialized yet; run a dummy forward first"
        )
    if not (weight.is_floating_point() or weight.is_complex()) or weight.element_size() < 2:
        raise TypeError(f"{name}: the weight must be floating point or complex, got {weight.dtype}")
    if weight.layout != torch.strided:
        raise TypeError(f"{name}: the weight must be a dense tensor, got layout {weight.layout}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{name}: dim must be an int, got {type(dim).__name__}")
    if not -weight.ndim <= dim < weight.ndim:
        raise DimensionError(
            "Dimension out of range (expected to be in range of "
            f"[-{weight.ndim}, {weight.ndim - 1}] but got {dim}) for {name}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{name}: the weight has no elements, its shape is {tuple(weight.shape)}")
    return dim % weight.ndim


def check_layer(name: str, weight: Tensor, u: Tensor | None, v: Tensor | None, dim: int) -> None:
    """Raise unless ``u`` and ``v`` fit the (checked) weight of layer ``name``."""
    rows = weight.shape[dim]
    for vector_name, vector, size in (("u", u, rows), ("v", v, weight.numel() // rows)):
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name}: {vector_name} must be a tensor, got {type(vector).__name__}")
        if vector.shape != (size,):
            raise ValueError(
                f"{name}: {vector_name} must have shape ({size},) for a weight of shape "
                f"{tuple(weight.shape)} with dim={dim}, got {tuple(vector.shape)}"
            )
        if vector.dtype != weight.dtype:
            raise TypeError(
                f"{name}: {vector_name} is {vector.dtype} and the weight {weight.dtype}; "
                "they must be the same"
            )
        if vector.device != weight.device:
            raise ValueError(
                f"{name}: {vector_name} is on {vector.device} and the weight on {weight.device}; "
                "they must be the same"
            )
        if vector.layout != torch.strided or (size > 1 and vector.stride(0) == 0):
            raise ValueError(f"{name}: the elements of {vector_name} must not overlap in memory")
        if vector.requires_grad:
            raise ValueError(f"{name}: {vector_name} is written in place and must not require grad")


def check_lists(weights: Sequence[Tensor], **others: Sequence[object]) -> None:
    """Raise unless all arguments are lists of one length."""
    for name, values in {"weights": weights, **others}.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple, got {type(values).__name__}")
        if len(values) != len(weights):
            raise ValueError(
                f"{name} has {len(values)} entries for {len(weights)} weights; they must be as many"
            )


def check_overlap(us: Sequence[Tensor | None], vs: Sequence[Tensor | None]) -> None:
    """Raise if two of the vectors, which are all written in place, share memory."""
    spans = []
    for list_name, vectors in (("us", us), ("vs", vs)):
        for i, vector in enumerate(vectors):
            if vector is not None and vector.numel() > 0:
                start = vector.data_ptr()
                reach = (vector.numel() - 1) * vector.stride(0) + 1
                span = (start, start + reach * vector.element_size())
                spans.append((str(vector.device), *span, f"{list_name}[{i}]"))
    spans.sort()
    for (device, _, end, name), (next_device, start, _, next_name) in pairwise(spans):
        if device == next_device and start < end:
            raise RuntimeError(
                f"{name} and {next_name} overlap in memory; both are written in place"
            )
