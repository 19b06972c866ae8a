"""Spectral normalization in plain torch: the specification that every backend is tested against.

A weight ``W`` is seen as a matrix ``M`` of ``h`` rows and ``w`` columns: ``dim`` moved to the front,
the rest flattened. Power iteration follows its largest singular value σ with two unit vectors, ``u``
of size ``h`` and ``v`` of size ``w``; the normalized weight is ``W / σ``. Everything here works on one
layer, allocates freely and is differentiable by autograd, so that a reader can check it line by line.

Sources: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018,
algorithm 1; the two orders are those of ``torch.nn.utils.parametrizations.spectral_norm``
(``u_first``) and of the older hook ``torch.nn.utils.spectral_norm`` (``v_first``).

One rule is ours. Where σ is exactly zero, stock divides by it and the layer is NaN for good. Here
``u`` and ``v`` stay as they were and the weight is passed through as it is, with the gradient of the
identity: a zero weight gives zeros, and the layer is normalized as soon as it has left zero.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Normalized",
    "Order",
    "backward",
    "power_iteration",
    "spectral_normalize",
    "weight_matrix",
]

Order = Literal["u_first", "v_first"]


class Normalized(NamedTuple):
    """What one forward of one layer gives: ``W / σ``, σ, and the ``u``, ``v`` that σ was taken with."""

    weight: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor


def weight_matrix(weight: Tensor, dim: int) -> Tensor:
    """Return the weight as a matrix ``(weight.shape[dim], all other dimensions flattened)``.

    A 1-D weight becomes a column. This is stock's ``_reshape_weight_to_matrix``.
    """
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)


def _unit(x: Tensor, eps: float) -> Tensor:
    """Return ``x / max(‖x‖, eps)``, which is ``torch.nn.functional.normalize``."""
    return x / torch.linalg.vector_norm(x).clamp_min(eps)


def power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, *, n_power_iterations: int, eps: float, order: Order
) -> tuple[Tensor, Tensor]:
    """Return ``u`` and ``v`` after ``n_power_iterations`` steps from the given ones."""
    for _ in range(n_power_iterations):
        if order == "u_first":
            u = _unit(matrix @ v, eps)
            v = _unit(matrix.mH @ u, eps)
        else:
            v = _unit(matrix.mH @ u, eps)
            u = _unit(matrix @ v, eps)
    return u, v


def spectral_normalize(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int = 0,
    order: Order = "u_first",
    update: bool = True,
) -> Normalized:
    """Normalize one weight; nothing is written in place.

    Args:
        weight: any floating point or complex dtype and strides, at least one dimension.
        u: shape ``(weight.shape[dim],)``.
        v: shape ``(weight.numel() // weight.shape[dim],)``.
        n_power_iterations: steps from ``u``, ``v``.
        eps: smallest divisor of a vector.
        dim: the dimension that gives the rows.
        order: which vector an iteration renews first.
        update: False keeps ``u`` and ``v`` as they are, as stock does in evaluation.

    Half precision weights are computed in float32; ``sigma``, ``u`` and ``v`` are returned in it.
    A 1-D weight under ``u_first`` is its own singular vector: ``W / max(‖W‖, eps)``, no iteration.
    """
    compute_dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.ndim == 1 and order == "u_first":
        sigma = torch.linalg.vector_norm(weight.to(compute_dtype)).clamp_min(eps)
        normalized = weight.to(compute_dtype) / sigma
        return Normalized(
            normalized.to(weight.dtype), sigma, torch.ones_like(sigma)[None], normalized
        )

    matrix = weight_matrix(weight, dim).to(compute_dtype)
    u, v = u.to(compute_dtype), v.to(compute_dtype)
    with torch.no_grad():
        if update:
            new_u, new_v = power_iteration(
                matrix, u, v, n_power_iterations=n_power_iterations, eps=eps, order=order
            )
            found = torch.vdot(new_u, matrix @ new_v) != 0
            u, v = torch.where(found, new_u, u), torch.where(found, new_v, v)
    sigma = torch.vdot(u, matrix @ v)
    divisor = torch.where(sigma == 0, 1, sigma)
    return Normalized((weight.to(compute_dtype) / divisor).to(weight.dtype), sigma, u, v)


def backward(
    grad_output: Tensor | None,
    grad_sigma: Tensor | None,
    normalized: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    dim: int = 0,
) -> Tensor:
    """Return the gradient of the weight: ``(G − (⟨G, Y⟩ − σ·gσ)·u vᵀ) / σ`` for real weights.

    ``u`` and ``v`` are constants of the forward. Made of differentiable operations, so it gives
    higher derivatives too when ``normalized`` and ``sigma`` carry their own graph.

    Args:
        grad_output: ``G``, the gradient of the normalized weight ``Y``, or None for zero.
        grad_sigma: ``gσ``, the gradient of σ, or None for zero.
        normalized, sigma, u, v: what the forward gave.
        dim: as in the forward.
    """
    moved_shape = normalized.movedim(dim, 0).shape
    rank_one = torch.outer(u, v).reshape(moved_shape).movedim(0, dim)
    is_zero = sigma == 0
    divisor = torch.where(is_zero, 1, sigma)
    total = torch.zeros_like(rank_one)
    if grad_output is not None:
        grad = grad_output.to(sigma.dtype)
        along = torch.where(is_zero, 0, (grad * normalized.to(sigma.dtype)).sum() / divisor)
        total = total + grad / divisor - along * rank_one
    if grad_sigma is not None:
        total = total + grad_sigma * rank_one
    return total.to(normalized.dtype)
