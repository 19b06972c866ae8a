"""Checks of an operator's arguments, in the words of ``csrc/checks.cpp``, before anything is written.

The kernels follow addresses: no argument that Python can build may lead them outside of a tensor.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...layout import compute_dtype

__all__ = [
    "DTYPES",
    "Overlaps",
    "check_count",
    "check_flat",
    "check_memory",
    "check_one_dtype",
    "check_output",
    "check_same",
    "check_settings",
    "check_target",
    "check_tensor",
    "check_vector",
    "checked_dim",
    "common_dtype",
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_ITERATIONS = 2**31 - 1


def check_count(values: Sequence[object], count: int, name: str) -> None:
    """Raise unless a list has an entry for each layer."""
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} layers")


def common_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which all layers of a call are computed."""
    return compute_dtype(weights[0].dtype) if weights else torch.float32


def check_memory(tensor: Tensor, device: torch.device, name: str) -> int:
    """Raise unless a kernel may follow the tensor's address; return how many bytes it reaches."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be strided, got {tensor.layout}")
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(f"{name} is a lazy negation or conjugation; resolve it first")
    count = tensor.numel()
    if count > 0 and not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1 + sum((size - 1) * stride for size, stride in steps)
    end = (tensor.storage_offset() + count) * tensor.element_size()
    if count > 0 and end > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} reaches beyond its storage (was it resized or freed?)")
    return count * tensor.element_size()


def check_tensor(
    tensor: Tensor, device: torch.device, dtype: torch.dtype, layer: int, name: str
) -> int:
    """Raise unless a tensor has a dtype and a place that the kernels know; return its bytes."""
    if tensor.dtype not in DTYPES:
        expected = "float32, float64, bfloat16 or float16"
        raise TypeError(f"{name} of layer {layer} is {_type(tensor)}; expected {expected}")
    reach = check_memory(tensor, device, f"{name} of layer {layer}")
    if compute_dtype(tensor.dtype) != dtype:
        raise TypeError(
            f"layer {layer} is {_type(tensor)}; float64 layers need a call of their own"
        )
    return reach


def check_dense(tensor: Tensor, layer: int) -> None:
    """Raise unless the elements of an output fill one block of memory."""
    if not (tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)):
        raise ValueError(f"the output of layer {layer} must be dense and must not overlap itself")


def check_output(output: Tensor, weight: Tensor, layer: int) -> int:
    """Raise unless an output fits its weight, which it may be; return its bytes."""
    name = f"the output of layer {layer}"
    narrowed = weight.dtype == torch.float32 and output.dtype in (torch.float16, torch.bfloat16)
    reach = check_same(output, weight, name, output.dtype if narrowed else None)
    if not (output.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(output)):
        raise ValueError(f"{name} must be dense and must not overlap itself")
    if narrowed and output.stride() != weight.stride():
        raise ValueError(
            f"{name} has a half type, for which it must have the strides of its weight"
        )
    return reach


def check_same(tensor: Tensor, like: Tensor, name: str, dtype: torch.dtype | None = None) -> int:
    """Raise unless a tensor has device, shape and dtype (or that dtype) of another; return its bytes."""
    reach = check_memory(tensor, like.device, name)
    if tensor.dtype != (dtype or like.dtype):
        raise TypeError(f"{name} is {_type(tensor)}, expected {_type(like)}")
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(like.shape)}")
    return reach


def checked_dim(weight: Tensor, dim: int, layer: int) -> int:
    """Return ``dim`` as not negative; raise if the weight has no such dimension or no elements."""
    if weight.numel() == 0:
        raise ValueError(f"the weight of layer {layer} has no elements")
    if not -weight.ndim <= dim < weight.ndim:
        raise IndexError(
            f"dim of layer {layer} is {dim}, out of range for a weight of {weight.ndim} dimensions"
        )
    return dim % weight.ndim


def check_vector(vector: Tensor, size: int, weight: Tensor, name: str, layer: int) -> int:
    """Raise unless u or v fits its weight; return its bytes."""
    reach = check_memory(vector, weight.device, f"{name} of layer {layer}")
    wide = compute_dtype(weight.dtype)
    if vector.dtype not in (weight.dtype, wide):
        expected = _type(weight) if weight.dtype == wide else f"{_type(weight)} or float32"
        raise TypeError(f"{name} of layer {layer} is {_type(vector)}, expected {expected}")
    if vector.shape != (size,):
        raise ValueError(
            f"{name} of layer {layer} must have shape [{size}], got {list(vector.shape)}"
        )
    if size > 1 and vector.stride(0) <= 0:
        raise ValueError(f"the elements of {name} of layer {layer} overlap in memory")
    return reach


def check_one_dtype(u: Tensor, v: Tensor, layer: int) -> None:
    """Raise unless u and v have the same dtype."""
    if u.dtype != v.dtype:
        raise TypeError(
            f"u and v of layer {layer} are {_type(u)} and {_type(v)}, expected one type"
        )


def check_settings(n_power_iterations: int, eps: float, tol: float, layer: int) -> None:
    """Raise unless the settings of a layer make sense."""
    if not 1 <= n_power_iterations <= _MAX_ITERATIONS:
        raise ValueError(
            f"n_power_iterations of layer {layer} is {n_power_iterations}, "
            f"expected 1 to {_MAX_ITERATIONS}"
        )
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps of layer {layer} is {eps}, expected a positive number")
    if not (tol >= 0 and math.isfinite(tol)):
        raise ValueError(f"tol of layer {layer} is {tol}, expected a number that is not negative")


def check_target(scale: float, layer: int) -> None:
    """Raise unless a layer can be normalized to that."""
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale of layer {layer} is {scale}, expected a positive number")


def check_flat(
    tensor: Tensor, size: int, dtype: torch.dtype, device: torch.device, name: str
) -> int:
    """Raise unless a tensor is a flat buffer of that size; return its bytes."""
    if (
        tensor.device != device
        or tensor.layout != torch.strided
        or tensor.dtype != dtype
        or tensor.shape != (size,)
        or not tensor.is_contiguous()
        or tensor.is_neg()
    ):
        raise ValueError(
            f"{name} must be a contiguous tensor on {device} of shape [{size}] and dtype {dtype}"
        )
    return check_memory(tensor, device, name)


class Overlaps:
    """Refuses calls in which something that is written shares memory with anything else."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int, str, bool]] = []

    def add(self, tensor: Tensor, reach: int, name: str, written: bool) -> None:
        """Note the memory of a tensor, so many bytes."""
        if reach > 0:
            begin = tensor.data_ptr()
            self._spans.append((begin, begin + reach, name, written))

    def check(self) -> None:
        """Raise if a tensor that is written overlaps another one."""
        _check_spans(sorted(self._spans))


def _check_spans(spans: Iterable[tuple[int, int, str, bool]]) -> None:
    last = last_written = (0, 0, "")  # those that reach furthest so far
    for begin, end, name, written in spans:
        _, other_end, other = last if written else last_written
        if other_end > begin:
            raise RuntimeError(f"{other} and {name} overlap in memory, and one of them is written")
        if end > last[1]:
            last = (begin, end, name)
        if written and end > last_written[1]:
            last_written = (begin, end, name)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
