"""Spectral normalization in plain torch: the specification that every backend is tested against.

A weight ``W`` is seen as a matrix ``M`` of ``h`` rows and ``w`` columns: ``dim`` moved to the front,
the rest flattened. Power iteration follows its largest singular value σ with two unit vectors, ``u``
of size ``h`` and ``v`` of size ``w``; the normalized weight is ``W / σ``. Everything here works on one
layer, allocates freely and is differentiable by autograd, so that a reader can check it line by line.

Sources: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018,
algorithm 1; the two orders are those of ``torch.nn.utils.parametrizations.spectral_norm``
(``u_first``) and of the older hook ``torch.nn.utils.spectral_norm`` (``v_first``).

``u`` and ``v`` are never zero and never NaN or infinite, and they are unit vectors whenever the norms of an
iteration exceed ``eps``. PyTorch has no such rule: there one zero or NaN weight makes the layer NaN
for good. Four rules keep it so:

- **The weight is zero**: σ is 0, the output is the weight, with the gradient of the identity, and ``u``
  and ``v`` keep their values. The layer is normalized as soon as the weight is not zero.
- **σ is 0 and the weight is not**, because ``v`` (``v_first``: ``u``) is zero, is orthogonal to all rows
  (columns), or became too small below ``eps``: this forward returns the weight, and ``u`` and ``v`` restart
  from :func:`start_vector`.
- **σ is NaN or infinite**: so is the output of this forward, which makes the fault visible. ``u`` and ``v``
  keep their values; where these were bad themselves they restart.
- **Without an update** ``u`` and ``v`` are not written. If their norms are off by more than rounding, as in
  an averaged model, they are divided by their norms. If one is zero or not finite, σ and the output are
  NaN: any number would be the weight of a layer that looks normalized and is not.

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


def norm_of(x: Tensor) -> Tensor:
    """Return ``‖x‖``; correct too where the squares leave the range of the dtype.

    float64 is not used here: some devices do not have it.
    """
    norm = torch.linalg.vector_norm(x)
    largest = x.abs().amax(dim=0)
    by = torch.where(largest > 0, largest, 1)
    is_exact = norm.isfinite() & (norm > torch.finfo(norm.dtype).eps ** 2)
    return torch.where(is_exact, norm, torch.linalg.vector_norm(x / by) * by)


def _unit(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Return ``x / max(‖x‖, eps)``, which is ``torch.nn.functional.normalize``."""
    return x / norm.clamp_min(eps)


def start_vector(like: Tensor, alternating: Tensor | bool = False) -> Tensor:
    """Return the unit vector that ``u`` and ``v`` restart from, of the size of ``like``, 1-D.

    Its entries are ``1 + ((40503·i) mod 2¹⁶) / 2¹⁶`` over their norm: positive, so that rows of one sign
    are not orthogonal to it, and different, so that rows whose sum is zero are not either. It depends
    on the size alone, and is the same in every backend.

    Args:
        like: gives size, dtype and device.
        alternating: give the entries of even index the other sign. Where the rows are orthogonal to
            one of the two vectors after all, the next restart takes the other one.
    """
    i = torch.arange(len(like), device=like.device)
    x = 1 + (40503 * i % 65536).to(like.real.dtype) / 65536
    x = torch.where((i % 2 == 0) & torch.as_tensor(alternating, device=x.device), -x, x)
    return (x / torch.linalg.vector_norm(x)).to(like.dtype)


def is_usable(x: Tensor) -> Tensor:
    """Return whether a vector is finite and not zero, 0-D."""
    return x.isfinite().all() & (x != 0).any()


def restarted(x: Tensor) -> Tensor:
    """Return the vector that takes the place of one that is of no use: not the one that it is."""
    return start_vector(x, alternating=x[0].real > 0 if x.is_complex() else x[0] > 0)


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
    residual = matrix.real.new_full((), torch.nan)
    iterations = torch.zeros_like(residual)
    done = torch.zeros_like(residual, dtype=torch.bool)
    for _ in range(n_power_iterations):
        if order == "u_first":
            first = matrix @ v
            before = norm_of(first)
            new_u = _unit(first, before, eps)
            second = matrix.mH @ new_u
            after = norm_of(second)
            new_v = _unit(second, after, eps)
        else:
            first = matrix.mH @ u
            before = norm_of(first)
            new_v = _unit(first, before, eps)
            second = matrix @ new_v
            after = norm_of(second)
            new_u = _unit(second, after, eps)
        u, v = torch.where(done, u, new_u), torch.where(done, v, new_v)
        iterations = iterations + ~done
        if tol > 0:
            missed = missed_by(before, after)
            residual = torch.where(done, residual, missed)
            done = done | (missed <= tol)
    return u, v, residual, iterations


def missed_by(before: Tensor, after: Tensor) -> Tensor:
    """Return ``√(after² − before²) / after``, the residual of a step with these two norms."""
    gap = ((after - before).clamp_min(0) / after) * (1 + before / after)
    return torch.where(after <= before, 0, gap.sqrt())


def unit_vector(x: Tensor) -> Tensor:
    """Return ``x / ‖x‖``, ``x`` itself if that is 1 but for rounding, or the vector to restart from."""
    norm = norm_of(x)
    x = torch.where((norm - 1).abs() > _slack(x.dtype) / 2, x / norm, x)
    return torch.where(is_usable(x), x, start_vector(x))


def _slack(dtype: torch.dtype) -> float:
    """Return how far the square of a norm may be off 1 from rounding alone."""
    return 2**-5 if dtype in (torch.float16, torch.bfloat16) else 1e-4


def unit_vectors(u: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``u`` and ``v`` in ``dtype``, divided by their norms if these are off by more than rounding.

    What averages have done to them is undone; unit vectors keep their bits. If one of them is zero or
    not finite, ``v`` is NaN, and σ with it.
    """
    slack = _slack(u.dtype)
    u, v = u.to(dtype), v.to(dtype)
    norms = norm_of(u), norm_of(v)
    off = ((norms[0] * norms[1]).square() - 1).abs() > slack
    usable = is_usable(u) & is_usable(v)
    u, v = (torch.where(off & usable, x / norm, x) for x, norm in zip((u, v), norms, strict=True))
    return u, torch.where(usable, v, torch.nan)


def settled(
    sigma: Tensor, is_zero: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the ``u`` and ``v`` that a forward leaves.

    Args:
        sigma: what it found, 0-D.
        is_zero: whether the weight is zero, 0-D.
        old: ``u`` and ``v`` before it.
        new: those that its iterations ended with.
    """
    found = (sigma != 0) & sigma.isfinite()
    lost = ~(is_usable(old[0]) & is_usable(old[1])) | ((sigma == 0) & ~is_zero)
    u, v = (
        torch.where(found, after, torch.where(lost, restarted(before), before))
        for before, after in zip(old, new, strict=True)
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
            found = torch.vdot(new_u, matrix @ new_v)
            u, v = settled(found, ~(matrix != 0).any(), (u, v), (new_u, new_v))
            # σ of what the iterations found; if that is 0, it is 0 exactly.
            used_u, used_v = torch.where(found == 0, u, new_u), torch.where(found == 0, v, new_v)
        else:
            used_u, used_v = u, v = unit_vectors(u, v, compute_dtype)
            found = torch.ones_like(u[0])
            residual = matrix.real.new_full((), torch.nan)
            iterations = torch.zeros_like(residual)
    sigma = torch.vdot(used_u, matrix @ used_v)
    sigma = torch.where(found == 0, sigma - sigma.detach(), sigma)
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
