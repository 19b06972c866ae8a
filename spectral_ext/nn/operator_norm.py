"""Normalization of a convolution by its norm as an operator, not by that of its kernel's matrix."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..layout import without_autocast
from ..settings import LEAST_EPS
from ..spectrum.convolution import Convolution
from ..validation import check_number, check_settings
from .dynamic_class import own_class
from .parametrization import checked_weight, stock_hook
from .select import check_module, check_name

__all__ = ["OperatorNorm", "convolution_of", "operator_norm"]

_Module = TypeVar("_Module", bound=Module)

_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


class OperatorNorm(Module):
    """The parametrization ``W -> scale · W / σ``, with σ the norm of the convolution.

    With ``bound=c`` it is ``W -> W / max(1, σ / c)``: a convolution of a smaller norm is left alone.

    σ is followed by power iteration through the convolution and its adjoint. ``_u`` has the shape
    of an output, ``_v`` that of an input. In training every call advances both in place by
    ``n_power_iterations`` steps, also without gradients; in evaluation they stay. ``_u`` and
    ``_v`` count as constants of the gradient. A weight with σ = 0 is passed through.

    Args:
        weight: the tensor to normalize.
        convolution: what the weight is the kernel of.
        n_power_iterations: steps for each call in training; 15 more are taken here.
        eps: smallest divisor of a vector.
        scale: the norm that the convolution gets.
        bound: the norm that the convolution may have; not together with ``scale``.
        label: how messages call the layer.
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        convolution: Convolution,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        *,
        scale: float = 1.0,
        bound: float | None = None,
        label: str = "OperatorNorm",
    ) -> None:
        super().__init__()
        convolution.check(weight)
        self.convolution = convolution
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.scale = scale
        self.bound = bound
        self.label = label
        with torch.no_grad():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            for name, shape in (
                ("_u", convolution.output_shape(weight)),
                ("_v", convolution.input_shape(weight)),
            ):
                vector = torch.empty(shape, dtype=dtype, device=weight.device).normal_()
                self.register_buffer(name, _unit(vector, eps))
            self._power_iteration(weight.to(dtype), 15)

    @torch.no_grad()
    def _power_iteration(self, weight: Tensor, n_power_iterations: int) -> None:
        """Advance ``_u`` and ``_v`` in place, unless σ becomes zero."""
        v = self._v.to(weight.dtype)
        for _ in range(n_power_iterations):
            u = _unit(self.convolution.apply(weight, v), self.eps)
            v = _unit(self.convolution.adjoint(weight, u), self.eps)
        found = self._sigma(weight, u, v) != 0
        self._u.copy_(torch.where(found, u, self._u))
        self._v.copy_(torch.where(found, v, self._v))

    def _sigma(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return torch.sum(u * self.convolution.apply(weight, v))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalized weight, in the weight's dtype; half precision goes by float32.

        Raises:
            TypeError, ValueError: the weight was exchanged for one that does not fit. ``_u`` and
                ``_v`` are as they were.
        """
        self._check(weight)
        with without_autocast(weight.device):
            return self._normalize(weight)

    def _normalize(self, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # A copy is what the graph holds, so that an optimizer may step before the backward.
        held = weight.to(dtype, copy=torch.is_grad_enabled() and weight.requires_grad)
        if self.training:
            self._power_iteration(held.detach(), self.n_power_iterations)
        # The graph of this call keeps its own vectors, since the next one advances the buffers.
        u, v = self._u.to(dtype, copy=True), self._v.to(dtype, copy=True)
        sigma = self._sigma(held, u, v)
        if self.bound is not None:
            return (held / (sigma / self.bound).clamp_min(1)).to(weight.dtype)
        is_zero = sigma == 0
        divisor = torch.where(is_zero, 1, sigma)
        return (held * torch.where(is_zero, 1, self.scale / divisor)).to(weight.dtype)

    def _check(self, weight: Tensor) -> None:
        with _labelled(self.label):
            self.convolution.check(weight)
        shapes = self.convolution.output_shape(weight), self.convolution.input_shape(weight)
        if (tuple(self._u.shape), tuple(self._v.shape)) != shapes:
            raise ValueError(
                f"{self.label}: for a weight of shape {tuple(weight.shape)}, u and v must have shapes "
                f"{shapes[0]} and {shapes[1]}, got {tuple(self._u.shape)} and {tuple(self._v.shape)}"
            )

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return ``value``: what is assigned is the weight before normalization, as in stock."""
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        """Move or convert as every module does, but leave ``_u`` and ``_v`` single precision."""
        super()._apply(fn, recurse)
        for name, vector in self._buffers.items():
            if vector is not None:
                dtype = torch.promote_types(vector.dtype, torch.float32)
                self._buffers[name] = vector.to(dtype)
        return self

    def extra_repr(self) -> str:
        """Return the input size, and the settings that differ from the defaults."""
        shown = [f"input_size={self.convolution.input_size}"]
        if self.n_power_iterations != 1:
            shown.append(f"n_power_iterations={self.n_power_iterations}")
        if self.eps != 1e-12:
            shown.append(f"eps={self.eps}")
        if self.scale != 1:
            shown.append(f"scale={self.scale}")
        if self.bound is not None:
            shown.append(f"bound={self.bound}")
        return ", ".join(shown)


def operator_norm(
    module: _Module,
    name: str = "weight",
    *,
    input_size: int | Sequence[int],
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    scale: float = 1.0,
    bound: float | None = None,
) -> _Module:
    """Normalize a convolution by its norm as a map from inputs to outputs.

    :func:`spectral_ext.spectral_norm` divides by the norm of the kernel as a matrix, which the
    convolution's own can exceed by the root of the number of windows that see one input.

    Args:
        module: a ``Conv1d/2d/3d`` or ``ConvTranspose1d/2d/3d`` with zero or circular padding; it is
            changed in place. Stride, padding, dilation and groups are read here, once.
        name: name of its weight.
        input_size: the spatial sizes of its inputs, on which the norm depends; one number stands
            for all dimensions.
        n_power_iterations: steps for each access in training; each costs two convolutions of one
            input.
        eps: smallest divisor of a vector.
        scale: ``W -> scale · W / σ``.
        bound: ``W -> W / max(1, σ / bound)``; not together with ``scale``.

    Returns:
        ``module``. Undo it with ``torch.nn.utils.parametrize.remove_parametrizations``.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was changed. The message names the
            layer.

    Sources: Ryu et al., "Plug-and-Play Methods Provably Converge with Properly Trained Denoisers",
    ICML 2019, section 4; Gouk et al., "Regularisation of Neural Networks by Enforcing Lipschitz
    Continuity", Machine Learning 110 (2021), for ``bound``.
    """
    check_module("module", module)
    check_name(name)
    label = f"{parametrize.type_before_parametrizations(module).__name__}.{name}"
    check_settings(label, n_power_iterations, eps, "u_first")
    _check_number(label, "scale", scale)
    if bound is not None:
        _check_number(label, "bound", bound)
        if scale != 1:
            raise ValueError(
                f"{label}: scale and bound exclude each other, got scale={scale} and bound={bound}"
            )
    if stock_hook(module, name) is not None:
        raise ValueError(f"{label}: torch.nn.utils.spectral_norm normalizes this parameter already")
    weight, _ = checked_weight(module, name, 0, label)
    with _labelled(label):
        convolution = convolution_of(module, input_size)
        convolution.check(weight)
    norm = OperatorNorm(
        weight,
        convolution,
        int(n_power_iterations),
        float(eps),
        scale=float(scale),
        bound=None if bound is None else float(bound),
        label=label,
    )
    parametrize.register_parametrization(module, name, norm)
    own_class(module)
    return module


def convolution_of(module: Module, input_size: int | Sequence[int]) -> Convolution:
    """Return the convolution that a module computes on inputs of a size.

    Raises:
        TypeError: the module is none of torch's convolutions.
        ValueError: its padding mode is neither zeros nor circular, or the size does not fit.
    """
    if not isinstance(module, _CONVOLUTIONS + _TRANSPOSED):
        raise TypeError(
            f"the operator norm is for Conv1d/2d/3d and ConvTranspose1d/2d/3d, "
            f"got {type(module).__name__}"
        )
    settings: Any = module
    ndim = len(settings.kernel_size)
    sizes: Any = (input_size,) * ndim if isinstance(input_size, Integral) else input_size
    if isinstance(sizes, (tuple, list)):  # NumPy's integers become Python's, and a bool stays
        sizes = tuple(
            int(n) if isinstance(n, Integral) and not isinstance(n, bool) else n for n in sizes
        )
    if isinstance(sizes, (tuple, list)) and len(sizes) != ndim:
        raise ValueError(f"input_size must have {ndim} entries, got {tuple(sizes)}")
    return Convolution(
        sizes,
        stride=settings.stride,
        padding=settings.padding,
        output_padding=settings.output_padding,
        dilation=settings.dilation,
        groups=settings.groups,
        padding_mode=settings.padding_mode,
        transposed=isinstance(module, _TRANSPOSED),
    )


@contextmanager
def _labelled(label: str) -> Iterator[None]:
    """Put the layer's name before the messages about its settings."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {error}") from error


def _unit(x: Tensor, eps: float) -> Tensor:
    return F.normalize(x.flatten(), dim=0, eps=max(eps, LEAST_EPS)).view_as(x)


def _check_number(label: str, name: str, value: float) -> None:
    check_number(label, name, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{label}: {name} must be positive and finite, got {name}={value}")
