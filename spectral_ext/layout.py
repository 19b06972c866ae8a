"""The tensors of a call: outputs, the flat buffer of saved vectors, and the dtype to compute in."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["allocate", "allocate_vectors", "compute_dtype", "matrix_shape", "split_saved"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a weight of ``dtype`` is computed: float32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def matrix_shape(weight: Tensor, dim: int) -> tuple[int, int]:
    """Return the sizes of ``u`` and ``v``: rows and columns of the weight as a matrix."""
    rows = weight.shape[dim]
    return rows, weight.numel() // rows


def allocate(weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return uninitialized outputs like the weights, and the flat buffers for ``u, v`` and σ.

    The weights, at least one, share a device and a compute dtype.
    """
    return [torch.empty_like(weight) for weight in weights], *allocate_vectors(weights, dims)


def allocate_vectors(weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the flat buffers of :func:`allocate`."""
    dtype, device = compute_dtype(weights[0].dtype), weights[0].device
    size = sum(sum(matrix_shape(weight, dim)) for weight, dim in zip(weights, dims, strict=True))
    return (
        torch.empty(size, dtype=dtype, device=device),
        torch.empty(len(weights), dtype=dtype, device=device),
    )


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
