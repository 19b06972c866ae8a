"""Every operator's schema and fake kernel. Backends register their kernels against these.

All layers of a call share one device and one compute dtype: float64 for float64 weights, else float32.
``saved`` and ``sigmas`` are flat buffers in it. ``saved`` holds ``u`` and ``v`` of every layer as they
were when σ was taken, one after the other: ``u_0, v_0, u_1, v_1, …``. The backward needs those and not
the live buffers, which the next forward overwrites.

``convergence`` has for every layer the residual and after those the number of iterations, in the same
dtype; empty, it is not written.

``forward_`` writes into its arguments and returns nothing, because a mutable operator that also
returns a list cannot be functionalized by ``torch.compile``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import allocate, grad_dtypes

__all__ = ["LIBRARY", "SCHEMAS"]

SCHEMAS = {
    # Uninitialized `outputs`, with the shapes and strides of the weights, `saved` and `sigmas`. A `dtype`,
    # of half precision, is that of the outputs of float32 weights.
    "allocate": (
        "(Tensor[] weights, int[] dims, ScalarType? dtype=None) -> (Tensor[], Tensor, Tensor)"
    ),
    # The forward of all layers. `update` False keeps us and vs as they are, as stock does in evaluation.
    "forward_": (
        "(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, Tensor(c!)[] outputs, Tensor(d!) saved, "
        "Tensor(e!) sigmas, Tensor(f!) convergence, int[] dims, int[] n_power_iterations, float[] eps, "
        "bool[] v_first, float[] tols, float[] scales, bool[] soft, bool update) -> ()"
    ),
    # The gradients of those weights for which `mask` is true, in order. A missing gradient is zero.
    # `widen` is true for outputs of half precision whose weights are float32; it may be empty.
    "backward": (
        "(Tensor?[] grad_outputs, Tensor? grad_sigmas, Tensor[] outputs, Tensor saved, Tensor sigmas, "
        "int[] dims, float[] scales, bool[] soft, bool[] detach_sigma, bool[] mask, bool[] widen) -> "
        "Tensor[]"
    ),
    # The outputs and sigmas of a forward as functions of the weights, which `backward` differentiates.
    "attach": (
        "(Tensor[] weights, Tensor(a)[] outputs, Tensor saved, Tensor(b) sigmas, int[] dims, "
        "float[] scales, bool[] soft, bool[] detach_sigma) -> (Tensor(a)[], Tensor(b))"
    ),
}

# The Triton backend has operators of its own: where both are there, a caller may choose.
SCHEMAS |= {f"triton_{name}": SCHEMAS[name] for name in ("forward_", "backward")}

LIBRARY = torch.library.Library("spectral_ext", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("spectral_ext::allocate", lib=LIBRARY)
def _(
    weights: Sequence[Tensor], dims: Sequence[int], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    return allocate(weights, dims, dtype)


@torch.library.register_fake("spectral_ext::triton_forward_", lib=LIBRARY)
@torch.library.register_fake("spectral_ext::forward_", lib=LIBRARY)
def _(*args: object) -> None:
    return None


@torch.library.register_fake("spectral_ext::triton_backward", lib=LIBRARY)
@torch.library.register_fake("spectral_ext::backward", lib=LIBRARY)
def _(
    grad_outputs: Sequence[Tensor | None],
    grad_sigmas: Tensor | None,
    outputs: Sequence[Tensor],
    saved: Tensor,
    sigmas: Tensor,
    dims: Sequence[int],
    scales: Sequence[float],
    soft: Sequence[bool],
    detach_sigma: Sequence[bool],
    mask: Sequence[bool],
    widen: Sequence[bool],
) -> list[Tensor]:
    dtypes = grad_dtypes(outputs, widen)
    return [
        torch.empty_like(y, dtype=dtype)
        for y, dtype, wanted in zip(outputs, dtypes, mask, strict=True)
        if wanted
    ]
