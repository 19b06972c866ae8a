"""Spectral normalization of a list of weights: the typed, validated list API."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .backends import select
from .layout import allocate_vectors
from .normalization import Results, join, kind_of, normalize_layers, with_gain
from .reference import Order
from .settings import LayerSettings, Settings
from .validation import (
    check_bool,
    check_convergence,
    check_gain,
    check_layer,
    check_lists,
    check_overlap,
    check_weight,
    refuse_sharded,
)

__all__ = ["project_", "spectral_normalize"]


def spectral_normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor | None],
    vs: Sequence[Tensor | None],
    *,
    n_power_iterations: int | Sequence[int] = 1,
    eps: float | Sequence[float] = 1e-12,
    dims: int | Sequence[int] | None = None,
    order: Order | Sequence[Order] = "u_first",
    tol: float | Sequence[float] = 0.0,
    scale: float | Sequence[float] = 1.0,
    bound: float | Sequence[float | None] | None = None,
    detach_sigma: bool | Sequence[bool] = False,
    blocks: int | Sequence[int] = 1,
    gain: Sequence[Tensor | None] | None = None,
    update: bool = True,
    convergence: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Divide every weight by its largest singular value, all in one native call.

    Settings may be one value for all layers or a sequence with one value for each.

    Args:
        weights: tensors of any shape, floating point or complex dtype and strides. A dimension must
            have been left: a 0-D weight has no matrix.
        us: for each weight its left singular vector, of shape ``(weight.shape[dim],)`` and of the
            weight's dtype, or float32 for a half precision weight; **written in place** when
            ``update``.
        vs: for each weight its right singular vector, of shape ``(weight.numel() // len(u),)``.
        n_power_iterations: steps of the power method, at least 1. With ``tol`` at most so many.
        eps: smallest divisor of a vector, not negative. A value below 2⁻¹²⁶, the smallest normal number
            of float32, acts as 2⁻¹²⁶: a zero weight stays finite with ``eps=0``, too.
        dims: the dimension that gives a weight's rows: default 0 (1 for ``ConvTranspose`` weights).
        order: ``"u_first"`` gives the numbers of ``torch.nn.utils.parametrizations.spectral_norm``,
            ``"v_first"`` those of ``torch.nn.utils.spectral_norm``.
        tol: stop after the first step whose residual is at most ``tol`` times σ; decided on the
            device. 0 makes all steps. ``us`` and ``vs`` must be unit vectors for this.
        scale: ``c`` of ``c·W/σ``.
        bound: ``c`` of ``W / max(1, σ/c)``: a weight whose σ is at most ``c`` is left alone. Instead
            of ``scale``.
        detach_sigma: let σ count as a constant in the gradients of the weights: ``c·G/σ``.
        blocks: treat so many equal parts of a weight's first dimension as weights of their own. Their
            vectors stand one after the other in ``u`` and ``v``; σ is that of the largest.
        gain: for each weight γ of ``γ·W/σ``, or None: a tensor of shape ``()`` or ``(rows,)``, which
            is differentiated too. Not beside ``scale`` or ``bound`` (Zhai et al., "Stabilizing
            Transformer Training by Preventing Attention Entropy Collapse", ICML 2023: σReparam).
        update: False keeps ``us`` and ``vs``, as stock does in evaluation. If they are not unit
            vectors, they count as if they were divided by their norms.
        convergence: **written in place** if given, of shape ``(2, len(weights))`` and floating point:
            the residuals ``‖Mᵀu − ‖Mv‖·v‖ / σ`` of the last steps (NaN where there is no ``tol``; see
            :func:`spectral_ext.reference.power_iteration`), and the numbers of steps.
        dtype: ``torch.bfloat16`` or ``torch.float16``: write the normalized weights of float32 weights so,
            as ``torch.autocast`` would cast them. σ, ``u``, ``v`` and the gradients of the weights stay
            float32; ⟨G, Y⟩ in them is taken with the rounded Y.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None reads the
            environment variable ``SPECTRAL_EXT_BACKEND`` and defaults to ``"auto"``.

    Returns:
        The normalized weights, with the shapes, strides and (but for ``dtype``) dtypes of ``weights``, and
        one 1-D tensor with every σ of the weights: float64 if a weight is, else float32. Both are
        differentiable; ``u`` and ``v`` count as constants, as in Miyato et al. (2018), equation (11).

        A 1-D weight under ``u_first`` is divided by its norm as in stock; its ``u`` and ``v`` are not
        looked at and may be None. A weight whose σ is exactly 0 is passed through, where stock
        gives NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing was written.
        RuntimeError: the backend cannot run, or memory of ``us`` and ``vs`` overlaps.
    """
    us, vs, settings = _checked(
        weights,
        us,
        vs,
        n_power_iterations,
        eps,
        dims,
        order,
        tol,
        scale,
        bound,
        detach_sigma,
        blocks,
    )
    if gain is not None:
        check_lists(weights, gain=gain)
        for i, (weight, factor) in enumerate(zip(weights, gain, strict=True)):
            check_gain(f"weights[{i}]", factor, weight, settings.dims[i])
            if factor is not None and (settings.scales[i] != 1 or settings.soft[i]):
                raise ValueError(f"weights[{i}]: gain and scale or bound exclude each other")
    check_bool("spectral_normalize", "update", update)
    if convergence is not None:
        check_convergence(convergence, len(weights))
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be torch.bfloat16, torch.float16 or None, got {dtype!r}")
    results = normalize_layers(list(weights), us, vs, settings, update, backend, None, dtype)
    if convergence is not None:
        convergence.copy_(convergence_of(results, settings, update))
    if gain is not None:
        results.normalized = [
            with_gain(weight, factor, dim)
            for weight, factor, dim in zip(results.normalized, gain, settings.dims, strict=True)
        ]
    return results.normalized, results.sigmas


def convergence_of(results: Results, settings: Settings, update: bool) -> Tensor:
    """Return how far the iterations of a call went: residuals, and numbers of steps."""
    if len(results.convergence):
        return results.convergence.view(2, -1)
    steps = [float(n) if update else 0.0 for n in settings.n_power_iterations]
    sigmas = results.sigmas.detach()
    return torch.stack([torch.full_like(sigmas, math.nan), sigmas.new_tensor(steps)])


@torch.no_grad()
def project_(
    weights: Sequence[Tensor],
    us: Sequence[Tensor | None],
    vs: Sequence[Tensor | None],
    *,
    n_power_iterations: int | Sequence[int] = 1,
    eps: float | Sequence[float] = 1e-12,
    dims: int | Sequence[int] | None = None,
    order: Order | Sequence[Order] = "u_first",
    tol: float | Sequence[float] = 0.0,
    scale: float | Sequence[float] = 1.0,
    bound: float | Sequence[float | None] | None = None,
    blocks: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor:
    """Normalize weights in place: ``W ← c·W/σ``, or ``W ← W / max(1, σ/c)``, all in one native call.

    A weight on a CPU that keeps its bits keeps its version (``Tensor._version``), too.

    Not differentiable; weights that require a gradient are written as an optimizer writes them.

    Args:
        weights: **written in place**; as in :func:`spectral_normalize`.
        us, vs, n_power_iterations, eps, dims, order, tol, scale, bound, blocks, backend: as there.

    Returns:
        Every σ before the projection, a 1-D tensor.

    Raises:
        TypeError, ValueError, RuntimeError: as there; also where elements of a weight share memory.
    """
    us, vs, settings = _checked(
        weights, us, vs, n_power_iterations, eps, dims, order, tol, scale, bound, False, blocks
    )
    for i, weight in enumerate(weights):
        if any(
            size > 1 and step == 0 for size, step in zip(weight.shape, weight.stride(), strict=True)
        ):
            raise ValueError(f"weights[{i}]: elements share memory, and cannot be written in place")
    # In place is what a native call does with dense weights; of the others the results are copied.
    dense = torch.ops.aten.is_non_overlapping_and_dense
    kinds = [
        None if u is None or weight.is_complex() or n > 1 or not dense(weight) else kind_of(weight)
        for weight, u, n in zip(weights, us, settings.blocks, strict=True)
    ]
    chosen = {kind: select(backend, kind[0]) for kind in dict.fromkeys(kinds) if kind is not None}
    sigmas: list[Any] = [None] * len(weights)
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        part, columns = [weights[i] for i in members], settings.select(members)
        vectors: tuple[list[Any], list[Any]] = ([us[i] for i in members], [vs[i] for i in members])
        if kind is None:
            results = normalize_layers(part, *vectors, columns, True, backend)
            found = results.sigmas
            is_changed = _changed(found, columns)
            for weight, normalized, changed in zip(
                part, results.normalized, is_changed, strict=True
            ):
                if changed:
                    weight.copy_(normalized)
        else:
            saved, found = allocate_vectors(part, columns.dims)
            unwanted = saved.new_empty(0)
            outputs = [w.data for w in part]  # their versions are not those of the weights
            chosen[kind].forward_(
                part, *vectors, outputs, saved, found, unwanted, *columns.of_forward(True)
            )
            written = [
                w for w, changed in zip(part, _changed(found, columns), strict=True) if changed
            ]
            torch.autograd.graph.increment_version([w for w in written if not w.is_inference()])
        for place, i in enumerate(members):
            sigmas[i] = found[place]
    return join(sigmas)


def _changed(sigmas: Tensor, settings: Settings) -> list[bool]:
    """Return which weights a projection has changed; all of them where reading σ would wait."""
    if sigmas.device.type != "cpu" or type(sigmas) is not Tensor or is_compiling():
        return [True] * len(settings.soft)
    rows = zip(sigmas.tolist(), settings.soft, settings.scales, strict=True)
    return [not (soft and sigma <= bound) for sigma, soft, bound in rows]


def _checked(
    weights: Sequence[Tensor],
    us: Sequence[Tensor | None],
    vs: Sequence[Tensor | None],
    n_power_iterations: Any,
    eps: Any,
    dims: Any,
    order: Any,
    tol: Any,
    scale: Any,
    bound: Any,
    detach_sigma: Any,
    blocks: Any,
) -> tuple[list[Tensor | None], list[Tensor | None], Settings]:
    """Check the arguments of a list call, spread the settings, and leave out vectors of 1-D weights."""
    count = len(weights) if isinstance(weights, (list, tuple)) else 0

    def spread(value: Any) -> list[Any]:
        return list(value) if isinstance(value, (list, tuple)) else [value] * count

    columns = {
        "dims": spread(0 if dims is None else dims),
        "n_power_iterations": spread(n_power_iterations),
        "eps": spread(eps),
        "order": spread(order),
        "tol": spread(tol),
        "scale": spread(scale),
        "bound": spread(bound),
        "detach_sigma": spread(detach_sigma),
        "blocks": spread(blocks),
    }
    check_lists(weights, us=us, vs=vs, **columns)
    us, vs, rows = list(us), list(vs), []
    for i, (weight, values) in enumerate(
        zip(weights, zip(*columns.values(), strict=True), strict=True)
    ):
        name = f"weights[{i}]"
        layer = LayerSettings(*values)
        layer.check(name)
        refuse_sharded(name, weight)
        layer = layer._replace(dim=check_weight(name, weight, layer.dim))
        rows.append(layer)
        if weight.ndim == 1 and layer.order == "u_first" and layer.blocks == 1:
            us[i] = vs[i] = None
        else:
            check_layer(name, weight, us[i], vs[i], layer.dim, layer.blocks)
    check_overlap(us, vs)
    return us, vs, Settings.of(rows)
