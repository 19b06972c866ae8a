"""The largest singular values of a matrix, and the iteration that finds those of any operator."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Triplets", "check_iteration", "check_positive", "largest_triplets", "singular_values"]

# Vectors beyond the k that are asked for: the iteration converges as fast as the values fall from
# the k-th to the last of the block (Halko, Martinsson and Tropp, section 4.2).
OVERSAMPLING = 8


class Triplets(NamedTuple):
    """Approximate singular triplets, ``A @ right = left * values``, largest value first."""

    values: Tensor
    left: Tensor
    right: Tensor
    converged: bool


def singular_values(
    matrix: Tensor,
    k: int = 1,
    *,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the ``k`` largest singular values of a matrix, in descending order.

    A small matrix, or one of which most values are asked for, goes to ``torch.linalg.svdvals``. So
    does one whose values have not converged when the iterations run out: by then the full
    decomposition is the cheaper way. The values are measured, not differentiated.

    Args:
        matrix: shape ``(h, w)``, any floating point or complex dtype and strides. Half precision is
            computed in float32.
        k: how many values, at most ``min(h, w)``.
        tol: each value is this close to a singular value, in units of the largest one; a ``tol``
            below the rounding errors of the dtype is taken for them.
        max_iterations: steps of :func:`largest_triplets`, two products with the matrix each.
        generator: draws the start, on its own device. None starts from the same vectors every time
            and leaves the global random numbers alone.

    Returns:
        Shape ``(k,)``, float64 for double precision, else float32; NaN if the matrix is not finite.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_matrix(matrix)
    check_positive("k", k)
    check_iteration(tol, max_iterations)
    smaller = min(matrix.shape)
    if k > smaller:
        raise ValueError(
            f"k must be at most {smaller} for a matrix of shape {tuple(matrix.shape)}, got k={k}"
        )
    with torch.no_grad():
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        # The largest element: squares do not overflow beside it, and it shows what is not finite.
        scale = matrix.abs().amax()
        if scale == 0 or not scale.isfinite():
            return (scale * 0).expand(k).clone()
        matrix = matrix / scale
        block = k + OVERSAMPLING
        if 3 * block < smaller:
            start = random_start(matrix, matrix.shape[1], block, generator)
            found = largest_triplets(
                lambda x: matrix @ x, lambda y: matrix.mH @ y, start, k, tol, max_iterations
            )
            if found.converged:
                return found.values * scale
        return torch.linalg.svdvals(matrix)[:k] * scale


def largest_triplets(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    tol: float,
    max_iterations: int,
) -> Triplets:
    """Return the ``k`` largest singular triplets of a linear operator ``A``.

    This is block power iteration with the search space of LOBPCG: not only the image ``AᵀA V`` of
    the block ``V`` is kept but also ``V`` and the block before it. For a gap γ between the k-th
    value and the first one outside of the block, the steps needed fall from 1/γ to 1/√γ. The
    Rayleigh-Ritz step is an SVD of ``A`` on the search space, so nothing is squared.

    Sources: Knyazev, "Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block
    Preconditioned Conjugate Gradient Method", SIAM J. Sci. Comput. 23 (2001), algorithm 5.1; the
    random start and its oversampling: Halko, Martinsson and Tropp, "Finding Structure with
    Randomness", SIAM Review 53 (2011), algorithm 4.4.

    Args:
        apply: maps columns ``(w, n)`` to ``(h, n)``, for any ``n``.
        adjoint: its adjoint, maps ``(h, n)`` to ``(w, n)``.
        start: shape ``(w, block)``, with ``k <= block``.
        k: how many triplets must converge.
        tol: it stops when no value changed, and no residual ``‖Aᵀu − σv‖`` is larger, by more than
            this times the largest value. A singular value is as near as the residual (Golub and
            Van Loan, "Matrix Computations", section 8.1).
        max_iterations: steps at most.
    """
    block = start.shape[1]
    # Below this the residual is made of rounding errors.
    tol = max(tol, 4 * torch.finfo(start.dtype).eps * math.sqrt(start.shape[0]))
    basis = torch.linalg.qr(start).Q
    right, values = basis[:, :0], torch.zeros((), device=start.device)
    converged = False
    for _ in range(max_iterations):
        right_before, values_before = right, values
        left, values, mixing = torch.linalg.svd(apply(basis), full_matrices=False)
        left, values = left[:, :block], values[:block]
        right = basis @ mixing.mH[:, :block]
        residuals = adjoint(left) - right * values
        change = (values - values_before)[:k].abs().amax()
        residual = torch.linalg.vector_norm(residuals[:, :k], dim=0).amax()
        if torch.maximum(change, residual) <= tol * values[0]:
            converged = True
            break
        basis = torch.linalg.qr(torch.cat([right, residuals, right_before], dim=1)).Q
    return Triplets(values[:k], left[:, :k], right[:, :k], converged)


def random_start(like: Tensor, size: int, block: int, generator: torch.Generator | None) -> Tensor:
    """Return normal numbers of shape ``(size, block)``, with the dtype and device of ``like``."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, block, dtype=like.dtype, device=generator.device, generator=generator)
    return start.to(like.device)


def check_matrix(matrix: Tensor) -> None:
    """Raise unless ``matrix`` is one, with numbers in it."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix must be a tensor, got {type(matrix).__name__}")
    if not (matrix.is_floating_point() or matrix.is_complex()):
        raise TypeError(f"matrix must be floating point or complex, got {matrix.dtype}")
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(
            f"matrix must have two dimensions and no empty one, got shape {tuple(matrix.shape)}"
        )


def check_positive(name: str, value: int) -> None:
    """Raise unless ``value`` is a positive integer; ``name`` is that of the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {name}={value}")


def check_iteration(tol: float, max_iterations: int) -> None:
    """Raise unless an iteration can stop by these."""
    if isinstance(tol, bool) or not isinstance(tol, (int, float)):
        raise TypeError(f"tol must be a float, got {type(tol).__name__}")
    if not (tol > 0 and math.isfinite(tol)):
        raise ValueError(f"tol must be positive and finite, got tol={tol}")
    check_positive("max_iterations", max_iterations)
