"""Forward, backward and double backward of many layers as one autograd node.

The forward is computed without gradient first and attached to the graph afterwards, so that a part of
a computation can have a node of its own: one bucket of layers, or one layer that is asked for later.

A node saves its outputs ``Y`` and σ and the vectors ``u``, ``v`` of its forward; never the weights. An
optimizer step between two backwards of one graph therefore breaks nothing. σ is an output of the node
and not a constant, because a backward written in terms of a constant σ has a wrong second derivative.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, reference
from .layout import matrix_shape
from .settings import Settings

__all__ = ["Computation", "attach", "compute"]


@dataclass(slots=True)
class Computation:
    """The results of one forward call, not attached to any graph."""

    backend: Backend
    settings: Settings
    outputs: list[Tensor]
    saved: Tensor
    sigmas: Tensor

    def narrow(self, start: int, stop: int) -> "Computation":
        """Return the part for layers ``start`` to ``stop``; the tensors are views."""
        sizes = [
            sum(matrix_shape(y, d)) for y, d in zip(self.outputs, self.settings.dims, strict=True)
        ]
        first, size = sum(sizes[:start]), sum(sizes[start:stop])
        return Computation(
            self.backend,
            self.settings.select(range(start, stop)),
            self.outputs[start:stop],
            self.saved[first : first + size],
            self.sigmas[start:stop],
        )


@torch.no_grad()
def compute(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    settings: Settings,
    update: bool,
    backend: Backend,
    dtype: torch.dtype | None = None,
) -> tuple[Computation, Tensor]:
    """Normalize all layers, of one device and compute dtype, in one call and without gradient.

    A ``dtype`` of half precision is that of the outputs of float32 weights.

    The second result has the residuals and then the iterations of all layers; it is empty where no
    layer has a ``tol``.
    """
    if dtype is not None:  # a half output has the strides of its weight
        dense = torch.ops.aten.is_non_overlapping_and_dense
        weights = [w if w.is_contiguous() or dense(w) else w.contiguous() for w in weights]
    outputs, saved, sigmas = backend.allocate(weights, settings.dims, dtype)
    convergence = saved.new_empty(2 * len(weights) if any(settings.tols) else 0)
    backend.forward_(
        weights, us, vs, outputs, saved, sigmas, convergence, *settings.of_forward(update)
    )
    return Computation(backend, settings, outputs, saved, sigmas), convergence


class _SpectralNormalize(torch.autograd.Function):
    """``weights -> (outputs…, sigmas)``, whose values are those of a computation made before."""

    @staticmethod
    def forward(computation: Computation, *weights: Tensor) -> tuple[Tensor, ...]:
        return (*[y.detach() for y in computation.outputs], computation.sigmas.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        computation = inputs[0]
        ctx.set_materialize_grads(False)
        # A frozen weight stays out of the graph, and what uses it computes no gradient for it.
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(
            *(y for y, wanted in zip(output, needed, strict=False) if not wanted)
        )
        ctx.backend = computation.backend
        ctx.settings = computation.settings
        ctx.widen = [
            weight.dtype != y.dtype
            for weight, y in zip(inputs[1:], computation.outputs, strict=True)
        ]
        ctx.save_for_backward(*output, computation.saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *grad_outputs, grad_sigmas = grads
        *outputs, sigmas, saved = ctx.saved_tensors
        mask = [
            needed and not (grad is None and grad_sigmas is None)
            for needed, grad in zip(ctx.needs_input_grad[1:], grad_outputs, strict=True)
        ]
        # A gradient that is itself differentiated, or one of a batch, is made of torch operations.
        backend = reference if torch.is_grad_enabled() or _batched(grads) else ctx.backend
        found = iter(
            backend.backward(
                grad_outputs,
                grad_sigmas,
                outputs,
                saved,
                sigmas,
                *ctx.settings.of_node,
                mask,
                ctx.widen,
            )
        )
        return (None, *(next(found) if wanted else None for wanted in mask))


def _batched(grads: tuple[Tensor | None, ...]) -> bool:
    """Return whether a gradient is a batch of them inside ``vmap``, whose memory no kernel can see."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return any(
        functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g)
        for g in grads
        if g is not None
    )


def attach(weights: list[Tensor], computation: Computation) -> tuple[list[Tensor], Tensor]:
    """Return the outputs and sigmas of a computation as differentiable functions of ``weights``."""
    native = computation.backend.attach
    if native is not None and not (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    ):
        return native(  # a node without Python: a tenth of this one's time
            weights,
            computation.outputs,
            computation.saved,
            computation.sigmas,
            *computation.settings.of_node,
        )
    *outputs, sigmas = _SpectralNormalize.apply(computation, *weights)
    return outputs, sigmas
