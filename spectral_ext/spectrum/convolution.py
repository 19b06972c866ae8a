"""The linear operator of a convolution, its adjoint and its norm.

A convolution maps a whole signal to a whole signal. Its norm as such a map is what bounds how far the
layer can move two inputs apart. The norm of the kernel as a matrix, which spectral normalization
takes, is smaller or larger, depending on how the windows overlap.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .matrix import Triplets, check_iteration, check_positive, largest_triplets, random_start

__all__ = ["Convolution", "operator_norm"]

PaddingMode = Literal["zeros", "circular"]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_BLOCK = 8


@dataclass(frozen=True, init=False)
class Convolution:
    """A convolution without its weight: ``torch.nn.Conv1d/2d/3d`` or their transposed ones.

    Args:
        input_size: the spatial sizes of the input; as many as the convolution has dimensions.
        stride, dilation: one number, or one for each dimension.
        padding: the same, or ``"valid"`` (none) or ``"same"`` (the output is as large as the input).
        output_padding: rows that are added to one side of a transposed convolution's output.
        groups: of channels.
        padding_mode: what is there beyond the border.
        transposed: whether it is a transposed convolution.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    input_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | Literal["same"]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: PaddingMode
    transposed: bool

    def __init__(
        self,
        input_size: Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same", "valid"] = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        transposed: bool = False,
    ) -> None:
        if not isinstance(input_size, (tuple, list)):
            raise TypeError(f"input_size must be a tuple of int, got {type(input_size).__name__}")
        ndim = len(input_size)
        if ndim not in _CONV:
            raise ValueError(f"input_size must have 1, 2 or 3 entries, got {tuple(input_size)}")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f"padding_mode must be 'zeros' or 'circular', got {padding_mode!r}")
        check_positive("groups", groups)
        values: dict[str, object] = {
            "input_size": _sizes("input_size", input_size, ndim, 1),
            "stride": _sizes("stride", stride, ndim, 1),
            "padding": "same"
            if padding == "same"
            else _sizes("padding", 0 if isinstance(padding, str) else padding, ndim, 0),
            "output_padding": _sizes("output_padding", output_padding, ndim, 0),
            "dilation": _sizes("dilation", dilation, ndim, 1),
            "groups": groups,
            "padding_mode": padding_mode,
            "transposed": bool(transposed),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_settings()

    def _check_settings(self) -> None:
        """Raise unless the settings, which are valid alone, go together."""
        if self.padding == "same" and max(self.stride) > 1:
            raise ValueError(f"padding='same' wants stride 1, got stride={self.stride}")
        if not self.transposed:
            if any(self.output_padding):
                raise ValueError(
                    "output_padding is for transposed convolutions, "
                    f"got output_padding={self.output_padding}"
                )
            return
        if self.padding == "same" or self.padding_mode != "zeros":
            raise ValueError(
                "a transposed convolution wants padding in numbers and padding_mode='zeros', "
                f"got padding={self.padding!r} and padding_mode={self.padding_mode!r}"
            )
        limits = map(max, self.stride, self.dilation)
        if any(extra >= limit for extra, limit in zip(self.output_padding, limits, strict=True)):
            raise ValueError(
                "output_padding must be smaller than stride or dilation, "
                f"got output_padding={self.output_padding}"
            )

    @property
    def ndim(self) -> int:
        """The number of spatial dimensions."""
        return len(self.input_size)

    def reach(self, kernel_size: Sequence[int]) -> tuple[int, ...]:
        """Return for each dimension the distance of a kernel's first and last tap."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, kernel_size, strict=True))

    def pads(self, kernel_size: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return for each dimension the padding before and after the signal."""
        if self.padding == "same":  # the odd one goes behind, as in torch
            return tuple((total // 2, total - total // 2) for total in self.reach(kernel_size))
        return tuple((p, p) for p in self.padding)

    def input_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape ``(channels, *spatial)`` of an input without its batch."""
        channels = weight.shape[0] if self.transposed else weight.shape[1] * self.groups
        return (channels, *self.input_size)

    def output_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape ``(channels, *spatial)`` of an output without its batch."""
        kernel_size = weight.shape[2:]
        sizes = []
        for n, s, reach, (before, after), extra in zip(
            self.input_size,
            self.stride,
            self.reach(kernel_size),
            self.pads(kernel_size),
            self.output_padding,
            strict=True,
        ):
            if self.transposed:
                sizes.append((n - 1) * s - before - after + reach + 1 + extra)
            else:
                sizes.append((n + before + after - reach - 1) // s + 1)
        channels = weight.shape[1] * self.groups if self.transposed else weight.shape[0]
        return (channels, *sizes)

    def check(self, weight: Tensor) -> None:
        """Raise unless ``weight`` is the kernel of such a convolution.

        Raises:
            TypeError: it is no tensor of a real floating point dtype.
            ValueError: its shape does not go with the settings.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
        if not weight.is_floating_point():
            raise TypeError(f"weight must be real and floating point, got {weight.dtype}")
        shape = tuple(weight.shape)
        if weight.ndim != self.ndim + 2 or weight.numel() == 0:
            raise ValueError(
                f"weight must have {self.ndim + 2} dimensions, two of channels and as many as "
                f"input_size={self.input_size} has, and none may be empty; got shape {shape}"
            )
        if shape[0] % self.groups:
            raise ValueError(f"weight of shape {shape} has no groups={self.groups} in its channels")
        if min(self.output_shape(weight)) < 1:
            raise ValueError(
                f"the kernel of a weight of shape {shape} is larger than the padded input of "
                f"input_size={self.input_size}"
            )
        if self.padding_mode == "circular" and any(
            max(pad) > n for pad, n in zip(self.pads(shape[2:]), self.input_size, strict=True)
        ):
            raise ValueError(
                f"circular padding of {self.pads(shape[2:])} goes more than once around "
                f"input_size={self.input_size}"
            )

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return the convolution of ``x``, without a bias.

        Args:
            weight: ``(out, in // groups, *kernel)``, or ``(in, out // groups, *kernel)`` if
                transposed.
            x: of :meth:`input_shape`, with or without a batch in front.
        """
        if self.transposed:
            return _CONV_TRANSPOSE[self.ndim](
                x,
                weight,
                stride=self.stride,
                padding=self.padding,
                output_padding=self.output_padding,
                groups=self.groups,
                dilation=self.dilation,
            )
        pads = self.pads(weight.shape[2:])
        mode = "constant" if self.padding_mode == "zeros" else "circular"
        # F.pad takes the last dimension first.
        x = F.pad(x, [pad for both in reversed(pads) for pad in both], mode)
        return _CONV[self.ndim](
            x, weight, stride=self.stride, dilation=self.dilation, groups=self.groups
        )

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """Return ``Aᵀy``: ``⟨Ax, y⟩ = ⟨x, Aᵀy⟩`` for all ``x``.

        Args:
            weight: as in :meth:`apply`.
            y: of :meth:`output_shape`, with or without a batch in front.
        """
        if self.transposed:
            x = _CONV[self.ndim](
                y,
                weight,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
            )
            # An output padding of a stride or more makes room for outputs that have no input.
            for dim, n in enumerate(self.input_size, start=-self.ndim):
                x = x.narrow(dim, 0, n)
            return x
        pads, reaches = self.pads(weight.shape[2:]), self.reach(weight.shape[2:])
        # What the last step of the stride did not reach.
        unread = [
            (n + sum(pad) - reach - 1) % s
            for n, pad, reach, s in zip(self.input_size, pads, reaches, self.stride, strict=True)
        ]
        padded = _CONV_TRANSPOSE[self.ndim](
            y,
            weight,
            stride=self.stride,
            output_padding=unread,
            groups=self.groups,
            dilation=self.dilation,
        )
        for dim, (n, pad) in enumerate(zip(self.input_size, pads, strict=True), start=-self.ndim):
            padded = _unpad(padded, dim, n, *pad, circular=self.padding_mode == "circular")
        return padded


def operator_norm(
    weight: Tensor,
    convolution: Convolution,
    *,
    tol: float = 1e-5,
    max_iterations: int = 500,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the largest singular value of a convolution as a map of signals.

    Found by products with the operator and its adjoint alone, see
    :func:`spectral_ext.spectrum.matrix.largest_triplets`. It is approached from below; an upper
    bound is :func:`spectral_ext.spectrum.certified_operator_norm`.

    Args:
        weight: the kernel, see :meth:`Convolution.apply`. Half precision is computed in float32.
        convolution: its settings, and the size of its input.
        tol: relative accuracy; below the rounding errors of the dtype it is taken for them.
        max_iterations: steps at most, each of four convolutions with a batch of 8.
        generator: draws the start, on its own device. None starts from the same vectors every time
            and leaves the global random numbers alone.

    Returns:
        0-D, float64 for double precision, else float32; NaN if the weight is not finite. It is
        ``⟨u, A v⟩`` and differentiable in the weight, with the singular vectors ``u`` and ``v`` as
        constants: the gradient of σ wherever it has one. Second derivatives are not those of σ.

    Warns:
        RuntimeWarning: the iterations ran out; the value is a lower bound.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Sources: Ryu et al., "Plug-and-Play Methods Provably Converge with Properly Trained Denoisers",
    ICML 2019, section 4; Farnia, Zhang and Tse, "Generalizable Adversarial Training via Spectral
    Normalization", ICLR 2019; Gouk et al., "Regularisation of Neural Networks by Enforcing
    Lipschitz Continuity", Machine Learning 110 (2021). For circular padding σ is that of Sedghi,
    Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019.
    """
    convolution.check(weight)
    check_iteration(tol, max_iterations)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with torch.no_grad():
        scale = weight.abs().amax()
    if scale == 0 or not scale.isfinite():
        return (weight * 0).sum()
    found = _largest_triplet(weight.detach() / scale, convolution, tol, max_iterations, generator)
    if not found.converged:
        warnings.warn(
            f"the operator norm has not converged to tol={tol} in {max_iterations} iterations; "
            "the value is a lower bound",
            RuntimeWarning,
            stacklevel=2,
        )
    u, v = found.left[:, 0], found.right[:, 0].unflatten(0, convolution.input_shape(weight))
    return torch.vdot(u, convolution.apply(weight, v).flatten())


@torch.no_grad()
def _largest_triplet(
    weight: Tensor,
    convolution: Convolution,
    tol: float,
    max_iterations: int,
    generator: torch.Generator | None,
) -> Triplets:
    """Return the largest singular triplet of a convolution, its vectors flat."""
    input_shape = convolution.input_shape(weight)
    output_shape = convolution.output_shape(weight)
    return largest_triplets(
        lambda x: convolution.apply(weight, x.mT.unflatten(1, input_shape)).flatten(1).mT,
        lambda y: convolution.adjoint(weight, y.mT.unflatten(1, output_shape)).flatten(1).mT,
        random_start(weight, math.prod(input_shape), _BLOCK, generator),
        1,
        tol,
        max_iterations,
    )


def _unpad(x: Tensor, dim: int, size: int, before: int, after: int, *, circular: bool) -> Tensor:
    """Apply the adjoint of a padding of one dimension to ``size`` and two borders."""
    inner = x.narrow(dim, before, size)
    if not circular or before == after == 0:
        return inner
    # The border before the signal is a copy of its end, the one behind it of its beginning.
    inner = inner.clone()
    inner.narrow(dim, size - before, before).add_(x.narrow(dim, 0, before))
    inner.narrow(dim, 0, after).add_(x.narrow(dim, before + size, after))
    return inner


def _sizes(name: str, value: int | Sequence[int], ndim: int, least: int) -> tuple[int, ...]:
    """Return one size for each of ``ndim`` dimensions, or raise."""
    sizes: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value,) * ndim
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be int or a tuple of int, got {value!r}")
    if len(sizes) != ndim:
        raise ValueError(f"{name} must have {ndim} entries, as input_size has, got {value!r}")
    if min(sizes) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return sizes
