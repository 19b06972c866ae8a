"""The flat buffer of saved vectors, and the dtype that a weight is computed in."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["compute_dtype", "empty_saved", "matrix_shape", "split_saved"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a weight of ``dtype`` is computed: float32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def matrix_shape(weight: Tensor, dim: int) -> tuple[int, int]:
    """Return the sizes of ``u`` and ``v``: rows and columns of the weight as a matrix."""
    rows = weight.shape[dim]
    return rows, weight.numel() // rows


def empty_saved(weights: Sequence[Tensor], dims: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized buffer for ``u`` and ``v`` of every layer."""
    size = sum(sum(matrix_shape(weight, dim)) for weight, dim in zip(weights, dims, strict=True))
    return torch.empty(size, dtype=dtype, device=weights[0].device)


def split_saved(
    saved: Tensor, weights: Sequence[Tensor], dims: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Return views of ``saved`` as ``(u, v)`` for every layer."""
    sizes = [
        size for weight, dim in zip(weights, dims, strict=True) for size in matrix_shape(weight, dim)
    ]
    vectors = saved.split(sizes)
    return list(zip(vectors[::2], vectors[1::2], strict=True))
