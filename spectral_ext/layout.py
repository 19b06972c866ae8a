"""The tensors of a call: outputs, the flat buffer of saved vectors, and the dtypes they have."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = [
    "allocate",
    "allocate_vectors",
    "compute_dtype",
    "grad_dtypes",
    "matrix_shape",
    "output_dtype",
    "split_saved",
    "without_autocast",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a weight of ``dtype`` is computed: float32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def matrix_shape(weight: Tensor, dim: int) -> tuple[int, int]:
    """Return the sizes of ``u`` and ``v``: rows and columns of the weight as a matrix."""
    rows = weight.shape[dim]
    return rows, weight.numel() // rows


def output_dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a normalized weight: ``dtype``, if one is given and the weight is float32."""
    return dtype if dtype is not None and weight.dtype == torch.float32 else weight.dtype


def grad_dtypes(outputs: Sequence[Tensor], widen: Sequence[bool]) -> list[torch.dtype]:
    """Return the dtypes of weights: float32 for half outputs where ``widen``, which may be empty, is true."""
    flags = widen or [False] * len(outputs)
    return [
        compute_dtype(output.dtype) if is_wide else output.dtype
        for output, is_wide in zip(outputs, flags, strict=True)
    ]


def allocate(
    weights: Sequence[Tensor], dims: Sequence[int], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return uninitialized outputs like the weights, and the flat buffers for ``u, v`` and σ.

    The weights, at least one, share a device and a compute dtype. The outputs of float32 weights have
    ``dtype``, if one is given.
    """
    outputs = [torch.empty_like(weight, dtype=output_dtype(weight, dtype)) for weight in weights]
    return outputs, *allocate_vectors(weights, dims)


def allocate_vectors(weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the flat buffers of :func:`allocate`."""
    dtype, device = compute_dtype(weights[0].dtype), weights[0].device
    size = sum(sum(matrix_shape(weight, dim)) for weight, dim in zip(weights, dims, strict=True))
    return (
        torch.empty(size, dtype=dtype, device=device),
        torch.empty(len(weights), dtype=dtype, device=device),
    )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which ``torch.autocast`` leaves the matrix products of a device alone.

    A power iteration in half precision would lose what it gains.
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def split_saved(
    saved: Tensor, weights: Sequence[Tensor], dims: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Return views of ``saved`` as ``(u, v)`` for every layer."""
    sizes = [
        size
        for weight, dim in zip(weights, dims, strict=True)
        for size in matrix_shape(weight, dim)
    ]
    vectors = saved.split(sizes)
    return list(zip(vectors[::2], vectors[1::2], strict=True))
