"""The native CPU backend: C++ kernels registered for ``spectral_ext::*`` in ``csrc/ops.cpp``."""

from typing import cast

import torch
from torch import Tensor

from .. import ops  # noqa: F401  (the schemas come first)
from . import PreparedForward

try:
    from .._C import empty_cache as _empty_cache
except ImportError as error:
    _empty_cache = None  # type: ignore[assignment]
    _IMPORT_ERROR = error

__all__ = ["allocate", "attach", "backward", "empty_cache", "forward_", "prepare", "unavailable"]

allocate = torch.ops.spectral_ext.allocate.default
forward_ = torch.ops.spectral_ext.forward_.default
backward = torch.ops.spectral_ext.backward.default
attach = torch.ops.spectral_ext.attach.default


def prepare(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    dims: list[int],
    n_power_iterations: list[int],
    eps: list[float],
    v_first: list[bool],
    tols: list[float],
    scales: list[float],
    soft: list[bool],
    detach_sigma: list[bool],
) -> PreparedForward:
    """Unpack the arguments of a call that will be made again and again; see ``csrc/call.cpp``."""
    settings = (dims, n_power_iterations, eps, v_first, tols, scales, soft, detach_sigma)
    call = torch.classes.spectral_ext.Call(weights, us, vs, *settings)
    return cast(PreparedForward, call.normalize)


def empty_cache() -> int:
    """Return to the system the memory that the CPU backend keeps for outputs of later calls.

    It never holds more than an eighth above what was once in use; tensors that still exist are not touched.

    Returns:
        The bytes that were given back; 0 without the native library.
    """
    return 0 if _empty_cache is None else _empty_cache()


def unavailable(device: torch.device | None) -> str | None:
    """Return None if it can run on ``device``, else why not."""
    if _empty_cache is None:
        return f"the native library is not there ({_IMPORT_ERROR}); install with a C++ compiler"
    if device is not None and device.type != "cpu":
        return f"it computes on CPU tensors, not on {device.type}"
    return None
