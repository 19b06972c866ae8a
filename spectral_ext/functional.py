"""Spectral normalization of a list of weights: the typed, validated list API."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .autograd import Computation, Settings, attach, compute
from .backends import Backend, select
from .layout import compute_dtype
from .reference import Order
from .validation import check_layer, check_lists, check_overlap, check_settings, check_weight

__all__ = ["spectral_normalize"]


def spectral_normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor | None],
    vs: Sequence[Tensor | None],
    *,
    n_power_iterations: int | Sequence[int] = 1,
    eps: float | Sequence[float] = 1e-12,
    dims: int | Sequence[int] | None = None,
    order: Order | Sequence[Order] = "u_first",
    update: bool = True,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Divide every weight by its largest singular value, all in one native call.

    Settings may be one value for all layers or a sequence with one value for each.

    Args:
        weights: tensors of any shape, floating point or complex dtype and strides. A dimension must
            have been left: a 0-D weight has no matrix.
        us: for each weight its left singular vector, of shape ``(weight.shape[dim],)`` and of the
            weight's dtype and device; **written in place** when ``update``.
        vs: for each weight its right singular vector, of shape ``(weight.numel() // len(u),)``.
        n_power_iterations: steps of the power method, at least 1.
        eps: smallest divisor of a vector, positive.
        dims: the dimension that gives a weight's rows: default 0 (1 for ``ConvTranspose`` weights).
        order: ``"u_first"`` gives the numbers of ``torch.nn.utils.parametrizations.spectral_norm``,
            ``"v_first"`` those of ``torch.nn.utils.spectral_norm``.
        update: False keeps ``us`` and ``vs``, as stock does in evaluation.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None reads the
            environment variable ``SPECTRAL_EXT_BACKEND`` and defaults to ``"auto"``.

    Returns:
        The normalized weights, with the shapes, dtypes and strides of ``weights``, and one 1-D tensor
        with every σ: float64 if a weight is, else float32. Both are differentiable; ``u`` and ``v``
        count as constants, as in Miyato et al. (2018), equation (11).

        A 1-D weight under ``u_first`` is divided by its norm as in stock; its ``u`` and ``v`` are not
        looked at and may be None. A weight whose σ is exactly 0 is passed through, where stock
        gives NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing was written.
        RuntimeError: the backend cannot run, or memory of ``us`` and ``vs`` overlaps.
    """
    count = len(weights) if isinstance(weights, (list, tuple)) else 0

    def spread(value: Any) -> list[Any]:
        return list(value) if isinstance(value, (list, tuple)) else [value] * count

    iterations, epsilons, orders = spread(n_power_iterations), spread(eps), spread(order)
    dims = spread(0 if dims is None else dims)
    check_lists(
        weights, us=us, vs=vs, dims=dims, n_power_iterations=iterations, eps=epsilons, order=orders
    )
    us, vs = list(us), list(vs)
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        check_settings(name, iterations[i], epsilons[i], orders[i])
        dims[i] = check_weight(name, weight, dims[i])
        if weight.ndim == 1 and orders[i] == "u_first":
            us[i] = vs[i] = None
        else:
            check_layer(name, weight, us[i], vs[i], dims[i])
    check_overlap(us, vs)
    settings = Settings(dims, iterations, epsilons, [value == "v_first" for value in orders])
    results = normalize_layers(list(weights), us, vs, settings, update, backend)
    return results.normalized, results.sigmas


@dataclass(slots=True)
class Results:
    """The outcome of :func:`normalize_layers`.

    ``normalized`` and ``sigmas`` are in the graph if gradients were enabled. ``computations`` are
    those that can be attached later, each with the layers that it has; those of the reference,
    which autograd differentiates itself, are not among them.
    """

    normalized: list[Tensor]
    sigmas: Tensor
    computations: list[tuple[Computation, Sequence[int]]]

    def attached(self, index: int, weight: Tensor) -> Tensor | None:
        """Return the normalized weight of one layer with a graph node of its own."""
        for computation, members in self.computations:
            if index in members:
                place = members.index(index)
                with torch.enable_grad():
                    return attach([weight], computation.narrow(place, place + 1))[0][0]
        return None


def normalize_layers(
    weights: list[Tensor],
    us: list[Any],
    vs: list[Any],
    settings: Settings,
    update: bool,
    backend: str | None,
    bucket_bytes: int | None = None,
) -> Results:
    """Normalize layers whose arguments were checked; ``bucket_bytes`` of weights share a graph node.

    Layers of one device and compute dtype go into one call. Complex weights, and 1-D weights under
    ``u_first``, whose ``u`` and ``v`` are None, are computed by the reference.
    """
    devices, dtypes = {weight.device for weight in weights}, {weight.dtype for weight in weights}
    if (
        len(devices) == len(dtypes) == 1
        and not dtypes & _COMPLEX
        and all(u is not None for u in us)
    ):
        chosen = select(backend, *devices)
        computation = compute(weights, us, vs, settings, update, chosen)
        normalized, sigmas = _attach_in_buckets(weights, computation, bucket_bytes)
        return Results(normalized, sigmas, [(computation, range(len(weights)))])
    return _normalize_mixed(weights, us, vs, settings, update, backend, bucket_bytes)


class PreparedCall:
    """:func:`normalize_layers` for lists that stay the same, with less to do in each call.

    Raises:
        TypeError, ValueError: a tensor was changed (``module.to(…)``, ``.data = …``) into one that
            does not fit, or only not together with the others. Nothing was written.
    """

    __slots__ = ("_backend", "_dims", "_run", "_weights")

    def __init__(
        self,
        weights: list[Tensor],
        us: list[Tensor],
        vs: list[Tensor],
        settings: Settings,
        backend: Backend,
    ) -> None:
        assert backend.prepare is not None
        self._weights, self._dims, self._backend = weights, settings.dims, backend
        self._run = backend.prepare(weights, us, vs, *settings)

    def __call__(self, update: bool, bucket_bytes: int | None) -> Results:
        """Normalize all layers."""
        attached = bucket_bytes is None and torch.is_grad_enabled()
        outputs, saved, sigmas = self._run(update, attached)
        if attached:
            return Results(outputs, sigmas, [])
        computation = Computation(self._backend, self._dims, outputs, saved, sigmas)
        if bucket_bytes is not None:
            outputs, sigmas = _attach_in_buckets(self._weights, computation, bucket_bytes)
        return Results(outputs, sigmas, [(computation, range(len(outputs)))])


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
    )
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
            normalized += outputs
            sigmas.append(sigma)
            start, size = stop, 0
    return normalized, torch.cat(sigmas)


def _normalize_mixed(
    weights: list[Tensor],
    us: list[Any],
    vs: list[Any],
    settings: Settings,
    update: bool,
    backend: str | None,
    bucket_bytes: int | None,
) -> Results:
    """Normalize layers of several kinds, one call for each kind."""
    count = len(weights)
    kinds = [
        None if u is None or weight.is_complex() else (weight.device, compute_dtype(weight.dtype))
        for weight, u in zip(weights, us, strict=True)
    ]
    normalized: list[Any] = [None] * count
    sigma: list[Any] = [None] * count
    computations: list[tuple[Computation, Sequence[int]]] = []
    # Choose every backend before the first call, so that an error leaves all layers as they were.
    backends = {kind: select(backend, kind[0]) for kind in dict.fromkeys(kinds) if kind is not None}
    for kind, chosen in backends.items():
        members = [i for i in range(count) if kinds[i] == kind]
        part = [weights[i] for i in members]
        computation = compute(
            part,
            [us[i] for i in members],
            [vs[i] for i in members],
            settings.select(members),
            update,
            chosen,
        )
        outputs, sigmas = _attach_in_buckets(part, computation, bucket_bytes)
        for place, i in enumerate(members):
            normalized[i], sigma[i] = outputs[place], sigmas[place]
        computations.append((computation, members))
    for i in (i for i in range(count) if kinds[i] is None):
        normalized[i], sigma[i] = _normalize_by_reference(
            weights[i], us[i], vs[i], settings.select([i]), update
        )
    if not count:
        return Results([], torch.empty(0), [])
    real = [s.real if s.is_complex() else s for s in sigma]
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in real) else torch.float32
    return Results(
        normalized, torch.stack([s.to(real[0].device, dtype) for s in real]), computations
    )


def _normalize_by_reference(
    weight: Tensor, u: Any, v: Any, settings: Settings, update: bool
) -> tuple[Tensor, Tensor]:
    if u is not None or v is not None:
        check_layer("weight", weight, u, v, settings.dims[0])
    result = reference.spectral_normalize(
        # Autograd keeps what is differentiated: not the weight, which an optimizer may change.
        weight.clone() if torch.is_grad_enabled() and weight.requires_grad else weight,
        u,
        v,
        n_power_iterations=settings.n_power_iterations[0],
        eps=settings.eps[0],
        dim=settings.dims[0],
        order="v_first" if settings.v_first[0] else "u_first",
        update=update,
    )
    if update and u is not None and v is not None:
        with torch.no_grad():
            u.copy_(result.u)
            v.copy_(result.v)
    return result.weight, result.sigma
