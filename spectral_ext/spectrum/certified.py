"""Upper bounds of norms that hold, rounding errors included.

Power iteration approaches a norm from below. A certificate needs the other side. Gram iteration
gives it: with ``G₀ = M`` and ``G_{t+1} = G_tᴴ G_t``, ``‖M‖ = ‖G_t‖^(1/2^t) ≤ ‖G_t‖_F^(1/2^t)``,
and the right side falls to the left one twice as fast in every step: for ``n`` rows or columns it
is too large by a factor of ``n^(1/2^(t+1))`` at most.

Source: Delattre, Barthélemy, Araujo and Allauzen, "Efficient Bound of Lipschitz Constant for
Convolutional Layers by Gram Iteration", ICML 2023.

Rounding. All is computed in float64, ε its distance from one to the next number. The product of an
``n×m`` matrix with itself is wrong by ``E`` with ``‖E‖ ≤ ‖E‖_F ≤ mε‖G‖_F² ≤ nmε‖G‖²`` (Higham,
"Accuracy and Stability of Numerical Algorithms", section 3.5), which makes the bound wrong by a
factor of ``1 ± nmε`` before, and less than that after, the root is taken. The roots of all steps
together leave that factor once. The other operations, norms, logarithms and scalings, err by less
than a thousand ε. The allowance is four times the sum.
"""

import math

import torch
from torch import Tensor

from .convolution import Convolution
from .matrix import check_matrix, check_positive

__all__ = ["certified_matrix_norm", "certified_operator_norm"]

_EPS = torch.finfo(torch.float64).eps
# Roots beyond 2^50 cannot be told from one.
_MOST_ITERATIONS = 50
# Numbers that a part of the spectrum may take: 256 MiB.
_PART = 2**24


@torch.no_grad()
def certified_matrix_norm(matrix: Tensor, iterations: int = 8) -> Tensor:
    """Return an upper bound of a matrix's largest singular value.

    Args:
        matrix: shape ``(h, w)``, any floating point or complex dtype and strides.
        iterations: Gram iterations, each a product of ``min(h, w)``-sized matrices but the first.

    Returns:
        0-D float64, never below the norm and above it by a factor of at most
        ``min(h, w)^(1/2^(iterations+1))``: 1.4 % for 1000 rows and 8 iterations. Not
        differentiable. NaN if the matrix is not finite.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_matrix(matrix)
    _check_iterations(iterations)
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    scale = exact.abs().amax()
    if scale == 0:
        return scale
    return _upward(_gram_bound(exact / scale, iterations) * scale)


@torch.no_grad()
def certified_operator_norm(
    weight: Tensor, convolution: Convolution, iterations: int = 8
) -> Tensor:
    """Return an upper bound of the norm of a convolution as a map of signals.

    The operator is made from a *circulant* one, which the discrete Fourier transform takes apart
    into a small matrix for each frequency, by steps that do not raise the norm:

    - Zero padding: the signal is embedded in a grid that is as large as the signal and the kernel
      together, so that nothing wraps around, and of the outputs some are kept. An embedding is an
      isometry and a choice of rows a contraction.
    - Circular padding: the grid is that of the input. A kernel that is larger wraps around. With
      stride 1 and an output as large as the input, that is the operator itself. Padding beyond that
      repeats rows: ``r`` times each row at most, which raises the norm by at most ``√r``.
    - Stride ``s``: a convolution of stride 1 whose channels are the ``s`` phases of the signal, on
      a grid of steps. Where a circular grid is no multiple of ``s``: some of the rows of the
      convolution with stride 1, so at most its norm.
    - Transposed: the adjoint of a convolution from its output to its input, hence the same norm.
    - Groups: a block diagonal operator has the largest norm of its blocks.

    Args:
        weight: the kernel, see :meth:`Convolution.apply`; any real floating point dtype.
        convolution: its settings, and the size of its input.
        iterations: Gram iterations for each frequency.

    Returns:
        0-D float64, never below the norm. With circular padding, an output as large as the input
        and stride 1 it is above it by a factor of at most ``channels^(1/2^(iterations+1))``. Not
        differentiable. NaN if the weight is not finite.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    convolution.check(weight)
    _check_iterations(iterations)
    exact = weight.to(torch.float64)
    scale = exact.abs().amax()
    if scale == 0:
        return scale
    kernel = (exact / scale).unflatten(0, (convolution.groups, -1))
    taps = math.prod(kernel.shape[3:])
    # Sums of `taps` products with a wave for each dimension; a wave is wrong by 3πε at most.
    transform_error = 4 * _EPS * (taps + 16) * math.sqrt(taps) * torch.linalg.vector_norm(kernel)

    # A transposed convolution is the adjoint of the one from its output to its input.
    signal = convolution.output_shape(weight) if convolution.transposed else None
    sizes = convolution.input_size if signal is None else signal[1:]
    outputs = convolution.output_shape(weight)[1:] if signal is None else convolution.input_size
    waves, repeats = [], 1
    for dim, (n, m, stride, dilation) in enumerate(
        zip(sizes, outputs, convolution.stride, convolution.dilation, strict=True), start=3
    ):
        circular = convolution.padding_mode == "circular"
        if circular and n % stride:
            m, stride = (m - 1) * stride + 1, 1
        kernel, positions = _phases(kernel, dim, stride, dilation)
        if circular:
            grid = n // stride
            repeats *= -(-m // grid)
        else:
            # n numbers lie in that many steps of the stride, wherever they begin.
            grid = -(-(n - 1) // stride) + 1 + int(positions[-1])
        waves.append(_waves(positions, grid, exact.device))
    bound = _spectrum_bound(kernel, waves, iterations) + transform_error
    return _upward(bound * math.sqrt(repeats) * scale)


def _phases(kernel: Tensor, dim: int, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Turn a stride into channels.

    Tap ``t`` reads the signal at ``t·dilation``, which is phase ``r`` of step ``q``:
    ``t·dilation = q·stride + r``.

    Returns:
        The kernel ``(groups, out, in·stride, …)`` with one tap for each step that is read, and the
        steps.
    """
    places = torch.arange(kernel.shape[dim]) * dilation
    positions, step_of_tap = torch.unique(places // stride, return_inverse=True)
    phased = kernel.new_zeros(stride, len(positions), *kernel.movedim(dim, 0).shape[1:])
    device = kernel.device
    phased[(places % stride).to(device), step_of_tap.to(device)] = kernel.movedim(dim, 0)
    # (stride, step, groups, out, in, …) -> (groups, out, in, stride, …, step, …)
    phased = phased.movedim(0, 4).flatten(3, 4)
    return phased.movedim(0, dim), positions


def _waves(positions: Tensor, grid: int, device: torch.device) -> Tensor:
    """Return ``exp(-2πi f p / grid)`` for every frequency and position: ``(grid, positions)``."""
    turns = torch.arange(grid)[:, None] * positions % grid  # in integers, so without an error
    angles = turns.to(device, torch.float64) * (-2 * math.pi / grid)
    return torch.complex(angles.cos(), angles.sin())


def _spectrum_bound(kernel: Tensor, waves: list[Tensor], iterations: int) -> Tensor:
    """Return the largest bound of the matrices ``(out, in)`` of all groups and frequencies.

    Args:
        kernel: ``(groups, out, in, *taps)``, real.
        waves: for each spatial dimension ``(frequencies, taps)``.
    """
    *others, last = waves
    # The kernel is real: frequencies f and -f have conjugate matrices of one norm.
    last = last[: len(last) // 2 + 1]
    spectrum = kernel.to(torch.complex128)
    for wave in others:
        spectrum = torch.tensordot(spectrum, wave, dims=([3], [1]))
    # Now (groups, out, in, taps of the last dimension, frequencies of the others…).
    largest = kernel.new_zeros(())
    numbers = spectrum.numel() // spectrum.shape[3]
    for part in last.split(max(1, _PART // numbers)):
        matrices = torch.tensordot(spectrum, part, dims=([3], [1])).flatten(3).movedim(3, 0)
        largest = torch.maximum(largest, _gram_bound(matrices, iterations).amax())
    return largest


def _gram_bound(matrices: Tensor, iterations: int) -> Tensor:
    """Return for each matrix ``(…, h, w)`` of numbers near one an upper bound of its norm."""
    gram = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mH
    logarithm = torch.zeros(gram.shape[:-2], dtype=torch.float64, device=gram.device)
    for _ in range(iterations):
        size = torch.linalg.matrix_norm(gram)
        # In a zero matrix there is nothing to scale.
        size = torch.where(size == 0, 1, size)
        gram = gram / size[..., None, None]
        gram = gram.mH @ gram
        logarithm = 2 * (logarithm + size.log())
    size = torch.linalg.matrix_norm(gram)
    bound = torch.exp((logarithm + size.log()) / 2.0**iterations)
    return bound * (1 + 4 * _EPS * (matrices.shape[-2] * matrices.shape[-1] + 1000))


def _check_iterations(iterations: int) -> None:
    check_positive("iterations", iterations)
    if iterations > _MOST_ITERATIONS:
        raise ValueError(
            f"iterations must be at most {_MOST_ITERATIONS}, got iterations={iterations}; "
            "the bound has long stopped falling"
        )


def _upward(bound: Tensor) -> Tensor:
    """Return the next number above, since the last operation may have rounded down."""
    return torch.nextafter(bound, torch.full_like(bound, math.inf))
