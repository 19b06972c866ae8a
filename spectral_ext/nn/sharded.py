"""Spectral norms of weights whose shards lie on several ranks (FSDP2), without gathering them.

On entry of a model that is fused as a whole, the weights of its FSDP units are ``DTensor`` objects: rank
``k`` has some rows or columns ``M_k`` of the matrix ``M``. ``u`` and ``v`` are small, and whole on every
rank. A step of the power method multiplies a vector ``x`` by ``A`` and the result by ``Aᵀ``, where
``A = M, x = v`` for ``u_first`` and ``A = Mᵀ, x = u`` for ``v_first``:

- The ranks have **rows of A** (``u_first`` and rows of ``M``, as FSDP shards by default; or ``v_first`` and
  columns): ``t_k = A_k x`` is a part of ``t = Ax``, and ``s = Aᵀt = Σ A_kᵀ t_k``. One all-reduce sums
  ``[s, t_k among zeros]``; then ``t/d1`` and ``s/d1`` are those of the step, ``d1 = max(‖t‖, eps)``.
- The ranks have **columns of A**: ``t = Σ A_k x_k`` takes one all-reduce, the parts ``A_kᵀ t/d1`` of ``s/d1``
  another.

All layers of a group go through the same all-reduces, of ``h + w + 1`` numbers for a weight of ``h·w``.
Where σ is 0, the ranks must agree whether the weight is zero: the first all-reduce carries one more
number, which tells whether ``A`` times the vector to restart from is 0. Both products take
one read of the shard.

σ without an update is ``Σ uᵀM_k v``, one all-reduce of one number a layer. Every rank gets the same bits of
the sums, and so the same ``u``, ``v`` and σ.

What is cut in another way (along two dimensions of a mesh), blocks and complex weights are gathered, layer
by layer. The normalized weight is made when the layer asks for it, from the weight that it has then: whole
inside of its FSDP unit, or itself a ``DTensor``.
"""

import copy
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .. import backends
from ..autograd import Computation, attach
from ..layout import compute_dtype, matrix_shape, output_dtype, without_autocast
from ..normalization import Results, normalize_layers
from ..reference import divisor, missed_by, norm_of, restarted, settled, unit_vectors
from ..settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ShardedResults", "ShardedUnit", "is_sharded", "local_part", "normalize_sharded"]


def is_sharded(weight: Tensor) -> bool:
    """Return whether a weight is a ``DTensor``; without the import of these, which takes a second."""
    if type(weight) in (Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def local_part(weight: Tensor) -> Tensor:
    """Return what this rank has of a weight: its shard, or all of it."""
    local: Tensor = weight.to_local() if is_sharded(weight) else weight  # type: ignore[attr-defined]
    return local


class ShardedUnit:
    """σ, ``u`` and ``v`` of a weight that was sharded; makes the normalized weight in the graph.

    Args:
        shape: of the whole weight.
        sigma: of shape ``(1,)``.
        u, v: the vectors that σ was taken with; None for a 1-D weight without any.
        settings: of this layer.
        backend, dtype: see :func:`spectral_ext.functional.spectral_normalize`.
    """

    def __init__(
        self,
        shape: torch.Size,
        sigma: Tensor,
        u: Any,
        v: Any,
        settings: Settings,
        backend: str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.shape = shape
        self._sigma, self._u, self._v = sigma, u, v
        self._settings, self._backend, self._dtype = settings, backend, dtype
        self._last: TensorWeakRef | None = None

    def of_a_forward(self) -> "ShardedUnit":
        """Return a copy whose normalized weight is in no graph yet."""
        unit = copy.copy(self)
        unit._last = None
        return unit

    def normalized(self, weight: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``finish(W/σ)``, the same tensor for as long as someone holds it.

        Args:
            weight: the whole weight, as it is while its FSDP unit is gathered, or a ``DTensor``.
            finish: applies what comes after the division.
        """
        wants_grad = torch.is_grad_enabled() and weight.requires_grad
        found = None if self._last is None else self._last()
        is_alike = found is not None and is_sharded(found) == is_sharded(weight)
        if found is not None and is_alike and (found.requires_grad or not wants_grad):
            return found
        found = finish(self._divided(weight, wants_grad))
        # Not kept alive: FSDP frees a unit's weights after its forward, to have memory for the next.
        self._last = TensorWeakRef(found)
        return found

    def _divided(self, weight: Tensor, wants_grad: bool) -> Tensor:
        dtype, how = output_dtype(weight, self._dtype), (self._settings, self._backend)
        if is_sharded(weight):
            return _divide_distributed(weight, self._sigma[0], self._u, self._v, *how).to(dtype)
        if _is_gathered(weight, self._u, self._settings):
            return _normalize_again(weight, self._u, self._v, *how).to(dtype)
        with torch.no_grad():
            by = divisor(self._sigma[0], self._settings.scales[0], self._settings.soft[0])
            output = (weight.to(self._sigma.dtype) / by).to(dtype)
        if not wants_grad:
            return output
        backend = backends.select(self._backend, weight.device)
        saved = torch.cat([self._u, self._v])
        computation = Computation(backend, self._settings, [output], saved, self._sigma)
        return attach([weight], computation)[0][0]


@dataclass(slots=True)
class ShardedResults(Results):
    """Results whose weights are not there yet: ``normalized`` has None for each."""

    units: list[ShardedUnit] = field(default_factory=list)


@torch.no_grad()
def normalize_sharded(
    weights: Sequence[Tensor],
    us: Sequence[Any],
    vs: Sequence[Any],
    settings: Settings,
    update: bool,
    backend: str | None,
    dtype: torch.dtype | None = None,
) -> ShardedResults:
    """Find σ of distributed weights; all ranks of their process groups must call it.

    Args:
        weights: of type ``DTensor``.
        us, vs: whole on every rank, with the same values; **written in place** when ``update``.
        settings, update, backend, dtype: as in :func:`spectral_ext.normalization.normalize_layers`.
    """
    count = len(weights)
    settings = settings.with_least_eps(weights)
    found: list[Any] = [None] * count
    cuts: list[_Cut] = []
    places: list[int] = []
    with without_autocast(weights[0].device):
        for i, weight in enumerate(weights):
            one = settings.select([i])
            gathered = _is_gathered(weight, us[i], one)
            cut = None if gathered else _cut_of(weight, us[i], vs[i], one)
            if cut is None:
                found[i] = _gathered(weight, us[i], vs[i], one, update, backend)
            else:
                cuts.append(cut)
                places.append(i)
        (_iterate if update else _evaluate)(cuts)
    for i, cut in zip(places, cuts, strict=True):
        u, v = (cut.start, cut.first) if cut.v_first else (cut.first, cut.start)
        if update:
            us[i].copy_(u)
            vs[i].copy_(v)
        found[i] = (cut.sigma, u, v, cut.residual, cut.iterations)
    sigmas = torch.stack([values[0] for values in found])
    convergence = sigmas.new_empty(0)
    if any(settings.tols):
        columns = [values[3] for values in found] + [values[4] for values in found]
        convergence = torch.stack(columns).to(sigmas)
    units = [
        ShardedUnit(weight.shape, sigma[None], u, v, settings.select([i]), backend, dtype)
        for i, (weight, (sigma, u, v, *_)) in enumerate(zip(weights, found, strict=True))
    ]
    saved: list[tuple[Tensor, Sequence[int]]] = [
        (torch.cat(values[1:3]), [i]) for i, values in enumerate(found) if values[1] is not None
    ]
    nothing: list[Any] = [None] * count
    return ShardedResults(nothing, sigmas, [], convergence, saved, units)


class _Cut:
    """What this rank has of a weight, and where its power iteration stands.

    Args:
        group: the ranks that have the other shards.
        matrix: rows or columns of ``A``.
        index: which of them.
        has_rows: whether they are rows.
        first: ``u`` (``v`` for ``v_first``), of which ``A`` has rows.
        start: the other vector, which a step begins with.
        settings: of this layer.
    """

    __slots__ = (
        "_done",
        "_eps",
        "_other",
        "_tol",
        "first",
        "group",
        "has_rows",
        "index",
        "iterations",
        "matrix",
        "n_power_iterations",
        "residual",
        "sigma",
        "start",
        "touched",
        "v_first",
    )

    def __init__(
        self,
        group: "ProcessGroup",
        matrix: Tensor,
        index: Any,
        has_rows: bool,
        first: Tensor,
        start: Tensor,
        settings: Settings,
    ) -> None:
        self.group, self.matrix = group, matrix
        self.index, self.has_rows = index, has_rows
        self.first, self.start = first, start
        self.n_power_iterations = settings.n_power_iterations[0]
        self.v_first = settings.v_first[0]
        self._eps, self._tol = settings.eps[0], settings.tols[0]
        self.sigma = first.new_zeros(())
        self.residual = first.new_full((), torch.nan)
        self.iterations = first.new_zeros(())
        self._other = restarted(start)
        self.touched = torch.zeros_like(self.sigma)
        self._done = torch.zeros_like(self.sigma, dtype=torch.bool)

    def first_products(self) -> Tensor:
        """Return this rank's part of ``[s, t]`` if it has rows of ``A``, else ``t``; then ``touched``."""
        starts = torch.stack([self.start, self._other], dim=1)
        if not self.has_rows:
            starts = starts[self.index]
        part, other = (self.matrix @ starts).unbind(1)
        touched = (other != 0).any()[None].to(part)
        if not self.has_rows:
            return torch.cat([part, touched])
        return torch.cat([self.matrix.mT @ part, self._among_zeros(part, self.first), touched])

    def take_first(self, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``t/d1``, ``s/d1`` and ``‖t‖``; without rows of ``A`` this rank's part of ``s/d1``."""
        size = len(self.first)
        s, t, touched = total.split([len(total) - size - 1, size, 1])
        self.touched = self.touched + touched[0]
        norm = norm_of(t)
        d1 = norm.clamp_min(self._eps)
        t = t / d1
        s = s / d1 if self.has_rows else self._among_zeros(self.matrix.mT @ t, self.start)
        return t, s, norm

    def finish(self, t: Tensor, s: Tensor, before: Tensor) -> None:
        """End a step with ``t/d1``, ``s/d1`` and ``‖t‖``, by the rules of the reference."""
        n = norm_of(s)
        d2 = n.clamp_min(self._eps)
        done = self._done
        self.first = torch.where(done, self.first, t)
        self.start = torch.where(done, self.start, s / d2)
        self.sigma = torch.where(done, self.sigma, n * (n / d2))
        self.iterations = self.iterations + ~done
        if self._tol > 0:
            missed = missed_by(before, n)
            self.residual = torch.where(done, self.residual, missed)
            self._done = done | (missed <= self._tol)

    def partial_sigma(self) -> Tensor:
        """Return this rank's part of ``σ = uᵀMv``."""
        if self.has_rows:
            sigma = torch.dot(self.first[self.index], self.matrix @ self.start)
        else:
            sigma = torch.dot(self.first, self.matrix @ self.start[self.index])
        return sigma[None]

    def _among_zeros(self, part: Tensor, whole: Tensor) -> Tensor:
        padded = torch.zeros_like(whole)
        padded[self.index] = part
        return padded


def _iterate(cuts: Sequence[_Cut]) -> None:
    """Make the steps of all layers together."""
    before = [(cut.first, cut.start) for cut in cuts]
    for step in range(max((cut.n_power_iterations for cut in cuts), default=0)):
        active = [cut for cut in cuts if cut.n_power_iterations > step]
        totals = _all_reduce([(cut, cut.first_products()) for cut in active])
        steps = [cut.take_first(total) for cut, total in zip(active, totals, strict=True)]
        with_columns = [i for i, cut in enumerate(active) if not cut.has_rows]
        seconds = _all_reduce([(active[i], steps[i][1]) for i in with_columns])
        for i, second in zip(with_columns, seconds, strict=True):
            steps[i] = (steps[i][0], second, steps[i][2])
        for cut, values in zip(active, steps, strict=True):
            cut.finish(*values)
    for cut, old in zip(cuts, before, strict=True):
        found = (cut.first, cut.start)
        cut.first, cut.start = settled(cut.sigma, cut.touched == 0, old, found)


def _evaluate(cuts: Sequence[_Cut]) -> None:
    """Find σ of all layers with the vectors that they have."""
    for cut in cuts:
        cut.first, cut.start = unit_vectors(cut.first, cut.start, cut.first.dtype)
    sigmas = _all_reduce([(cut, cut.partial_sigma()) for cut in cuts])
    for cut, sigma in zip(cuts, sigmas, strict=True):
        cut.sigma = sigma[0]


def _all_reduce(parts: Sequence[tuple[_Cut, Tensor]]) -> list[Tensor]:
    """Sum 1-D tensors over the ranks, in one call for each process group and dtype."""
    totals: list[Any] = [None] * len(parts)
    calls: dict[Hashable, list[int]] = {}
    for i, (cut, part) in enumerate(parts):
        calls.setdefault((cut.group, part.dtype, part.device), []).append(i)
    for members in calls.values():
        flat = torch.cat([parts[i][1] for i in members])
        torch.distributed.all_reduce(flat, group=parts[members[0]][0].group)
        pieces = flat.split([len(parts[i][1]) for i in members])
        for i, piece in zip(members, pieces, strict=True):
            totals[i] = piece
    return totals


def _cut_of(weight: Any, u: Tensor, v: Tensor, settings: Settings) -> _Cut | None:
    """Return this rank's part of a weight; None if it is not cut along one dimension of its mesh."""
    from torch.distributed.tensor import Shard

    cuts = [(d, p) for d, p in enumerate(weight.placements) if not p.is_replicate()]
    if len(cuts) != 1 or type(cuts[0][1]) is not Shard:
        return None
    (mesh_dim, placement), dim = cuts[0], settings.dims[0]
    local = weight.to_local()
    # As torch.chunk cuts: all parts of one size, but for the last ones.
    axis, whole = placement.dim % weight.ndim, weight.shape[placement.dim]
    size = -(-whole // weight.device_mesh.size(mesh_dim))
    begin = min(size * weight.device_mesh.get_local_rank(mesh_dim), whole)
    length = min(size, whole - begin)
    if local.shape[axis] != length:
        return None
    index: Any = slice(begin, begin + length)
    rows, columns = matrix_shape(weight, dim)
    if axis == dim:
        rows = length
    else:
        rest = [n for d, n in enumerate(weight.shape) if d != dim]
        numbers = torch.arange(columns, device=local.device).view(rest)
        index = numbers.narrow(axis - (axis > dim), begin, length).reshape(-1)
        columns = len(index)
    dtype = compute_dtype(weight.dtype)
    matrix = local.movedim(dim, 0).reshape(rows, columns).to(dtype)
    v_first = settings.v_first[0]
    first, start = (v, u) if v_first else (u, v)
    return _Cut(
        weight.device_mesh.get_group(mesh_dim),
        matrix.mT if v_first else matrix,
        index,
        (axis == dim) is not v_first,
        first.to(dtype),
        start.to(dtype),
        settings,
    )


def _is_gathered(weight: Tensor, u: Any, settings: Settings) -> bool:
    """Return whether a weight is one of those that are only ever computed as a whole."""
    return u is None or weight.is_complex() or settings.blocks[0] > 1


def _normalize_again(
    weight: Tensor, u: Any, v: Any, settings: Settings, backend: str | None
) -> Tensor:
    """Normalize a whole weight with vectors that were found before, in the graph."""
    return normalize_layers([weight], [u], [v], settings, False, backend).normalized[0]


def _gathered(
    weight: Any, u: Any, v: Any, settings: Settings, update: bool, backend: str | None
) -> tuple[Any, ...]:
    """Return σ, ``u``, ``v``, residual and steps of a weight that is gathered for it."""
    results = normalize_layers([weight.full_tensor()], [u], [v], settings, update, backend)
    residual = results.sigmas.new_full((), torch.nan)
    iterations = residual.new_full((), settings.n_power_iterations[0] if update else 0)
    if len(results.convergence):
        residual, iterations = results.convergence
    if u is not None:  # of this forward: the next one writes into those of the layer
        u, v = u.clone(), v.clone()
    return results.sigmas[0], u, v, residual, iterations


def _divide_distributed(
    weight: Any, value: Tensor, u: Any, v: Any, settings: Settings, backend: str | None
) -> Tensor:
    """Return ``W/σ`` of a ``DTensor``, in the graph and distributed as it is.

    ``σ = ⟨W, uvᵀ⟩``: ``DTensor`` knows how to sum it, and its gradient, over the ranks. Its value is
    ``value``: ``u`` and ``v`` that have restarted are not those that σ was taken with.
    """
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh, everywhere = weight.device_mesh, [Replicate()] * weight.device_mesh.ndim
    if _is_gathered(weight, u, settings):
        whole = _normalize_again(weight.full_tensor(), u, v, settings, backend)
        return DTensor.from_local(whole, mesh, everywhere).redistribute(mesh, weight.placements)
    dim = settings.dims[0]
    others = [size for d, size in enumerate(weight.shape) if d != dim]
    rank_one = torch.outer(u, v).reshape(weight.shape[dim], *others).movedim(0, dim).contiguous()
    # Every rank has all of it: nothing is sent.
    direction = distribute_tensor(rank_one, mesh, weight.placements, src_data_rank=None)
    wide = weight.to(rank_one.dtype)
    sigma = (wide * direction).sum().redistribute(mesh, everywhere)
    found = DTensor.from_local(value.to(sigma.dtype), mesh, everywhere)
    sigma = found + (sigma - sigma.detach())
    if settings.detach_sigma[0]:
        sigma = sigma.detach()
    # A number on every rank, whose gradient is still to be summed over them.
    by = divisor(sigma, settings.scales[0], settings.soft[0])
    return (wide / by).to(weight.dtype)
