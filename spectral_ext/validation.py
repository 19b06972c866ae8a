"""Checks of a list of layers, before anything is written. The messages name the layer."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from .layout import compute_dtype, matrix_shape

__all__ = [
    "DimensionError",
    "check_blocks",
    "check_bool",
    "check_convergence",
    "check_gain",
    "check_integer",
    "check_layer",
    "check_lists",
    "check_number",
    "check_overlap",
    "check_settings",
    "check_target",
    "check_weight",
    "refuse_sharded",
]


class DimensionError(IndexError, ValueError):
    """``dim`` is out of range. An IndexError as in stock, and a ValueError as for other bad values."""


def check_integer(name: str, argument: str, value: object) -> None:
    """Raise TypeError unless ``argument`` of layer ``name`` is an integer of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")


def check_number(name: str, argument: str, value: object) -> None:
    """Raise TypeError unless ``argument`` of layer ``name`` is a real number of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {argument} must be a float, got {type(value).__name__}")


def check_bool(name: str, argument: str, value: object) -> None:
    """Raise TypeError unless ``argument`` of layer ``name`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a bool, got {type(value).__name__}")


def check_settings(name: str, n_power_iterations: int, eps: float, order: str) -> None:
    """Raise unless the settings of layer ``name`` make sense."""
    check_integer(name, "n_power_iterations", n_power_iterations)
    if n_power_iterations < 1:
        # The first words are stock's, for those who match on them.
        raise ValueError(
            "Expected n_power_iterations to be positive, but "
            f"got n_power_iterations={n_power_iterations} for {name}"
        )
    if n_power_iterations > 2**31 - 1:
        raise ValueError(f"{name}: n_power_iterations={n_power_iterations} is too large")
    check_number(name, "eps", eps)
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"{name}: eps must be finite and not negative, got eps={eps}")
    if order not in ("u_first", "v_first"):
        raise ValueError(f"{name}: order must be 'u_first' or 'v_first', got order={order!r}")


def check_target(
    name: str,
    scale: float,
    bound: float | None,
    detach_sigma: bool,
    tol: float,
) -> None:
    """Raise unless it makes sense what layer ``name`` is normalized to, and how precisely."""
    given = {"scale": scale, "tol": tol} | ({} if bound is None else {"bound": bound})
    for argument, value in given.items():
        check_number(name, argument, value)
        if not math.isfinite(value) or value < 0 or (value == 0 and argument != "tol"):
            kind = "not negative" if argument == "tol" else "positive"
            raise ValueError(
                f"{name}: {argument} must be {kind} and finite, got {argument}={value}"
            )
    check_bool(name, "detach_sigma", detach_sigma)
    if bound is not None and scale != 1:
        raise ValueError(
            f"{name}: scale={scale} and bound={bound} exclude each other; "
            "scale divides every weight, bound only one whose norm is larger"
        )


def check_gain(name: str, gain: Tensor | None, weight: Tensor, dim: int) -> None:
    """Raise unless a gain can multiply the rows of a weight."""
    if gain is None:
        return
    if not isinstance(gain, Tensor) or not gain.is_floating_point():
        raise TypeError(f"{name}: gain must be a floating point tensor or None, got {gain!r:.60}")
    if gain.shape not in ((), (weight.shape[dim],)):
        raise ValueError(
            f"{name}: gain must have shape () or ({weight.shape[dim]},), got {tuple(gain.shape)}"
        )
    if gain.device != weight.device:
        raise ValueError(
            f"{name}: gain is on {gain.device} and the weight on {weight.device}; "
            "they must be the same"
        )


def check_blocks(name: str, blocks: int) -> None:
    """Raise unless ``blocks`` is a number of blocks."""
    check_integer(name, "blocks", blocks)
    if blocks < 1:
        raise ValueError(f"{name}: blocks must be at least 1, got blocks={blocks}")


def check_weight(name: str, weight: Tensor, dim: int) -> int:
    """Raise unless the weight of layer ``name`` can be normalized; return ``dim`` as not negative."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: the weight must be a tensor, got {type(weight).__name__}")
    if isinstance(weight, UninitializedTensorMixin):
        raise ValueError(
            f"{name}: the weight of a lazy module is not initialized yet; run a dummy forward first"
        )
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"{name}: the weight must be floating point or complex, got {weight.dtype}")
    if weight.element_size() < 2:
        raise TypeError(
            f"{name}: {weight.dtype} weights are not supported; convert the weight to bfloat16, "
            "float16 or float32"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"{name}: the weight must be a dense tensor, got layout {weight.layout}")
    check_integer(name, "dim", dim)
    if not -weight.ndim <= dim < weight.ndim:
        raise DimensionError(
            "Dimension out of range (expected to be in range of "
            f"[-{weight.ndim}, {weight.ndim - 1}] but got {dim}) for {name}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{name}: the weight has no elements, its shape is {tuple(weight.shape)}")
    return int(dim) % weight.ndim


def refuse_sharded(name: str, weight: Tensor) -> None:
    """Raise TypeError if the weight of layer ``name`` is a ``DTensor``, of FSDP2 or tensor parallelism."""
    if hasattr(weight, "to_local"):
        raise TypeError(
            f"{name}: the weight is a DTensor, as FSDP2 and tensor parallelism make it, and its parts "
            "are on several ranks; put spectral_norm on the layer before fully_shard instead"
        )


def check_layer(
    name: str, weight: Tensor, u: Tensor | None, v: Tensor | None, dim: int, blocks: int = 1
) -> None:
    """Raise unless ``u`` and ``v`` fit the (checked) weight of layer ``name``.

    Those of ``blocks`` equal parts of dimension 0 stand one after the other.
    """
    if weight.shape[0] % blocks:
        raise ValueError(
            f"{name}: blocks={blocks} does not divide the first dimension of a weight of shape "
            f"{tuple(weight.shape)}"
        )
    rows, columns = matrix_shape(weight, dim)  # of the sizes alone: the weight may be distributed
    if dim == 0:
        rows //= blocks
    else:
        columns //= blocks
    for vector_name, vector, size in (("u", u, blocks * rows), ("v", v, blocks * columns)):
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name}: {vector_name} must be a tensor, got {type(vector).__name__}")
        if vector.shape != (size,):
            of_blocks = f" and blocks={blocks}" if blocks > 1 else ""
            raise ValueError(
                f"{name}: {vector_name} must have shape ({size},) for a weight of shape "
                f"{tuple(weight.shape)} with dim={dim}{of_blocks}, got {tuple(vector.shape)}"
            )
        if vector.dtype not in (weight.dtype, compute_dtype(weight.dtype)):
            raise TypeError(
                f"{name}: {vector_name} is {vector.dtype} and the weight {weight.dtype}; "
                "they must be the same, or the vectors float32 for a half precision weight"
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
    if u is not None and v is not None and u.dtype != v.dtype:
        raise TypeError(f"{name}: u is {u.dtype} and v {v.dtype}; they must be the same")


def check_lists(weights: Sequence[Tensor], **others: Sequence[object]) -> None:
    """Raise unless all arguments are lists of one length."""
    for name, values in {"weights": weights, **others}.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple, got {type(values).__name__}")
        if len(values) != len(weights):
            raise ValueError(
                f"{name} has {len(values)} entries for {len(weights)} weights; it must have one "
                "entry per weight"
            )


def check_convergence(convergence: Tensor, count: int) -> None:
    """Raise unless a report of ``count`` layers fits into the tensor."""
    if not isinstance(convergence, Tensor) or not convergence.is_floating_point():
        raise TypeError(f"convergence must be a floating point tensor, got {convergence!r:.60}")
    if convergence.shape != (2, count):
        raise ValueError(
            f"convergence must have shape (2, {count}), got {tuple(convergence.shape)}"
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
