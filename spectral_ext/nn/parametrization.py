"""Spectral normalization of one tensor of a module, as a drop-in for stock's parametrization."""

import contextlib
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as StockSpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook
from typing_extensions import Self

from .. import backends
from ..layout import compute_dtype, matrix_shape
from ..normalization import Results, is_traced, normalize_layers, with_gain
from ..reference import Order, is_usable, start_vector, unit_vector, weight_matrix
from ..settings import LayerSettings, Settings
from ..validation import check_gain, check_layer, check_weight
from .active import Record, Visible, active, hidden_saves, is_plain, lookup, serving
from .history import NO_REGIONS, Entry, open_regions
from .sharded import is_sharded, local_part, normalize_sharded

__all__ = [
    "GAINS",
    "INITS",
    "IN_GROUP",
    "SETTINGS_OF_HOOK",
    "Gain",
    "Init",
    "LastWeight",
    "Origin",
    "Owner",
    "SpectralNorm",
    "StockHook",
    "StockSpectralNorm",
    "check_backend",
    "checked_weight",
    "default_dim",
    "stock_hook",
]

Origin = Literal["own", "parametrization", "hook"]
Gain = Literal["sigma", "one", "sigma_per_channel", "one_per_channel"]
"""A learned factor, of the layer or of each output channel, and whether it starts at σ or at one."""
Init = Literal["randn", "svd"]
"""How ``u`` and ``v`` start: random with 15 iterations, or as exact singular vectors."""
GAINS, INITS = get_args(Gain), get_args(Init)

# The attributes of a layer that is in a group.
IN_GROUP = ("_group", "_visible", "_place")
_NOT_COPIED = (*IN_GROUP, "_last_weight", "_start_from")
# The settings that PyTorch's hook has too.
SETTINGS_OF_HOOK = ("n_power_iterations", "dim", "eps")
_SETTINGS = {*LayerSettings._fields, "backend"}


class LastWeight:
    """The weight of the last call of a module that came with PyTorch's hook."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


class Owner(Protocol):
    """What a layer asks of the group that it is in, or tells it."""

    @property
    def root(self) -> Module | None:
        """The model that the group belongs to."""

    @property
    def registered(self) -> Sequence[Any]:
        """The layers that are still registered."""

    def changed(self, parametrization: "SpectralNorm") -> None:
        """Take a setting that was assigned."""

    def count_lone(self) -> None:
        """Note that a layer was computed alone in training."""

    def forget_calls(self) -> None:
        """Hold no tensor in C++."""

    def is_first_with_vectors_of(self, parametrization: "SpectralNorm") -> bool:
        """Return whether no layer before this one has the same vectors."""

    def release(self, parametrizations: "Iterable[SpectralNorm]") -> None:
        """Give layers away."""

    def trial_ended(self, parametrization: "SpectralNorm") -> None:
        """Know that a layer has taken over the vectors of its forward."""


class SpectralNorm(StockSpectralNorm):
    """The parametrization ``W -> W / σ(W)``, computed by ``spectral_ext``.

    It has the initialisation, the buffers ``_u`` and ``_v`` and the ``right_inverse`` of stock's
    ``torch.nn.utils.parametrizations._SpectralNorm``, which it is an instance of. In training every
    call advances ``_u`` and ``_v`` in place, also without gradients. Inside the forward of a fused
    model (:func:`spectral_ext.fuse`) a call returns what the group has computed.

    Of a half precision weight ``_u`` and ``_v`` are float32, in which they do not drift; vectors of
    the weight's own dtype, from a checkpoint, are taken too.

    Args:
        weight: the tensor to normalize; it gives the sizes of ``_u`` and ``_v``.
        n_power_iterations, dim, eps: as in stock.
        order: ``"u_first"`` starts as stock's parametrization does, with 15 iterations, and leaves
            a 1-D weight to its norm. ``"v_first"`` starts as stock's hook does, from random
            vectors, and takes a 1-D weight as a matrix of one column.
        tol, scale, bound, detach_sigma, blocks: see
            :func:`spectral_ext.functional.spectral_normalize`.
        gain, init: see :func:`spectral_ext.spectral_norm`.
        backend: see :func:`spectral_ext.functional.spectral_normalize`.
        label: how messages call the layer.
    """

    order: Order = "u_first"
    tol: float = 0.0
    scale: float = 1.0
    bound: float | None = None
    detach_sigma: bool = False
    blocks: int = 1
    backend: str | None = None
    label: str = "SpectralNorm"
    # What unfuse makes of the layer again.
    origin: Origin = "own"
    # Where a hook's tensors stood in its module: for each, the names behind it.
    hook_places: dict[str, tuple[str, ...]]
    # What compiled code sees of the group, and the place of this layer in its lists.
    _visible: Visible | None = None
    _place: int = -1
    _group: "weakref.ref[Owner] | None" = None
    # Of a layer that came with PyTorch's hook: the hook (hook.py), and what it has kept.
    _hook: Any = None
    _last_weight: LastWeight | None = None
    # While a checkpoint is loaded that has a weight and no vectors: where the weight is.
    _start_from: ParametrizationList | None = None

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        *,
        order: Order = "u_first",
        tol: float = 0.0,
        scale: float = 1.0,
        bound: float | None = None,
        detach_sigma: bool = False,
        blocks: int = 1,
        gain: Gain | None = None,
        init: Init = "randn",
        backend: str | None = None,
        label: str = "SpectralNorm",
    ) -> None:
        weight = weight.detach().to(compute_dtype(weight.dtype))
        is_vector = weight.ndim == 1 and order == "u_first" and blocks == 1
        if order == "u_first" and blocks == 1:
            super().__init__(weight, n_power_iterations, dim, eps)
        else:
            Module.__init__(self)
        self.n_power_iterations, self.dim, self.eps = n_power_iterations, dim % weight.ndim, eps
        self.order = order
        self.tol, self.scale, self.bound = tol, scale, bound
        self.detach_sigma, self.blocks = detach_sigma, blocks
        self.backend = backend
        self.label = label
        if "_u" not in self._buffers and not is_vector:
            self._register_random_vectors(weight)
            if order == "u_first":
                self.warm_start(weight)
        self.mend_vectors(weight)  # the iterations of PyTorch leave zeros of a weight below eps
        if init == "svd" and not is_vector:
            self._use_singular_vectors(weight)
        if gain is not None:
            self.register_parameter("gain", torch.nn.Parameter(self._first_gain(weight, gain)))

    def _register_random_vectors(self, weight: Tensor) -> None:
        with torch.no_grad():
            sizes = matrix_shape(weight[: len(weight) // self.blocks], self.dim)
            for name, size in zip(("_u", "_v"), sizes, strict=True):
                parts = [
                    F.normalize(weight.new_empty(size).normal_(0, 1), dim=0, eps=self.eps)
                    for _ in range(self.blocks)
                ]
                self.register_buffer(name, torch.cat(parts))

    @torch.no_grad()
    def _use_singular_vectors(self, weight: Tensor) -> None:
        """Put the exact singular vectors into the buffers."""
        us, vs = [], []
        for block in weight.chunk(self.blocks):
            left, _, right = torch.linalg.svd(weight_matrix(block, self.dim), full_matrices=False)
            us.append(left[:, 0])
            vs.append(right[0].conj())
        self._u.copy_(torch.cat(us))
        self._v.copy_(torch.cat(vs))

    @torch.no_grad()
    def warm_start(self, weight: Tensor, n_power_iterations: int = 15) -> None:
        """Advance ``_u`` and ``_v`` by the given number of iterations, as after a large change of the weight.

        They are unit vectors afterwards, whatever they were before.
        """
        if not self.is_vector:
            settings = self.settings._replace(n_power_iterations=n_power_iterations, tol=0.0)
            vectors = ([self._buffers["_u"]], [self._buffers["_v"]])
            normalize = normalize_sharded if is_sharded(weight) else normalize_layers
            self.make_unit_vectors()
            normalize([weight], *vectors, Settings.of([settings]), True, "reference")
            self.make_unit_vectors()  # eps makes vectors of very small weights shorter

    @torch.no_grad()
    def mend_vectors(self, weight: Tensor | None) -> None:
        """Find ``_u`` and ``_v`` again where one of them is zero or not finite.

        Good vectors keep their bits. Looks at values, for which the host waits.

        Args:
            weight: to iterate with; None makes unit vectors alone.
        """
        parts = self._vector_parts()
        if not all(_has_values(part) for part in parts):
            return
        if all(is_usable(part) for part in parts):
            return
        if weight is None or not _has_values(local_part(weight)):
            self.make_unit_vectors()
        else:
            self.warm_start(weight)

    @torch.no_grad()
    def finds_sigma(self, weight: Tensor) -> bool:
        """Return whether the weight is zero, or a product of it with ``u`` or ``v`` is not."""
        weight = weight.full_tensor() if is_sharded(weight) else weight  # type: ignore[attr-defined]
        if self.is_vector or not weight.any():
            return True
        matrices = [weight_matrix(part, self.dim) for part in weight.chunk(self.blocks)]
        vectors = [self._buffers[name].to(weight.dtype).chunk(self.blocks) for name in ("_u", "_v")]  # type: ignore[union-attr]
        return all(
            bool((m.mH @ u).any() & (m @ v).any())
            for m, u, v in zip(matrices, *vectors, strict=True)
        )

    def _vector_parts(self) -> list[Tensor]:
        """Return ``_u`` and ``_v``, each in its blocks."""
        vectors = [self._buffers.get(name) for name in ("_u", "_v")]
        return [part for x in vectors if x is not None for part in x.chunk(self.blocks)]

    @torch.no_grad()
    def make_unit_vectors(self) -> None:
        """Divide ``_u`` and ``_v`` by their norms if these are off, and restart those of no use."""
        for part in self._vector_parts():
            part.copy_(unit_vector(part))

    @torch.no_grad()
    def _first_gain(self, weight: Tensor, gain: Gain) -> Tensor:
        rows = (weight.shape[self.dim],) if gain.endswith("per_channel") else ()
        if gain.startswith("one"):
            return weight.new_ones(rows)
        vectors = [self._buffers.get(name) for name in ("_u", "_v")]
        copies = [None if vector is None else vector.clone() for vector in vectors]
        settings = Settings.of([self.settings._replace(n_power_iterations=15)])
        us, vs = ([vector] for vector in copies)
        sigmas = normalize_layers([weight], us, vs, settings, True, "reference").sigmas
        return weight.new_empty(rows).copy_(sigmas[0])

    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalized weight.

        Raises:
            TypeError, ValueError: the weight, ``_u`` or ``_v`` were exchanged for something that
                does not fit. ``_u`` and ``_v`` are as they were.
        """
        if is_dynamo_compiling():
            visible = self._visible_weight(weight)
            return self._normalize(weight) if visible is None else visible
        record, in_force = active.record, self._weight_in_force(weight)
        if is_plain(None if in_force is None else record, self.training):
            return self._normalize(weight) if in_force is None else in_force
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            return self._in_checkpoint(weight, in_force)
        with hidden_saves():  # forward and recomputation must save as many tensors
            return self._in_checkpoint(weight, in_force)

    def _in_checkpoint(self, weight: Tensor, in_force: Tensor | None) -> Tensor:
        """Return the weight that a checkpoint reads, and note its vectors for the recomputation."""
        regions = open_regions()
        if regions is NO_REGIONS:
            return self._normalize(weight) if in_force is None else in_force
        record = None if in_force is None else serving(active.record, id(self), weight)
        known = NO_REGIONS if record is None else record.regions
        if in_force is not None and record and regions.replayed in (None, known.replayed):
            normalized, entry = in_force, record.entry
            entry = None if entry is None else entry._replace(is_in_force=True)
        else:
            known, found = NO_REGIONS, None
            if regions.replayed is not None:
                found = regions.replay(self)
            vectors = None if found is None else found.vectors_again(self)
            update = self.training and in_force is None and regions.replayed is None
            normalized, results = self._compute(weight, update, vectors)
            sizes = (0, 0) if self.is_vector else (len(self._u), len(self._v))
            entry = Entry({id(self): 0}, results.saved, [sizes])
        if entry is not None:
            regions.note(self, entry, known.recorded)
        return normalized

    def _weight_in_force(self, weight: Tensor) -> Tensor | None:
        """Return the weight in force, or None; also in code that compiled code leaves to the interpreter."""
        if is_dynamo_compiling():
            return self._visible_weight(weight)
        record = active.record
        found = None if record is None else lookup(record, id(self), weight)
        if found is None and self.record_of_compiled is not None:
            found = self._visible_weight(weight)
        return found

    @property
    def record_of_compiled(self) -> Record | None:
        """The record of the compiled forward of the root, while that runs in several pieces."""
        record = None if self._visible is None else self._visible.record
        return record if record is not None and record.of_compiled else None

    def _visible_weight(self, weight: Tensor) -> Tensor | None:
        """Return the weight in force for code that ``torch.compile`` traces."""
        record = None if self._visible is None else self._visible.record
        place = self._place
        if record is None or not 0 <= place < len(record.weights):
            return None
        if record.weights[place] is not weight:
            return None
        normalized = record.normalized[place]
        wants_grad = torch.is_grad_enabled() and weight.requires_grad
        if normalized is None or (wants_grad and not normalized.requires_grad):
            return None
        return normalized

    def _normalize(self, weight: Tensor) -> Tensor:
        """Normalize this layer alone."""
        group = None if self._group is None or is_dynamo_compiling() else self._group()
        if group is not None and self.training:
            group.count_lone()
        return self._compute(weight, self.training)[0]

    def _compute(
        self, weight: Tensor, update: bool, vectors: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Results]:
        """Normalize this layer alone, with its own vectors or with others."""
        if torch.__future__.get_swap_module_params_on_conversion():
            self.forget_calls()  # the weight may be read to be taken off its module
        u, v = vectors or (self._buffers.get("_u"), self._buffers.get("_v"))
        if is_sharded(weight):
            return self._normalize_shards(weight, u, v, update)
        try:
            results = normalize_layers(
                [weight], [u], [v], Settings.of([self.settings]), update, self.backend
            )
        except Exception:
            self.check(weight)
            raise
        return with_gain(results.normalized[0], self.learned_gain, self.dim), results

    def _normalize_shards(
        self, weight: Tensor, u: Any, v: Any, update: bool
    ) -> tuple[Tensor, Results]:
        """Normalize a distributed weight that is not in a forward; all of its ranks must do so."""
        self.check(weight)
        settings = Settings.of([self.settings])
        results = normalize_sharded([weight], [u], [v], settings, update, self.backend)
        gain, dim = self.learned_gain, self.dim
        return results.units[0].normalized(weight, lambda x: with_gain(x, gain, dim)), results

    @property
    def is_vector(self) -> bool:
        """Whether the weight is divided by its norm, without ``u`` and ``v``."""
        return "_u" not in self._buffers

    @property
    def is_bypassed(self) -> bool:
        """Whether the layer came with PyTorch's hook, and no forward of the fused model has called it yet.

        Where another module reads its weight, that is not normalized.
        """
        hook, visible = self._hook, self._visible
        return hook is not None and not hook.called and visible is not None and visible.has_run

    @property
    def learned_gain(self) -> torch.nn.Parameter | None:
        """γ of ``γ·W/σ``, the parameter ``gain``, if there is one."""
        return self._parameters.get("gain")

    @property
    def settings(self) -> LayerSettings:
        """All settings of the computation."""
        return LayerSettings(
            self.dim,
            self.n_power_iterations,
            self.eps,
            self.order,
            self.tol,
            self.scale,
            self.bound,
            self.detach_sigma,
            self.blocks,
        )

    def check(self, weight: Tensor, label: str | None = None) -> None:
        """Raise unless the weight, the vectors and the settings fit each other."""
        label = label or self.label
        self.settings.check(label)
        dim = check_weight(label, weight, self.dim)
        if weight.ndim > 1 or self.order == "v_first" or self.blocks > 1:
            u, v = self._buffers.get("_u"), self._buffers.get("_v")
            check_layer(label, weight, u, v, dim, self.blocks)
        check_gain(label, self.learned_gain, weight, dim)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in SETTINGS_OF_HOOK and self._hook is not None:
            setattr(self._hook, name, value)
        if name in _SETTINGS and self._group is not None:
            group = self._group()
            if group is not None:
                group.changed(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the group: a copied layer belongs to the copied group or to none.

        A weight that PyTorch's hook has left is copied. What a group has computed can be computed again.
        """
        state = {k: v for k, v in self.__dict__.items() if k not in _NOT_COPIED}
        if self._last_weight is not None and not self._hook.called:
            state["_last_weight"] = LastWeight(self._last_weight.weight.detach().clone())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch.compile cannot trace the import of a backend; from now on there is none.
        with contextlib.suppress(ValueError, RuntimeError):  # the first forward raises it
            for vector in self._buffers.values():
                if vector is not None:
                    check_backend(self.backend, vector)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Follow the weight to devices and dtypes, but with wide vectors not to half precision."""
        self.forget_calls()
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, vector in before.items():
            now = self._buffers[name]
            if vector is None or now is None:
                continue
            if vector.is_meta and not now.is_meta:  # to_empty
                self._buffers[name] = self._start_vector(now)
            elif vector.dtype != now.dtype:
                self._buffers[name] = vector.to(now.device, compute_dtype(now.dtype))
        return self

    def forget_calls(self) -> None:
        """Let the group hold no tensor in C++, before torch may exchange the weight."""
        group = None if self._group is None else self._group()
        if group is not None:
            group.forget_calls()

    def _start_vector(self, like: Tensor) -> Tensor:
        """Return what ``_u`` or ``_v`` starts from where it has no value."""
        wide = like.new_empty(like.shape, dtype=compute_dtype(like.dtype))
        return torch.cat([start_vector(part) for part in wide.chunk(self.blocks)])

    def convert_vectors(self, dtype: torch.dtype) -> None:
        """Keep ``_u`` and ``_v`` in another dtype from now on."""
        for name, vector in self._buffers.items():
            if vector is not None and vector.dtype != dtype:
                self._buffers[name] = vector.to(dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the vectors of a tied layer that shares them with another as tensors of their own.

        Files of safetensors keep one of several tensors that share memory, and a model in which the
        layers are not fused needs the vectors of each.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        group = None if self._group is None else self._group()
        if group is None or keep_vars or self.is_vector:
            return
        if not group.is_first_with_vectors_of(self):
            for name in ("_u", "_v"):
                destination[prefix + name] = destination[prefix + name].clone()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **keywords: Any
    ) -> None:
        """Load the vectors, or find them from the weight: a checkpoint may have the weight alone."""
        list_ = self.__dict__.pop("_start_from", None)
        super()._load_from_state_dict(state_dict, prefix, *rest, **keywords)
        weight = None if list_ is None else list_.original
        names = [name for name in ("_u", "_v") if name in self._buffers]
        missing = [f"{prefix}{name}" for name in names if f"{prefix}{name}" not in state_dict]
        if weight is None or not missing:
            self.mend_vectors(weight)
            return
        if len(missing) == len(names):  # one without the other is a damaged checkpoint
            missing_keys = keywords["missing_keys"] if "missing_keys" in keywords else rest[2]
            missing_keys[:] = [key for key in missing_keys if key not in missing]
        for name in names:
            vector = self._buffers[name]
            if vector is not None and vector.is_meta and not weight.is_meta:  # assign=True
                place = local_part(weight).device
                self._buffers[name] = self._start_vector(torch.empty_like(vector, device=place))
        self.warm_start(weight)

    def extra_repr(self) -> str:
        """Return the settings that differ from the defaults."""
        found, defaults = self.settings._asdict(), LayerSettings()._asdict()
        names = dict.fromkeys(("n_power_iterations", "eps", *found))  # in stock's order
        shown = [f"{name}={found[name]!r}" for name in names if found[name] != defaults[name]]
        gain = self.learned_gain
        if gain is not None:
            shown.append("gain per channel" if gain.ndim else "gain")
        if self.backend is not None:
            shown.append(f"backend={self.backend!r}")
        return ", ".join(shown)


def _has_values(tensor: Tensor) -> bool:
    """Return whether the numbers of a tensor can be looked at: not of stand-ins."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and not is_traced()


def stock_hook(module: Module, name: str) -> StockHook | None:
    """Return stock's spectral norm hook on a tensor of a module, if there is one."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, StockHook) and hook.name == name:
            return hook
    return None


def default_dim(module: Module) -> int:
    """Return the dimension of a module's weight that counts its outputs, as stock has it."""
    transposed = (
        torch.nn.ConvTranspose1d,
        torch.nn.ConvTranspose2d,
        torch.nn.ConvTranspose3d,
    )
    return 1 if isinstance(module, transposed) else 0


def check_backend(backend: str | None, weight: Tensor) -> None:
    """Raise unless the backend exists and can run where the weight is."""
    if not weight.is_complex():
        backends.select(backend, weight.device)


def checked_weight(module: Module, name: str, dim: int, label: str) -> tuple[Tensor, int]:
    """Return the tensor to normalize and ``dim`` as not negative."""
    if getattr(module, "_is_fsdp_managed_module", False):
        raise RuntimeError(
            f"{label}: the module is sharded, and FSDP would not find its weight in another place; "
            "apply the spectral norm before fully_shard"
        )
    if parametrize.is_parametrized(module, name):
        weight = getattr(module, name)
    else:
        weight = module._parameters.get(name)
        if weight is None:
            weight = module._buffers.get(name)
    if weight is None:
        state = "is None" if name in module._parameters else "does not exist"
        raise ValueError(f"{label}: there is no such parameter or buffer to normalize; it {state}")
    return weight, check_weight(label, weight, dim)
