"""The reference backend: :mod:`spectral_ext.reference` applied to one layer after another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..layout import allocate, grad_dtypes, split_saved, without_autocast
from ..validation import check_layer

__all__ = ["allocate", "attach", "backward", "forward_", "prepare", "unavailable"]


attach = None
prepare = None


def unavailable(device: torch.device | None) -> str | None:
    """Return None: plain torch runs wherever torch runs."""
    return None


@torch.no_grad()
def forward_(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Tensor,
    sigmas: Tensor,
    convergence: Tensor,
    dims: Sequence[int],
    n_power_iterations: Sequence[int],
    eps: Sequence[float],
    v_first: Sequence[bool],
    tols: Sequence[float],
    scales: Sequence[float],
    soft: Sequence[bool],
    update: bool,
) -> None:
    """Normalize all layers; see :data:`spectral_ext.ops.SCHEMAS`."""
    for i, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        check_layer(f"weights[{i}]", weight, u, v, dims[i])  # torch would broadcast and convert
    saved_vectors = split_saved(saved, outputs, dims)
    for i, (u_saved, v_saved) in enumerate(saved_vectors):
        with without_autocast(weights[i].device):
            result = reference.spectral_normalize(
                weights[i],
                us[i],
                vs[i],
                n_power_iterations=n_power_iterations[i],
                eps=eps[i],
                dim=dims[i],
                order="v_first" if v_first[i] else "u_first",
                tol=tols[i],
                scale=scales[i],
                soft=soft[i],
                update=update,
            )
        outputs[i].copy_(result.weight)
        sigmas[i].copy_(result.sigma)
        if convergence.numel() > 0:
            convergence[i].copy_(result.residual)
            convergence[len(weights) + i].copy_(result.iterations)
        u_saved.copy_(result.u)
        v_saved.copy_(result.v)
        if update:
            us[i].copy_(result.u)
            vs[i].copy_(result.v)


def backward(
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
    """Return the gradients of the masked weights; differentiable, unlike the native ones."""
    saved_vectors = split_saved(saved, outputs, dims)
    dtypes = grad_dtypes(outputs, widen)
    return [
        reference.backward(
            grad_outputs[i],
            None if grad_sigmas is None else grad_sigmas[i],
            outputs[i],
            sigmas[i],
            u,
            v,
            dim=dims[i],
            scale=scales[i],
            soft=soft[i],
            detach_sigma=detach_sigma[i],
            dtype=dtypes[i],
        )
        for i, (u, v) in enumerate(saved_vectors)
        if mask[i]
    ]
