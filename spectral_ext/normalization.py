"""Layers whose arguments were checked: one native call for each kind of them, and what stands around it.

Weights of one device and compute dtype share a call. Complex weights and vectors go to the reference; blocks
of weights go in as views; a bucket of weights gets an autograd node of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import reference
from .autograd import Computation, attach, compute, compute_transformed, is_transformed
from .backends import Backend, select
from .layout import compute_dtype, matrix_shape, output_dtype, without_autocast
from .settings import Settings
from .validation import check_layer

__all__ = [
    "PreparedCall",
    "Results",
    "is_traced",
    "join",
    "kind_of",
    "normalize_layers",
    "prepare",
    "refuse_changed",
    "with_gain",
]


@dataclass(slots=True)
class Results:
    """The outcome of :func:`normalize_layers`.

    ``normalized`` and ``sigmas`` are in the graph if gradients were enabled. ``computations`` are
    those that can be attached later, each with the layers that it has; those of the reference,
    which autograd differentiates itself, are not among them. ``convergence`` has the residuals and then
    the iterations of all layers; it is empty where no layer has a ``tol``.
    """

    normalized: list[Tensor]
    sigmas: Tensor
    computations: list[tuple[Computation, Sequence[int]]]
    convergence: Tensor
    saved: list[tuple[Tensor, Sequence[int]]] = field(default_factory=list)
    """The ``u`` and ``v`` that were used, in flat tensors, each with the layers that it has."""

    def attach(self, weights: list[Tensor], bucket_bytes: int | None) -> dict[int, Tensor]:
        """Return normalized weights with nodes of their own, of the layers that can be attached."""
        outputs: dict[int, Tensor] = {}
        for computation, members in self.computations:
            part = [weights[i] for i in members]
            attached, _ = _attach_in_buckets(part, computation, bucket_bytes)
            outputs.update(zip(members, attached, strict=True))
        return outputs

    def attached(self, index: int, weight: Tensor) -> Tensor | None:
        """Return the normalized weight of one layer with a graph node of its own.

        Raises:
            RuntimeError: it was changed in place since it was computed.
        """
        if is_transformed():  # which wants the whole computation
            return None
        for computation, members in self.computations:
            if index in members:
                place = members.index(index)
                refuse_changed(computation.outputs[place], computation.version)
                with torch.enable_grad():
                    return attach([weight], computation.narrow(place, place + 1))[0][0]
        return None


def refuse_changed(normalized: Tensor, version: int) -> None:
    """Raise if a normalized weight is not of the version that it was computed in."""
    if version >= 0 and normalized._version != version:
        raise RuntimeError(
            f"a normalized weight of shape {tuple(normalized.shape)} was changed in place in a forward that "
            "was entered without gradients, so that its gradient is not known; enter the model with "
            "gradients, or change a copy, as in `layer.weight * mask`"
        )


def normalize_layers(
    weights: list[Tensor],
    us: list[Any],
    vs: list[Any],
    settings: Settings,
    update: bool,
    backend: str | None,
    bucket_bytes: int | None = None,
    dtype: torch.dtype | None = None,
) -> Results:
    """Normalize layers whose arguments were checked; ``bucket_bytes`` of weights share a graph node.

    A ``dtype``, of half precision, is that of the results of float32 weights.
    Layers of one device and compute dtype go into one call. Complex weights, and 1-D weights under
    ``u_first``, whose ``u`` and ``v`` are None, are computed by the reference; all are where
    :func:`is_recorded`.
    """
    settings = settings.with_least_eps(weights)
    if max(settings.blocks, default=1) > 1:
        return _normalize_blocks(weights, us, vs, settings, update, backend, bucket_bytes, dtype)
    devices, dtypes = {weight.device for weight in weights}, {weight.dtype for weight in weights}
    if (
        len(devices) == len(dtypes) == 1
        and not is_recorded()
        and not dtypes & _COMPLEX
        and all(u is not None for u in us)
    ):
        chosen = select(backend, *devices)
        return _normalize_in_one_call(
            weights, us, vs, settings, update, chosen, bucket_bytes, dtype
        )
    return _normalize_mixed(weights, us, vs, settings, update, backend, bucket_bytes, dtype)


def is_recorded() -> bool:
    """Return whether plain torch operations are wanted, whatever the backend.

    What ``torch.export``, ``torch.onnx.export`` and ``torch.jit.trace`` write down is to run where our
    operators are not, and code that ``torch.compile`` makes of transforms of ``torch.func`` knows how to
    transform torch's.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return torch.compiler.is_compiling() and is_transformed()


def is_traced() -> bool:
    """Return whether tensors may be stand-ins, which must not be kept beyond this call.

    Transforms of ``torch.func`` and dual numbers wrap tensors, ``torch.export`` and ``torch.jit.trace``
    record what is done to them, and under ``FakeTensorMode`` and ``make_fx`` they have no data or are
    watched.
    """
    if is_transformed() or is_recorded():
        return True
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(kind) is not None for kind in _MODES_OF_STAND_INS)


_MODES_OF_STAND_INS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def _normalize_in_one_call(
    weights: list[Tensor],
    us: list[Any],
    vs: list[Any],
    settings: Settings,
    update: bool,
    backend: Backend,
    bucket_bytes: int | None,
    dtype: torch.dtype | None,
) -> Results:
    """Normalize layers of one device and compute dtype."""
    if is_transformed():
        transformed = compute_transformed(weights, us, vs, settings, update, backend, dtype)
        outputs, sigmas, convergence = transformed
        return Results(outputs, sigmas, [], convergence)
    computation, convergence = compute(weights, us, vs, settings, update, backend, dtype)
    outputs, sigmas = _attach_in_buckets(weights, computation, bucket_bytes)
    members = range(len(weights))
    saved: list[tuple[Tensor, Sequence[int]]] = [(computation.saved, members)]
    return Results(outputs, sigmas, [(computation, members)], convergence, saved)


class PreparedCall:
    """:func:`normalize_layers` for lists that stay the same, with less to do in each call.

    Raises:
        TypeError, ValueError: a tensor was changed (``module.to(…)``, ``.data = …``) into one that
            does not fit, or only not together with the others. Nothing was written.
    """

    __slots__ = ("_backend", "_members", "_run", "_settings", "_weights")

    def __init__(
        self,
        weights: list[Tensor],
        us: list[Tensor],
        vs: list[Tensor],
        settings: Settings,
        backend: Backend,
    ) -> None:
        assert backend.prepare is not None
        self._weights, self._settings, self._backend = weights, settings, backend
        self._members = range(len(weights))
        self._run = backend.prepare(weights, us, vs, *settings[:-1])  # there are no blocks

    def __call__(
        self, update: bool, bucket_bytes: int | None, dtype: torch.dtype | None = None
    ) -> Results:
        """Normalize all layers."""
        attached = bucket_bytes is None and torch.is_grad_enabled()
        outputs, saved, sigmas, convergence = self._run(update, attached, dtype)
        members = self._members
        vectors: list[tuple[Tensor, Sequence[int]]] = [(saved, members)]
        if attached:
            return Results(outputs, sigmas, [], convergence, vectors)
        computation = Computation(self._backend, self._settings, outputs, saved, sigmas)
        if bucket_bytes is not None:
            outputs, sigmas = _attach_in_buckets(self._weights, computation, bucket_bytes)
        return Results(outputs, sigmas, [(computation, members)], convergence, vectors)


def prepare(
    weights: list[Tensor], us: list[Any], vs: list[Any], settings: Settings, backend: Backend
) -> PreparedCall | None:
    """Return a prepared call; None where the layers need several, or Python has to see them."""
    kinds = {(weight.device, weight.dtype) for weight in weights}
    fit = (
        backend.prepare is not None
        and len(kinds) == 1
        and all(type(weight) in (Tensor, torch.nn.Parameter) for weight in weights)
        and not any(weight.is_complex() for weight in weights)
        and all(u is not None for u in us)
        and max(settings.blocks) == 1
    )
    settings = settings.with_least_eps(weights)
    return PreparedCall(weights, us, vs, settings, backend) if fit else None


_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}


def _attach_in_buckets(
    weights: list[Tensor], computation: Computation, bucket_bytes: int | None
) -> tuple[list[Tensor], Tensor]:
    if not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
        return computation.outputs, computation.sigmas
    if bucket_bytes is None:
        return attach(weights, computation)
    normalized: list[Tensor] = []
    sigmas: list[Tensor] = []
    start, size = 0, 0
    for stop, weight in enumerate(weights, start=1):
        size += weight.nbytes
        if size >= bucket_bytes or stop == len(weights):
            outputs, sigma = attach(weights[start:stop], computation.narrow(start, stop))
            _hasten(sigma)
            normalized += outputs
            sigmas.append(sigma)
            start, size = stop, 0
    return normalized, torch.cat(sigmas)


# Of nodes that are ready, autograd runs the one of the highest number, which is the youngest; those that
# accumulate gradients have the highest number that there is.
_NUMBER_OF_THE_NEXT = 2**63


def _hasten(output: Tensor) -> None:
    """Let the node of an output run as soon as its gradients are there.

    It is older than all nodes of the layers, which would all run before it.
    """
    # Dynamo cannot trace a read of grad_fn.
    if not torch.compiler.is_compiling() and output.grad_fn is not None:
        output.grad_fn._set_sequence_nr(_NUMBER_OF_THE_NEXT)  # type: ignore[attr-defined]


def _normalize_blocks(
    weights: list[Tensor],
    us: list[Any],
    vs: list[Any],
    settings: Settings,
    update: bool,
    backend: str | None,
    bucket_bytes: int | None,
    dtype: torch.dtype | None,
) -> Results:
    """Normalize the blocks of weights, still in one call: views go in, and are joined after it."""
    blocks = settings.blocks
    owner = [i for i, count in enumerate(blocks) for _ in range(count)]
    parts = [
        part
        for weight, u, v, count in zip(weights, us, vs, blocks, strict=True)
        for part in zip(
            weight.chunk(count),
            [None] if u is None else u.chunk(count),
            [None] if v is None else v.chunk(count),
            strict=True,
        )
    ]
    each = settings._replace(blocks=[1] * len(blocks)).select(owner)
    of_weights, of_us, of_vs = (list(column) for column in zip(*parts, strict=True))
    results = normalize_layers(of_weights, of_us, of_vs, each, update, backend, bucket_bytes, dtype)
    joined = [
        outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        for outputs in _runs(results.normalized, blocks)
    ]
    convergence = results.convergence
    if len(convergence):
        rows = convergence.view(2, -1)
        convergence = torch.cat([_largest(row, blocks) for row in rows])
    sizes = [matrix_shape(weight, dim) for weight, dim in zip(of_weights, each.dims, strict=True)]
    saved = _saved_of_blocks(results, sizes, owner, len(blocks))
    return Results(joined, _largest(results.sigmas, blocks), [], convergence, saved)


def _saved_of_blocks(
    results: Results, sizes: list[tuple[int, int]], owner: list[int], count: int
) -> list[tuple[Tensor, Sequence[int]]]:
    """Return the saved vectors of each weight: ``u`` of all its blocks, and then ``v``."""
    us: list[list[Tensor]] = [[] for _ in range(count)]
    vs: list[list[Tensor]] = [[] for _ in range(count)]
    for saved, members in results.saved:
        vectors = saved.split([size for i in members for size in sizes[i]])
        for place, i in enumerate(members):
            us[owner[i]].append(vectors[2 * place])
            vs[owner[i]].append(vectors[2 * place + 1])
    return [(torch.cat(us[i] + vs[i]), [i]) for i in range(count) if us[i]]


def _runs(values: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    """Cut a list into runs of so many."""
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in counts]


def _largest(values: Tensor, counts: list[int]) -> Tensor:
    """Return the largest of each run of values."""
    return torch.stack([part.amax() for part in values.split(counts)])


def _normalize_mixed(
    weights: list[Tensor],
    us: list[Any],
    vs: list[Any],
    settings: Settings,
    update: bool,
    backend: str | None,
    bucket_bytes: int | None,
    dtype: torch.dtype | None,
) -> Results:
    """Normalize layers of several kinds, one call for each kind."""
    count, by_reference = len(weights), is_recorded()
    kinds = [
        None if by_reference or u is None or weight.is_complex() else kind_of(weight)
        for weight, u in zip(weights, us, strict=True)
    ]
    normalized: list[Any] = [None] * count
    sigma: list[Any] = [None] * count
    residuals: list[Any] = [None] * count
    iterations: list[Any] = [None] * count
    computations: list[tuple[Computation, Sequence[int]]] = []
    saved: list[tuple[Tensor, Sequence[int]]] = []
    # Choose every backend before the first call, so that an error leaves all layers as they were.
    backends = {kind: select(backend, kind[0]) for kind in dict.fromkeys(kinds) if kind is not None}
    for kind, chosen in backends.items():
        members = [i for i in range(count) if kinds[i] == kind]
        part = _normalize_in_one_call(
            [weights[i] for i in members],
            [us[i] for i in members],
            [vs[i] for i in members],
            settings.select(members),
            update,
            chosen,
            bucket_bytes,
            dtype,
        )
        outputs, sigmas, convergence = part.normalized, part.sigmas, part.convergence
        if not len(convergence):  # no tol among these
            made = [float(settings.n_power_iterations[i]) if update else 0.0 for i in members]
            convergence = sigmas.new_tensor([math.nan] * len(members) + made)
        for place, i in enumerate(members):
            normalized[i], sigma[i] = outputs[place], sigmas[place]
            residuals[i], iterations[i] = convergence[place], convergence[len(members) + place]
        computations += [(computation, members) for computation, _ in part.computations]
    for i in (i for i in range(count) if kinds[i] is None):
        result = _normalize_by_reference(weights[i], us[i], vs[i], settings.select([i]), update)
        normalized[i] = result.weight.to(output_dtype(weights[i], dtype))
        sigma[i] = result.sigma
        residuals[i], iterations[i] = result.residual, result.iterations
        if us[i] is not None and not by_reference:
            saved.append((torch.cat([result.u, result.v]).detach(), [i]))
    if not count:
        return Results([], torch.empty(0), [], torch.empty(0))
    sigmas = join(sigma)
    convergence = sigmas.new_empty(0)
    if any(settings.tols):
        convergence = join(residuals + iterations).to(sigmas)
    saved += [(computation.saved, members) for computation, members in computations]
    return Results(normalized, sigmas, computations, convergence, saved)


def kind_of(weight: Tensor) -> tuple[torch.device, torch.dtype]:
    """Return what the layers of one native call have in common."""
    return weight.device, compute_dtype(weight.dtype)


def join(values: list[Tensor]) -> Tensor:
    """Return numbers of several calls in one tensor, where the first one is."""
    if not values:
        return torch.empty(0)
    real = [value.real if value.is_complex() else value for value in values]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in real) else torch.float32
    return torch.stack([x.to(real[0].device, dtype) for x in real])


def _normalize_by_reference(
    weight: Tensor, u: Any, v: Any, settings: Settings, update: bool
) -> reference.Normalized:
    if not is_recorded():
        if u is not None or v is not None:
            check_layer("weight", weight, u, v, settings.dims[0])
        if torch.is_grad_enabled() and weight.requires_grad:
            weight = weight.clone()  # autograd keeps it, and an optimizer may change the weight
    with without_autocast(weight.device):
        result = reference.spectral_normalize(
            weight,
            u,
            v,
            n_power_iterations=settings.n_power_iterations[0],
            eps=settings.eps[0],
            dim=settings.dims[0],
            order="v_first" if settings.v_first[0] else "u_first",
            tol=settings.tols[0],
            scale=settings.scales[0],
            soft=settings.soft[0],
            detach_sigma=settings.detach_sigma[0],
            update=update,
        )
    if update and u is not None and v is not None:
        with torch.no_grad():
            u.copy_(result.u)
            v.copy_(result.v)
    return result


def with_gain(weight: Tensor, gain: Tensor | None, dim: int) -> Tensor:
    """Return a weight times one gain, or one for each row of it."""
    if gain is None:
        return weight
    if gain.ndim:
        gain = gain.view([-1 if d == dim else 1 for d in range(weight.ndim)])
    return weight * gain.to(weight.dtype)
