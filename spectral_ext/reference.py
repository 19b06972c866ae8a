"""Spectral normalization in plain torch: the specification that every backend is tested against.

A weight ``W`` is seen as a matrix ``M`` of ``h`` rows and ``w`` columns: ``dim`` moved to the front,
the rest flattened. Power iteration follows its largest singular value σ with two unit vectors, ``u``
of size ``h`` and ``v`` of size ``w``; the normalized weight is ``W / σ``. Everything here works on one
layer, allocates freely and is differentiable by autograd, so that a reader can check it line by line.

Sources: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018,
algorithm 1; the two orders are those of ``torch.nn.utils.parametrizations.spectral_norm``
(``u_first``) and of the older hook ``torch.nn.utils.spectral_norm`` (``v_first``).

Two rules are ours. Where σ is exactly zero, stock divides by it and the layer is NaN for good. Here
``u`` and ``v`` stay as they were and the weight is passed through as it is, with the gradient of the
identity: a zero weight gives zeros, and the layer is normalized as soon as it has left zero. And
without an update ``u`` and ``v`` whose norms are off, as those of an averaged model are, count as if
they were divided by them.

A layer may have another target than σ = 1: ``scale`` makes it ``c``, a soft ``bound`` leaves a weight
alone whose σ is at most ``c``. With ``tol`` an iteration stops once ``u`` and ``v`` have settled.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Normalized",
    "Order",
    "backward",
    "divisor",
    "jvp",
    "power_iteration",
    "spectral_normalize",
    "unit_vectors",
    "weight_matrix",
]

Order = Literal["u_first", "v_first"]
"""What an iteration makes first: ``u = Mv``, as stock's parametrization, or ``v = Mᵀu``, as its hook."""


class Normalized(NamedTuple):
    """What one forward of one layer gives: ``W / σ``, σ, and the ``u``, ``v`` that σ was taken with."""

    weight: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor
    residual: Tensor
    """``‖Mᵀu − ‖Mv‖·v‖ / σ`` of the last iteration (``v_first``: with u and v exchanged), 0-D.

    NaN without a ``tol``.
    """
    iterations: Tensor
    """How many iterations were made, 0-D."""


def weight_matrix(weight: Tensor, dim: int) -> Tensor:
    """Return the weight as a matrix ``(weight.shape[dim], all other dimensions flattened)``.

    A 1-D weight becomes a column. This is stock's ``_reshape_weight_to_matrix``.
    """
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)


def _unit(x: Tensor, eps: float) -> Tensor:
    """Return ``x / max(‖x‖, eps)``, which is ``torch.nn.functional.normalize``."""
    return x / torch.linalg.vector_norm(x).clamp_min(eps)


def power_iteration(
    matrix: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    n_power_iterations: int,
    eps: float,
    order: Order,
    tol: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``u`` and ``v`` after up to ``n_power_iterations`` steps, residual and number of steps.

    A step begins with a vector and multiplies it by ``M`` and ``Mᵀ``. ``u_first``: with ``v``, to ``u``
    in the direction of ``Mv``, and then ``Mᵀu``. The pair of that ``u`` and the old ``v`` misses
    ``Mᵀu = σv`` by ``‖Mᵀu − ‖Mv‖·v‖ = √(‖Mᵀu‖² − ‖Mv‖²)``: the two norms of a step tell how far it went.
    ``tol > 0`` stops after the first step for which this, over ``‖Mᵀu‖``, is at most ``tol``. (Of the new
    ``u`` and ``v`` the residual is smaller, and ``Mᵀu − σv`` is zero whatever they are.) The difference
    of squares resolves about ``1e-3`` in float32, which is an error of ``1e-6`` in σ. It counts on a unit
    vector to begin with: half precision vectors, whose norms are off by up to 0.4 %, resolve 0.1 in their
    first step.
    """
    dtype = torch.float64 if not matrix.is_complex() else torch.complex128
    residual = matrix.real.new_full((), torch.nan)
    iterations = torch.zeros_like(residual)
    done = torch.zeros_like(residual, dtype=torch.bool)
    for _ in range(n_power_iterations):
        if order == "u_first":
            first = matrix @ v
            new_u = _unit(first, eps)
            second = matrix.mH @ new_u
            new_v = _unit(second, eps)
        else:
            first = matrix.mH @ u
            new_v = _unit(first, eps)
            second = matrix @ new_v
            new_u = _unit(second, eps)
        u, v = torch.where(done, u, new_u), torch.where(done, v, new_v)
        iterations = iterations + ~done
        if tol > 0:
            before, after = (
                torch.linalg.vector_norm(x.to(dtype)).square() for x in (first, second)
            )
            gap = (after - before).clamp_min(0)
            missed = torch.where(gap == 0, 0, gap / after).sqrt().to(residual.dtype)
            residual = torch.where(done, residual, missed)
            done = done | (gap <= tol * tol * after)
    return u, v, residual, iterations


def unit_vectors(u: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``u`` and ``v`` in ``dtype``, divided by their norms if these are off by more than rounding.

    What averages have done to them is undone; unit vectors keep their bits.
    """
    slack = 2**-5 if u.dtype in (torch.float16, torch.bfloat16) else 1e-4
    u, v = u.to(dtype), v.to(dtype)
    norms = [
        torch.linalg.vector_norm(x.to(torch.promote_types(dtype, torch.float64))) for x in (u, v)
    ]
    square = (norms[0] * norms[1]).square()
    off = ((square - 1).abs() > slack) & (square > 0) & square.isfinite()
    u, v = (
        torch.where(off, (x / norm.to(x.real.dtype)), x)
        for x, norm in zip((u, v), norms, strict=True)
    )
    return u, v


def divisor(sigma: Tensor, scale: float = 1.0, soft: bool = False) -> Tensor:
    """Return by what a weight is divided: ``σ/c``, soft ``max(1, σ/c)``; 1 where σ is zero."""
    return torch.where(_left_alone(sigma, scale, soft), 1, sigma / scale)


def _left_alone(sigma: Tensor, scale: float, soft: bool) -> Tensor:
    if soft:
        return (sigma.real if sigma.is_complex() else sigma) <= scale
    return sigma == 0


def spectral_normalize(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int = 0,
    order: Order = "u_first",
    tol: float = 0.0,
    scale: float = 1.0,
    soft: bool = False,
    detach_sigma: bool = False,
    update: bool = True,
) -> Normalized:
    """Normalize one weight; nothing is written in place.

    Args:
        weight: any floating point or complex dtype and strides, at least one dimension.
        u: shape ``(weight.shape[dim],)``.
        v: shape ``(weight.numel() // weight.shape[dim],)``.
        n_power_iterations: steps from ``u``, ``v``; with ``tol`` at most so many.
        eps: smallest divisor of a vector.
        dim: the dimension that gives the rows.
        order: which vector an iteration renews first.
        tol: stop where :func:`power_iteration` says; 0 makes all steps.
        scale: ``c``, the largest singular value that the result has.
        soft: leave a weight alone whose σ is at most ``scale``: ``W / max(1, σ/c)``.
        detach_sigma: count σ as a constant in the gradient of the result.
        update: False keeps ``u`` and ``v`` as they are, as stock does in evaluation.

    Half precision weights are computed in float32; ``sigma``, ``u`` and ``v`` are returned in it.
    A 1-D weight under ``u_first`` is its own singular vector: σ is ``max(‖W‖, eps)``, no iteration.

    Sources of the soft bound: Behrmann et al., "Invertible Residual Networks", ICML 2019, section 2.1;
    van Amersfoort et al., "On Feature Collapse and Deep Kernel Learning", 2021 (DUE).
    """
    compute_dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.ndim == 1 and order == "u_first":
        sigma = torch.linalg.vector_norm(weight.to(compute_dtype)).clamp_min(eps)
        direction = weight.to(compute_dtype) / sigma
        by = divisor(sigma.detach() if detach_sigma else sigma, scale, soft)
        normalized = (weight.to(compute_dtype) / by).to(weight.dtype)
        residual, iterations = (torch.full_like(sigma, x).detach() for x in (torch.nan, 0))
        return Normalized(
            normalized, sigma, torch.ones_like(sigma)[None], direction, residual, iterations
        )

    matrix = weight_matrix(weight, dim).to(compute_dtype)
    with torch.no_grad():
        if update:
            u, v = u.to(compute_dtype), v.to(compute_dtype)
            new_u, new_v, residual, iterations = power_iteration(
                matrix, u, v, n_power_iterations=n_power_iterations, eps=eps, order=order, tol=tol
            )
            found = torch.vdot(new_u, matrix @ new_v) != 0
            u, v = torch.where(found, new_u, u), torch.where(found, new_v, v)
        else:
            u, v = unit_vectors(u, v, compute_dtype)
            residual = matrix.real.new_full((), torch.nan)
            iterations = torch.zeros_like(residual)
    sigma = torch.vdot(u, matrix @ v)
    by = divisor(sigma.detach() if detach_sigma else sigma, scale, soft)
    normalized = (weight.to(compute_dtype) / by).to(weight.dtype)
    return Normalized(normalized, sigma, u, v, residual, iterations)


def backward(
    grad_output: Tensor | None,
    grad_sigma: Tensor | None,
    normalized: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    dim: int = 0,
    scale: float = 1.0,
    soft: bool = False,
    detach_sigma: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the gradient of the weight, for real weights.

    ``(c·G − ⟨G, Y⟩·u vᵀ) / σ + gσ·u vᵀ``; without the second term where σ counts as a constant; and
    ``G + gσ·u vᵀ`` where the forward has left the weight alone.

    ``u`` and ``v`` are constants of the forward. Made of differentiable operations, so it gives
    higher derivatives too when ``normalized`` and ``sigma`` carry their own graph.

    Args:
        grad_output: ``G``, the gradient of the normalized weight ``Y``, or None for zero.
        grad_sigma: ``gσ``, the gradient of σ, or None for zero.
        normalized, sigma, u, v: what the forward gave.
        dim, scale, soft, detach_sigma: as in the forward.
        dtype: of the weight, where it is not that of ``normalized``.
    """
    moved_shape = normalized.movedim(dim, 0).shape
    rank_one = torch.outer(u, v).reshape(moved_shape).movedim(0, dim)
    total = torch.zeros_like(rank_one)
    if grad_output is not None:
        grad = grad_output.to(sigma.dtype)
        total = total + grad / divisor(sigma.detach() if detach_sigma else sigma, scale, soft)
        if not detach_sigma:
            is_constant = _left_alone(sigma, scale, soft)
            along = (grad * normalized.to(sigma.dtype)).sum() / torch.where(is_constant, 1, sigma)
            total = total - torch.where(is_constant, 0, along) * rank_one
    if grad_sigma is not None:
        total = total + grad_sigma * rank_one
    return total.to(dtype or normalized.dtype)


def jvp(
    tangent: Tensor,
    normalized: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    dim: int = 0,
    scale: float = 1.0,
    soft: bool = False,
    detach_sigma: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return how the normalized weight and σ change along a tangent of the weight: forward mode.

    ``σ' = uᵀW'v`` and ``Y' = c·W'/σ − Y·σ'/σ``; without the second term where σ counts as a constant; and
    ``Y' = W'`` where the forward has left the weight alone.

    Args:
        tangent: ``W'``, like the weight.
        normalized, sigma, u, v: what the forward gave.
        dim, scale, soft, detach_sigma: as in the forward.
    """
    moved = tangent.to(sigma.dtype)
    of_sigma = torch.vdot(u, weight_matrix(moved, dim) @ v)
    change = moved / divisor(sigma.detach() if detach_sigma else sigma, scale, soft)
    if not detach_sigma:
        is_constant = _left_alone(sigma, scale, soft)
        relative = of_sigma / torch.where(is_constant, 1, sigma)
        change = change - torch.where(is_constant, 0, relative) * normalized.to(sigma.dtype)
    return change.to(normalized.dtype), of_sigma
