"""Forward, backward and double backward of many layers as one autograd node.

The forward is computed without gradient first and attached to the graph afterwards, so that a part of
a computation can have a node of its own: one bucket of layers, or one layer that is asked for later.

Inside of ``torch.func``'s transforms, and in forward mode, the computation is a function of its own,
which every transform sees through: ``vmap`` makes one call of the layers of all members of a batch.

A node saves its outputs ``Y`` and σ and the vectors ``u``, ``v`` of its forward; never the weights. An
optimizer step between two backwards of one graph therefore breaks nothing. σ is an output of the node
and not a constant, because a backward written in terms of a constant σ has a wrong second derivative.

An output may be changed in place after the forward, as ``nn.Embedding(max_norm=…)`` does, and a mask on
``layer.weight``. So the node saves aliases of its outputs that have version counters of their own, and
reads the counters of the outputs itself. The backward computes an output that was changed again, from the
weight, which the graph holds anyway; it raises if the weight was changed as well.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference as formulas
from .backends import Backend, reference
from .layout import matrix_shape, split_saved, without_autocast
from .settings import Settings
from .versions import Versions, with_graph_of

__all__ = ["Computation", "attach", "compute", "compute_transformed", "is_transformed"]


@dataclass(slots=True)
class Computation:
    """The results of one forward call, not attached to any graph."""

    backend: Backend
    settings: Settings
    outputs: list[Tensor]
    saved: Tensor
    sigmas: Tensor
    version: int = -1
    """That of every output after the forward; -1 if it is not known, in code that is compiled."""

    def __post_init__(self) -> None:
        if self.version < 0 and not torch.compiler.is_compiling():
            known = self.outputs and not self.outputs[0].is_inference()
            self.version = self.outputs[0]._version if known else -1

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
            self.version,
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
    """``weights -> (outputs…, kept…, sigmas)``, whose values are those of a computation made before.

    ``kept`` are the outputs again, for the backward: they do not share the version counters of the
    outputs.
    """

    @staticmethod
    def forward(computation: Computation, *weights: Tensor) -> tuple[Tensor, ...]:
        outputs = [y.detach() for y in computation.outputs]
        # A compiled graph follows memory and not versions, so it needs a copy, which the compiler
        # removes where nothing is changed in place.
        kept = [y.clone() if torch.compiler.is_compiling() else y.data for y in outputs]
        return (*outputs, *kept, computation.sigmas.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        computation, *weights = inputs
        outputs, kept = output[: len(weights)], output[len(weights) : -1]
        ctx.set_materialize_grads(False)
        # A frozen weight stays out of the graph, and what uses it computes no gradient for it.
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(
            *(y for y, wanted in zip(output, needed * 2, strict=False) if not wanted)
        )
        ctx.backend = computation.backend
        ctx.settings = computation.settings
        ctx.versions = None if torch.compiler.is_compiling() else Versions(outputs, weights)
        ctx.widen = [
            weight.dtype != y.dtype for weight, y in zip(weights, computation.outputs, strict=True)
        ]
        ctx.save_for_backward(*kept, output[-1], computation.saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        *of_outputs, of_sigmas = grads
        pairs = zip(of_outputs[: len(needed)], of_outputs[len(needed) :], strict=True)
        merged = [b if a is None else a if b is None else a + b for a, b in pairs]
        return (None, *_grad_weights(ctx, needed, (*merged, of_sigmas)))


def _normalized_again(ctx: Any, output: Tensor, sigma: Tensor, layer: int) -> Tensor:
    """Return an output that was changed in place as the forward computed it."""
    scale, soft = ctx.settings.scales[layer], ctx.settings.soft[layer]
    with torch.no_grad():
        weight = ctx.versions.weight(ctx, layer).to(sigma.dtype)
        value = (weight / formulas.divisor(sigma, scale, soft)).to(output.dtype)
    return with_graph_of(output, value)


def _grad_weights(
    ctx: Any, needed: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Return the gradients of the weights, of those of the outputs and of the sigmas."""
    *grad_outputs, grad_sigmas = map(_dense, grads)
    *outputs, sigmas, saved = ctx.saved_tensors
    mask = [
        wanted and not (grad is None and grad_sigmas is None)
        for wanted, grad in zip(needed, grad_outputs, strict=True)
    ]
    if ctx.versions is not None:
        for i, wanted in enumerate(mask):
            if wanted and ctx.versions.is_output_changed(i):
                outputs[i] = _normalized_again(ctx, outputs[i], sigmas[i], i)
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
    return [next(found) if wanted else None for wanted in mask]


def _dense(grad: Tensor | None) -> Tensor | None:
    """Return a gradient without the layout that ``nn.Embedding(sparse=True)`` gives it."""
    if grad is None or torch.compiler.is_compiling() or grad.layout == torch.strided:
        return grad
    return grad.to_dense()


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
    if native is not None and not torch.compiler.is_compiling():
        return native(  # a node without Python: a tenth of this one's time
            weights,
            computation.outputs,
            computation.saved,
            computation.sigmas,
            *computation.settings.of_node,
        )
    *outputs, sigmas = _SpectralNormalize.apply(computation, *weights)
    return outputs[: len(weights)], sigmas


def is_transformed() -> bool:
    """Return whether tensors may be wrapped: by a transform of ``torch.func``, or as dual numbers."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def compute_transformed(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    settings: Settings,
    update: bool,
    backend: Backend,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Do what :func:`compute` does, where :func:`is_transformed`.

    Returns:
        Outputs and sigmas, differentiable in every way, and the report of convergence.

    Raises:
        ValueError: ``vmap`` has a weight of its own for every member of a batch, but ``us`` and
            ``vs``, which are to be written, are the same for all.
    """
    call = _Call(settings, update, backend, dtype)
    *outputs, sigmas, _, convergence = _Transformed.apply(call, *weights, *us, *vs)
    return outputs, sigmas, convergence


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of a computation that are no tensors."""

    settings: Settings
    update: bool
    backend: Backend
    dtype: torch.dtype | None


class _Transformed(torch.autograd.Function):
    """``weights…, us…, vs… -> outputs…, sigmas, saved, convergence``.

    Every transform takes its own wrappers off, so that :meth:`forward` sees plain tensors, whose memory
    a backend can follow. That is also how ``us`` and ``vs`` can be written in place here.
    """

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        columns = _columns(tensors)
        made, convergence = compute(*columns, call.settings, call.update, call.backend, call.dtype)
        return (*made.outputs, made.sigmas, made.saved, convergence)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[-2:])
        ctx.backend, ctx.settings, ctx.versions = call.backend, call.settings, None
        pairs = zip(inputs[1:], output[:-3], strict=False)  # the weights come first
        ctx.widen = [weight.dtype != y.dtype for weight, y in pairs]
        ctx.save_for_backward(*output[:-1])
        ctx.save_for_forward(*output[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(grads) - 3
        needed = ctx.needs_input_grad[1 : 1 + count]
        return (None, *_grad_weights(ctx, needed, grads[:-2]), *[None] * (2 * count))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *outputs, sigmas, saved = ctx.saved_tensors
        settings = zip(*ctx.settings.of_node, strict=True)
        vectors = split_saved(saved, outputs, ctx.settings.dims)
        with without_autocast(sigmas.device):
            found = [
                formulas.jvp(
                    torch.zeros_like(output) if tangent is None else tangent,
                    output,
                    sigma,
                    u,
                    v,
                    dim=dim,
                    scale=scale,
                    soft=soft,
                    detach_sigma=detach_sigma,
                )
                for tangent, output, sigma, (u, v), (dim, scale, soft, detach_sigma) in zip(
                    tangents, outputs, sigmas.unbind(), vectors, settings, strict=False
                )
            ]
        of_outputs, of_sigmas = zip(*found, strict=True)
        return (*of_outputs, torch.stack(of_sigmas), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Tensor) -> Any:
        """Compute the layers of all members of a batch in one call, and what they share once."""
        size, columns, dims = info.batch_size, _columns(tensors), _columns(in_dims[1:])
        is_batched = [any(d is not None for d in of_layer) for of_layer in zip(*dims, strict=True)]
        if call.update:
            _check_vectors_are_batched(*dims)
        counts = [size if batched else 1 for batched in is_batched]
        owner = [i for i, count in enumerate(counts) for _ in range(count)]
        spread = [
            member
            for column, of_column in zip(columns, dims, strict=True)
            for tensor, dim, count in zip(column, of_column, counts, strict=True)
            for member in ([tensor] * count if dim is None else tensor.unbind(dim))
        ]
        each = _Call(call.settings.select(owner), call.update, call.backend, call.dtype)
        *outputs, sigmas, saved, convergence = _Transformed.apply(each, *spread)
        rest = iter(outputs)
        joined = [
            torch.stack([next(rest) for _ in range(size)]) if batched else next(rest)
            for batched in is_batched
        ]
        ones = [1] * len(counts)
        sizes = [sum(matrix_shape(y, d)) for y, d in zip(outputs, each.settings.dims, strict=True)]
        sizes = [sizes[owner.index(i)] for i in range(len(counts))]
        report = [
            _rows(row, counts, ones, size)
            for row in (convergence.view(2, -1) if len(convergence) else ())
        ]
        flat = (
            _rows(sigmas, counts, ones, size),
            _rows(saved, counts, sizes, size),
            torch.cat(report, 1) if report else convergence,
        )
        out_dims = [0 if batched else None for batched in is_batched]
        return (*joined, *flat), (*out_dims, 0, 0, 0 if report else None)


def _columns(values: tuple[Any, ...]) -> tuple[list[Any], list[Any], list[Any]]:
    """Return weights, us and vs, which stand one after the other."""
    count = len(values) // 3
    return list(values[:count]), list(values[count : 2 * count]), list(values[2 * count :])


def _check_vectors_are_batched(
    weights: list[int | None], us: list[int | None], vs: list[int | None]
) -> None:
    for i, of_layer in enumerate(zip(weights, us, vs, strict=True)):
        if any(dim is not None for dim in of_layer) and None in of_layer[1:]:
            raise ValueError(
                f"layer {i}: each member of the batch of vmap would write u and v, which are not "
                "batched; give vmap the buffers too (in_dims=0), or call model.eval() before"
            )


def _rows(flat: Tensor, counts: list[int], sizes: list[int], batch: int) -> Tensor:
    """Return one row for each member of a batch, of what ``counts`` members of each layer have."""
    parts = flat.split([count * size for count, size in zip(counts, sizes, strict=True)])
    rows = [
        part.view(count, size).expand(batch, size)
        for part, count, size in zip(parts, counts, sizes, strict=True)
    ]
    return torch.cat(rows, 1)
