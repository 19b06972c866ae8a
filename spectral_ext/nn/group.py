"""The layers of a fused model, computed together on entry to its forward."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback as eval_frame_callback
from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.nn.utils import parametrize

from .. import backends
from ..normalization import Results, is_traced, normalize_layers
from ..settings import Settings
from .active import Part, Record, Visible, active, hidden_saves
from .cached import put_into_cache, take_from_cache
from .dynamic_class import GROUP, parametrization_lists
from .find import find_norms
from .history import NO_REGIONS, Regions, forward_grad_enabled, open_regions
from .kept import Kept, Update, is_capturing, watch_optimizers
from .last_forward import LastForward, join_sigmas
from .parametrization import IN_GROUP, SpectralNorm, check_backend
from .plan import Layer, Plan, UnitTensors
from .sharded import normalize_sharded

__all__ = ["SpectralGroup", "group_of"]


class SpectralGroup:
    """All normalized layers of a fused model; :func:`spectral_ext.fuse` makes it.

    Args:
        layers: the layers, in the order of ``model.named_modules()``.
        backend: see :func:`spectral_ext.functional.spectral_normalize`.
        bucket_mb: weights of so many MiB share a node of the autograd graph, so that the gradients
            of the first layers are not waited for; None for one node.
        update: when ``u``, ``v`` and the weights are computed; see :func:`spectral_ext.fuse`.
        check_finite: let :meth:`check` raise where a σ was not finite.
        autocast: write the weights in the dtype of ``torch.autocast``; see :func:`spectral_ext.fuse`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        backend: str | None = None,
        bucket_mb: float | None = None,
        update: Update = "forward",
        check_finite: bool = False,
        autocast: bool = False,
    ) -> None:
        self.backend = backend
        self.bucket_mb = bucket_mb
        self.update = update
        self.check_finite = check_finite
        self.autocast = autocast
        self._layers = list(layers)
        # Layers whose modules were taken out of the model; they may be put back.
        self._absent: list[_Absent] = []
        self._n_forwards = self._n_lone = 0
        # The spectral norms that the model had when the group last looked.
        self._known: weakref.WeakSet[Any] | None = None
        self._plan: Plan | None = None
        self._other_plan: Plan | None = None
        self._last = LastForward()
        self._kept: Kept | None = None
        self._was_captured = False
        if update != "forward":
            watch_optimizers(self)
        self._root: weakref.ref[Module] | None = None
        self.visible = Visible()

    @property
    def registered(self) -> tuple[Layer, ...]:
        """The layers that are still registered, in modules that are still in the model."""
        if self._plan is None or self._plan.gather() is None:
            self._follow_model()
        return tuple(layer for layer in self._layers if layer.is_registered())

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that the group computes on entry: all but those whose weight a hook makes or loads."""
        return tuple(layer for layer in self.registered if layer.is_direct())

    @property
    def sigmas(self) -> Tensor:
        """σ of every layer, in the order of :attr:`layers`, as one detached tensor.

        From the last forward; before the first one with the ``u`` and ``v`` that the layers have.
        """
        layers = self.layers
        sigmas = self._last.sigmas(layers)
        if sigmas is not None:
            return sigmas
        plan, tensors = self._gather()
        count = len(tensors.weights)
        with torch.no_grad():
            parts = self._run(plan, tensors, list(range(count)), [False] * count)
        sigmas = join_sigmas(parts, count)
        assert sigmas is not None
        return sigmas[[plan.index[id(layer.parametrization)] for layer in layers]]

    @property
    def iterations(self) -> Tensor:
        """How many power iterations each layer made in the last forward that computed it.

        In the order of :attr:`layers`; 0 in evaluation, NaN before the first forward.
        """
        return self._last.iterations(self.layers)

    @property
    def residuals(self) -> Tensor:
        """How far ``u`` and ``v`` of each layer are from singular vectors, as a part of σ.

        Of the last iteration; NaN for layers without a ``tol``. See
        :func:`spectral_ext.reference.power_iteration`.
        """
        return self._last.residuals(self.layers)

    def log_dict(self, prefix: str = "spectral_norm/") -> dict[str, float]:
        """Return σ of every layer by name, for TensorBoard, Weights & Biases or Lightning.

        With one transfer from the device for all layers.

        Args:
            prefix: of all keys.

        Returns:
            ``{prefix}sigma/{qualified_name}`` for every layer, ``{prefix}sigma_min`` and
            ``{prefix}sigma_max``; empty for a group without layers.

        Raises:
            TypeError: ``prefix`` is not a string.
        """
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, got {type(prefix).__name__}")
        sigmas: list[float] = self.sigmas.tolist()
        if not sigmas:
            return {}
        names = [layer.qualified_name for layer in self.layers]
        values = {f"{prefix}sigma/{name}": s for name, s in zip(names, sigmas, strict=True)}
        return values | {f"{prefix}sigma_min": min(sigmas), f"{prefix}sigma_max": max(sigmas)}

    def check(self) -> None:
        """Raise if a σ was not finite in any forward since the last check, or is 0 of a weight that is not.

        For groups with ``check_finite``. The forwards note it on the device; only this waits. Where the
        σ of the last forward is 0, it looks at the weight, ``u`` and ``v`` too: the next forward may find
        another σ.

        Raises:
            FloatingPointError: names the layers.
            ValueError: the group was made without ``check_finite``.
        """
        if not self.check_finite:
            raise ValueError("the group does not note it; fuse the model with check_finite=True")
        names = self._last.take_not_finite()
        if names:
            raise FloatingPointError(
                f"the spectral norm was not finite since the last check: {', '.join(names)}"
            )
        layers = self.layers
        sigmas = self._last.sigmas(layers)
        zero = [] if sigmas is None else (sigmas == 0).tolist()
        names = [
            layer.qualified_name
            for layer, is_zero in zip(layers, zero, strict=False)
            if is_zero and not layer.parametrization.finds_sigma(layer.weight)
        ]
        if names:
            raise FloatingPointError(
                "the spectral norm is 0 and the weight is not, so it is not normalized: "
                f"{', '.join(names)}; call warm_start() or reset u and v"
            )

    @torch.no_grad()
    def iterate(self) -> None:
        """Make the power iterations of one training forward now, for ``update="manual"``."""
        plan, tensors = self._gather()
        updates = [True] * len(tensors.weights)
        parts = self._normalize(plan, tensors, list(range(len(updates))), updates)
        if self._may_keep(plan, tensors, plan.training()):
            self._kept = Kept(plan, tensors, updates, parts, self._output_dtype(plan))

    @torch.no_grad()
    def warm_start(self, n_power_iterations: int = 15) -> None:
        """Advance ``u`` and ``v`` of all layers by so many iterations, after a jump of the weights.

        Vectors that are zero or not finite restart. Loading a checkpoint that has weights and no
        vectors does so by itself.
        """
        if isinstance(n_power_iterations, bool) or not isinstance(n_power_iterations, int):
            raise TypeError("n_power_iterations must be an int")
        if n_power_iterations < 1:
            raise ValueError(f"n_power_iterations must be positive, got {n_power_iterations}")
        plan, tensors = self._gather()
        count = len(tensors.weights)
        settings = plan.settings._replace(
            n_power_iterations=[n_power_iterations] * count, tols=[0.0] * count
        )
        norms = [layer.parametrization for layer in plan.layers]
        for norm in norms:
            norm.make_unit_vectors()
        self._run(plan, tensors, list(range(count)), [True] * count, settings)
        for norm in norms:
            norm.make_unit_vectors()

    def sigma_of(self, name: str) -> Tensor:
        """Return σ of one layer as a 0-D tensor.

        Args:
            name: of the module, or of the tensor (``"block1.conv"`` or ``"block1.conv.weight"``).

        Raises:
            KeyError: no layer has that name, or several tensors of that module are normalized.
            TypeError: the name is not a string.
        """
        if not isinstance(name, str):
            raise TypeError(
                f"name must be that of a layer, got {name!r}; group.sigmas has σ by position"
            )
        found = [
            i for i, layer in enumerate(self.layers) if name in (layer.name, layer.qualified_name)
        ]
        if len(found) != 1:
            names = ", ".join(layer.qualified_name for layer in self.layers)
            raise KeyError(f"{name!r} names {len(found)} layers of the group, which has: {names}")
        return self.sigmas[found[0]]

    if not TYPE_CHECKING:  # type checkers say it already

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Raise: the model is called, not its group."""
            root = type(self.root).__name__
            raise TypeError(
                f"a SpectralGroup is not callable: fuse(model) changes {root} in place and returns its "
                "group; call the model itself"
            )

    def normalized(self) -> "_Entry":
        """Return a context manager that computes all layers and puts their weights in force.

        Inside of it, on this thread, every access of a weight gives the same tensor, as under
        ``torch.nn.utils.parametrize.cached()``. The forward of a fused model is entered so; use it
        for other methods that need the weights more than once. It nests: an inner entry computes
        anew, as a second forward would.
        """
        return _Entry(self)

    def invalidate(self) -> None:
        """Read the layers and their settings again, and compute the weights anew in the next forward.

        For ``update="step"`` and ``"manual"``, after a change of a weight that leaves no trace: one
        by ``weight.data`` outside of an optimizer.
        """
        self._plan = self._other_plan = self._kept = None
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # the next entry raises it
            self._plan = self._new_plan()
            # torch.compile cannot trace the import of a backend; from now on there is none.
            for layer in self._plan.layers:
                check_backend(self.backend, layer.weight)
                check_backend(layer.parametrization.backend, layer.weight)

    def changed(self, parametrization: SpectralNorm) -> None:
        """Take a setting of one layer that was assigned."""
        self._kept = None
        plans = [plan for plan in (self._plan, self._other_plan) if plan is not None]
        try:
            if not plans or not all(plan.reread(parametrization) for plan in plans):
                self.invalidate()
        except (TypeError, ValueError):  # the next entry raises it, with the name of the layer
            self._plan = self._other_plan = None

    def trial_ended(self, parametrization: SpectralNorm) -> None:
        """Know that a layer has taken over the vectors of the forward that it was called in."""
        if self._kept is not None:
            self._kept.renew(parametrization)

    def forget_calls(self) -> None:
        """Hold no tensor in C++, before ``torch.utils.swap_tensors`` exchanges parameters."""
        for plan in (self._plan, self._other_plan):
            if plan is not None:
                plan.forget_calls()

    def stepped(self, parameters: set[int]) -> None:
        """Forget the weights that were kept, if an optimizer has changed one of these parameters."""
        if self._kept is None or self._plan is None:
            return
        # Of FSDP the plan may have the whole weights, and an optimizer has the shards.
        now = {id(layer.weight) for layer in self.layers}
        if not parameters.isdisjoint(self._plan.weight_ids | now):
            self._kept = None

    # The life of a group.

    def bind(self, root: Module) -> None:
        """Belong to ``root`` from now on, and tell the layers."""
        self._root = weakref.ref(root)
        for layer in self._layers:
            self._claim(layer.parametrization)
        self.invalidate()
        self._known = weakref.WeakSet(site.norm for site in find_norms(root))

    def is_first_with_vectors_of(self, parametrization: SpectralNorm) -> bool:
        """Return whether no layer before this one has the same ``u``: tied layers share theirs."""
        vector = parametrization._buffers["_u"]
        norms = (layer.parametrization for layer in self._layers)
        with_it = (norm for norm in norms if norm._buffers.get("_u") is vector)
        return next(with_it, parametrization) is parametrization

    def _claim(self, parametrization: SpectralNorm) -> None:
        parametrization.__dict__["_group"] = weakref.ref(self)
        parametrization.__dict__["_visible"] = self.visible

    @property
    def root(self) -> Module | None:
        """The fused model."""
        return None if self._root is None else self._root()

    def of(self, root: Module) -> "SpectralGroup":
        """Return the group for ``root``: this one, or a new one if ``root`` is a copy of our root.

        ``DataParallel`` makes replicas by copying the ``__dict__`` of modules.
        """
        if self.root is root:
            return self
        modules = dict(root.named_modules())
        layers = []
        for layer in self._layers:
            module = modules.get(layer.name)
            list_ = None if module is None else parametrization_lists(module).get(layer.tensor_name)
            if module is not None and list_ is not None:
                found = list_._modules["0"]
                if isinstance(found, SpectralNorm):
                    layers.append(Layer(layer.name, module, layer.tensor_name, found))
        group = SpectralGroup(
            layers,
            backend=self.backend,
            bucket_mb=self.bucket_mb,
            update=self.update,
            check_finite=self.check_finite,
            autocast=self.autocast,
        )
        group._root = weakref.ref(root)
        ours = {id(layer.parametrization) for layer in self._layers}
        for layer in layers:
            if id(layer.parametrization) not in ours:  # not so in copy.copy, which shares them
                group._claim(layer.parametrization)
        group.invalidate()
        root.__dict__[GROUP] = group
        return group

    def release(self, parametrizations: Iterable[SpectralNorm]) -> None:
        """Give layers away; each is computed alone, or by another group."""
        given = {id(p): p for p in parametrizations}
        self._layers = [x for x in self._layers if id(x.parametrization) not in given]
        rest = [x.parametrization for x in self._layers]
        taken = {id(vector) for p in rest for vector in p._buffers.values()}
        for parametrization in given.values():
            for name, vector in parametrization._buffers.items():
                if vector is not None and id(vector) in taken:  # tied weights
                    parametrization._buffers[name] = vector = vector.clone()
                taken.add(id(vector))
            for name in IN_GROUP:
                parametrization.__dict__.pop(name, None)
        self.invalidate()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "bucket_mb": self.bucket_mb,
            "update": self.update,
            "check_finite": self.check_finite,
            "autocast": self.autocast,
            "layers": [
                (layer.name, layer.module, layer.tensor_name, layer.parametrization)
                for layer in self.registered
            ],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The modules may still be empty here; a plan is made at the first entry.
        self.__init__(  # type: ignore[misc]
            [Layer(*layer) for layer in state["layers"]],
            backend=state["backend"],
            bucket_mb=state["bucket_mb"],
            update=state.get("update", "forward"),
            check_finite=state.get("check_finite", False),
            autocast=state.get("autocast", False),
        )

    # What happens on entry.

    def enter(self) -> Record:
        """Compute all layers for a forward and return the record of it, not yet in force."""
        self._n_forwards += 1
        if eval_frame_callback() is not None:  # torch.compile is to see what it computes, not how
            return torch.compiler.disable(self.compute)()
        return self.compute()

    def count_lone(self) -> None:
        """Note that a layer was computed alone in training, and warn where the group never is."""
        if self._n_forwards or self.visible.has_run:  # the latter by compiled code
            return
        self._n_lone += 1
        if self._n_lone == max(50, 10 * len(self._layers)):
            warnings.warn(
                f"{type(self.root).__name__} is fused, but its forward was never called: its layers were "
                f"computed alone {self._n_lone} times. Fuse the module whose forward runs them, or wrap the "
                "code that uses them in `with group.normalized():`.",
                stacklevel=2,
            )

    def compute(self) -> Record:
        """Compute all layers."""
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            in_backward = torch._C._current_graph_task_id() != -1
            return self._compute(open_regions() if in_backward else NO_REGIONS)
        regions = open_regions()
        with hidden_saves():  # a checkpoint, perhaps: forward and recomputation must save as much
            return self._compute(regions)

    def _compute(self, regions: Regions) -> Record:
        plan, tensors = self._gather()
        training = plan.training()
        if regions is NO_REGIONS and not forward_grad_enabled() and any(training):
            regions = open_regions()
        if regions.replayed is not None:
            return self._compute_again(plan, tensors, regions)
        on_trial: dict[int, tuple[Tensor, Tensor]] = {}
        if plan.hooks:
            tensors, on_trial = plan.begin_forward(tensors, training)
        at_once = self.update == "forward" and not on_trial
        results = self._normalize_at_once(plan, training) if at_once else None
        if results is not None:
            parts: list[Part] = [(results, range(len(training)))]
            normalized: list[Any] = results.normalized
            if plan.has_gains:
                normalized = plan.with_gains(normalized)
        else:
            normalized, parts = self._take_kept_or_normalize(plan, tensors, training)
        plan.keep_of_root(normalized)

        def recompute(place: int) -> Tensor:
            return self._recompute(plan, tensors, place)

        record = self._record(plan, tensors, normalized, parts, recompute, regions)
        record.on_trial = on_trial
        return record

    def _compute_again(self, plan: Plan, tensors: UnitTensors, regions: Regions) -> Record:
        """Compute as the forward did that is now computed again for its backward."""
        weights, us, vs = tensors
        entry = regions.replay(self)
        if entry is not None:
            us, vs = list(us), list(vs)
            for layer, place in zip(plan.layers, plan.unit_of_layer, strict=True):
                vectors = entry.vectors_again(layer.parametrization)
                us[place], vs[place] = vectors or (us[place], vs[place])
        tensors = UnitTensors(weights, us, vs)
        places = list(range(len(weights)))
        parts = self._run(plan, tensors, places, [False] * len(places))
        normalized = plan.with_gains(_join_normalized(parts, len(places)))
        return self._record(plan, tensors, normalized, parts, None, regions)

    def _record(
        self,
        plan: Plan,
        tensors: UnitTensors,
        normalized: list[Tensor | None],
        parts: list[Part],
        recompute: Callable[[int], Tensor] | None,
        regions: Regions,
    ) -> Record:
        """Return a record, and note its vectors in the checkpoints that are open."""
        record = Record(
            plan.index,
            tensors.weights,
            normalized,
            parts,
            recompute,
            plan.with_gain,
            plan.sizes,
            regions,
            plan.gains if plan.has_gains else (),
        )
        entry = record.entry if regions.recorded else None
        if entry is not None:
            regions.note(self, entry)
        return record

    @property
    def label(self) -> str:
        """How messages call the group: by its layers."""
        return ", ".join(layer.qualified_name for layer in self.layers)

    def _recompute(self, plan: Plan, tensors: UnitTensors, place: int) -> Tensor:
        """Compute one unit again, without update, as autograd sees it."""
        weights, us, vs = tensors.select([place])
        settings = plan.settings.select([place])
        dtype = self._output_dtype(plan)
        results = normalize_layers(weights, us, vs, settings, False, self.backend, None, dtype)
        return results.normalized[0]

    def _keep(
        self, plan: Plan, tensors: UnitTensors, training: list[bool]
    ) -> tuple[list[Tensor | None], list[Part]]:
        """Take what was computed since the weights last changed, or compute it; attach it again."""
        wanted = [mode and self.update == "step" for mode in training]
        kept, dtype = self._kept, self._output_dtype(plan)
        if kept is None or not kept.serves(plan, tensors, wanted, dtype):
            self._kept = None  # its memory is free for the next one
            # A tensor that is made in inference mode can be in no graph later.
            with torch.inference_mode(False), torch.no_grad():
                parts = self._normalize(plan, tensors, list(range(len(wanted))), wanted)
            kept = self._kept = Kept(plan, tensors, wanted, parts, dtype)
        normalized = _join_normalized(kept.parts, len(wanted))
        if torch.is_grad_enabled():
            for results, part in kept.parts:
                weights = [tensors.weights[place] for place in part]
                for i, weight in results.attach(weights, self._bucket_bytes).items():
                    normalized[part[i]] = weight
            for place, weight in enumerate(tensors.weights):
                if place in plan.sharded:
                    continue
                if weight.requires_grad and not kept.can_attach(place):
                    normalized[place] = self._recompute(plan, tensors, place)
        return normalized, kept.parts

    def _may_keep(self, plan: Plan, tensors: UnitTensors, training: list[bool]) -> bool:
        """Return whether a computation may serve later forwards: whether they could tell that it does.

        Not in evaluation (:class:`Kept` says why), not of stand-ins, not of inference tensors, which have no
        versions, and not in a captured CUDA graph, nor after one: its replays change weights, ``u`` and ``v``
        without a trace, and own the memory of what was computed in it.
        """
        if self.update == "forward" or not any(training) or is_traced():
            return False
        if is_capturing(plan.device):
            self._was_captured = True
        return not self._was_captured and not any(
            tensor.is_inference() for column in tensors for tensor in column if tensor is not None
        )

    def _take_kept_or_normalize(
        self, plan: Plan, tensors: UnitTensors, training: list[bool]
    ) -> tuple[list[Tensor | None], list[Part]]:
        """Take what was kept, if the group keeps; else compute all units in as many calls as it takes."""
        traced = is_traced()
        if self._may_keep(plan, tensors, training):
            normalized, parts = self._keep(plan, tensors, training)
            normalized = plan.with_gains(normalized)
        else:
            if not traced:
                self._kept = None
            cached: list[Tensor | None] = [None] * len(training)
            places = list(range(len(training)))
            if traced:  # no transform lets a hook copy into its vectors, and so the hook computes
                left_out = plan.on_trial(training)
                places = [place for place in places if place not in left_out]
            if parametrize._cache_enabled:  # of a sharded layer the cache takes the weight, later
                missing = take_from_cache(plan, cached)
                places = [i for i in places if i in missing and i not in plan.sharded]
            updates = [mode and self.update != "manual" for mode in training]
            parts = self._normalize(plan, tensors, places, updates)
            new = plan.with_gains(_join_normalized(parts, len(training)))
            normalized = [old if old is not None else x for old, x in zip(cached, new, strict=True)]
            if parametrize._cache_enabled:
                put_into_cache(plan, normalized)
        return normalized, parts

    def trace(self) -> Record:
        """Compute all layers while ``torch.compile`` traces."""
        plan = self._plan
        assert plan is not None, "a layer of the group does not fit; call the model to see which"
        tensors = plan.traceable()
        updates = [mode and self.update != "manual" for mode in plan.training()]
        places, on_trial = [], {}
        weights, us, vs = tensors
        for place, update in enumerate(updates):
            if place in plan.sharded:
                continue  # it is computed alone where its weight is whole
            if plan.is_on_trial(place):
                if self.visible.has_run:
                    continue  # it is bypassed
                if update:
                    us[place], vs[place] = us[place].clone(), vs[place].clone()  # type: ignore[union-attr]
                    on_trial[place] = us[place], vs[place]
            places.append(place)
        parts = self._normalize(plan, tensors, places, updates)
        normalized = plan.with_gains(_join_normalized(parts, len(updates)))
        record = Record({}, weights, normalized, [], None)
        record.on_trial = on_trial  # type: ignore[assignment]
        record.of_compiled = True
        return record

    def _gather(self) -> tuple[Plan, UnitTensors]:
        """Return a plan that holds, and the tensors of its units."""
        plan = self._plan
        if plan is not None and plan.has_trial and self.visible.has_run and not is_traced():
            plan.has_trial = False
            if not plan.is_without_bypassed():
                self._plan = self._other_plan = plan = None
        tensors = None if plan is None else plan.gather()
        if plan is None or tensors is None:
            # FSDP exchanges the weights for their shards and back again: one plan for each.
            other = self._other_plan
            tensors = None if other is None else other.gather()
            if other is not None and tensors is not None:
                plan, self._plan, self._other_plan = other, other, plan
                return plan, tensors
            before, plan = plan, self._new_plan()
            tensors = plan.gather()
            assert tensors is not None
            if not is_traced():
                self._plan = plan
                self._other_plan = before if plan.is_of_the_same(before) else None
                self._tell_of_others()
        return plan, tensors

    def _new_plan(self) -> Plan:
        self._follow_model()
        return Plan(self._layers, self.root, [absent.name for absent in self._absent])

    def _follow_model(self) -> None:
        """Let go of layers whose modules have left the model, and take back those that returned."""
        root = self.root
        if root is None:
            return
        names = {module: name for name, module in root.named_modules()}
        absent = [(entry, entry.layer()) for entry in self._absent]
        back = [layer for _, layer in absent if layer is not None and layer.module in names]
        gone = [layer for layer in self._layers if layer.module not in names]
        if back or gone or any(layer.name != names.get(layer.module) for layer in self._layers):
            present = [x for x in (*self._layers, *back) if x.module in names]
            order = {module: place for place, module in enumerate(names)}
            present.sort(key=lambda layer: order[layer.module])
            self._layers = [replace(layer, name=names[layer.module]) for layer in present]
        self._absent = [
            entry for entry, layer in absent if layer is not None and layer.module not in names
        ]
        for layer in gone:
            layer.parametrization.__dict__["_place"] = -1
            self._absent.append(_Absent(layer))

    def _tell_of_others(self) -> None:
        """Warn once of each spectral norm that came into the model and is in no group."""
        root = self.root
        if root is None or root.__dict__.get(GROUP) is not self:
            return
        sites = [site for site in find_norms(root) if site.is_fusible]
        known, self._known = self._known, weakref.WeakSet(site.norm for site in sites)
        if known is None:  # a copy, which looks for the first time
            return
        ours = {id(layer.parametrization) for layer in self._layers}
        for site in sites:
            norm = site.norm
            if norm in known or id(norm) in ours or getattr(norm, "_group", None):
                continue
            warnings.warn(
                f"{site.qualified_name} has a spectral norm but is in no group, and is computed "
                f"alone; it came into the fused {type(root).__name__} later. Call "
                "spectral_ext.fuse(model) again to include it.",
                stacklevel=2,
            )

    def _normalize_at_once(self, plan: Plan, training: list[bool]) -> Results | None:
        """Compute all units in the shortest way; None, and nothing done, where that is not open."""
        if (
            not training
            or training.count(training[0]) < len(training)
            or parametrize._cache_enabled
            or is_traced()
        ):
            return None
        call = plan.prepared(backends.select(self.backend, plan.device))
        if call is None:
            return None
        try:
            results = call(training[0], self._bucket_bytes, self._output_dtype(plan))
        except (TypeError, ValueError):  # the long way knows more, or says which layer it is
            return None
        parts: list[Part] = [(results, range(len(training)))]
        self._last.note(plan, parts, training)
        if self.check_finite:
            self._last.note_not_finite(plan, parts, len(training))
        return results

    def _output_dtype(self, plan: Plan) -> torch.dtype | None:
        """Return the dtype that autocast wants now, if the group heeds it."""
        if not self.autocast:
            return None
        kind = plan.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @property
    def _bucket_bytes(self) -> int | None:
        return None if self.bucket_mb is None else int(self.bucket_mb * 2**20)

    def _normalize(
        self, plan: Plan, tensors: UnitTensors, places: list[int], updates: list[bool]
    ) -> list[Part]:
        """Compute the units at ``places``, and note what the group tells of its last forward."""
        parts = self._run(plan, tensors, places, updates)
        if is_traced():
            self._last.forget()
            return parts
        self._last.note(plan, parts, updates)
        if self.check_finite:
            self._last.note_not_finite(plan, parts, len(updates))
        return parts

    def _run(
        self,
        plan: Plan,
        tensors: UnitTensors,
        places: list[int],
        updates: list[bool],
        settings: Settings | None = None,
    ) -> list[Part]:
        """Compute units: those to update in one call, the others in another; and so those of shards."""
        parts: list[Part] = []
        settings = plan.settings if settings is None else settings
        dtype = self._output_dtype(plan)
        for update, of_shards in ((True, False), (False, False), (True, True), (False, True)):
            part = [i for i in places if updates[i] is update and (i in plan.sharded) is of_shards]
            if not part:
                continue
            whole = len(part) == len(updates)
            chosen = tensors if whole else tensors.select(part)
            columns = settings if whole else settings.select(part)
            results: Results
            try:
                if of_shards:
                    results = normalize_sharded(*chosen, columns, update, self.backend, dtype)
                else:
                    results = normalize_layers(
                        *chosen, columns, update, self.backend, self._bucket_bytes, dtype
                    )
            except Exception:
                plan.check()  # names the layer, if it is one that does not fit
                raise
            parts.append((results, part))
        return parts

    def __repr__(self) -> str:
        layers = self.layers
        sizes = {id(layer.weight): layer.weight.numel() for layer in layers}
        parameters = sum(sizes.values())
        chosen = "+".join(
            dict.fromkeys(_backend_name(self.backend, layer.weight.device) for layer in layers)
        )
        buckets = "one bucket" if self.bucket_mb is None else f"buckets of {self.bucket_mb:g} MiB"
        forwards = "compiled" if self.visible.has_run and not self._n_forwards else self._n_forwards
        lines = [
            f"SpectralGroup({len(layers)} layers, {parameters:,} parameters, "
            f"backend {chosen or 'none'}, {buckets}, {forwards} forwards"
        ]
        for layer in layers:
            settings = layer.parametrization.extra_repr()
            lines.append(
                f"  {layer.qualified_name}: {tuple(layer.weight.shape)}"
                + (f", {settings}" if settings else "")
            )
        return "\n".join(lines) + ("\n)" if layers else ")")


class _Entry:
    """The context of :meth:`SpectralGroup.normalized`; what the forward of a fused root does without it."""

    __slots__ = ("_above", "_below", "_group", "_record")

    def __init__(self, group: SpectralGroup) -> None:
        self._group = group
        self._record: Record | None = None

    def __enter__(self) -> SpectralGroup:
        group, visible = self._group, self._group.visible
        if is_dynamo_compiling():
            self._above, visible.record = visible.record, group.trace()
            return group
        record = group.enter()
        record.below = self._below = active.record
        self._above = None if record.below is None else visible.record
        self._record = visible.record = active.record = record
        return group

    def __exit__(self, *error: object) -> None:
        self._group.visible.record = self._above
        if not is_dynamo_compiling():
            active.record = self._below
            self._record = None

    def __del__(self) -> None:
        """Take the weights out of force where an interrupt came before :meth:`__exit__` could."""
        record = getattr(self, "_record", None)  # the interrupt may have been in the constructor
        if record is not None and active.record is record:
            self.__exit__()


class _Absent:
    """A layer whose module is not in the model at present; it is not kept alive."""

    def __init__(self, layer: Layer) -> None:
        self.name = layer.name
        self._tensor_name = layer.tensor_name
        self._module = weakref.ref(layer.module)
        self._parametrization = weakref.ref(layer.parametrization)

    def layer(self) -> Layer | None:
        """Return the layer; None if it was deleted."""
        module, parametrization = self._module(), self._parametrization()
        if module is None or parametrization is None:
            return None
        return Layer(self.name, module, self._tensor_name, parametrization)


def group_of(model: Module) -> SpectralGroup:
    """Return the group of a fused model, for instance of one that was loaded or copied.

    Raises:
        ValueError: the model is not fused.
    """
    group = model.__dict__.get(GROUP)
    if group is None:
        raise ValueError(f"{type(model).__name__} is not fused; spectral_ext.fuse(model) does it")
    return group.of(model)


def _join_normalized(parts: list[Part], count: int) -> list[Tensor | None]:
    """Return the weights of several computations by place; None for those that have none."""
    normalized: list[Tensor | None] = [None] * count
    for results, part in parts:
        for place, weight in zip(part, results.normalized, strict=True):
            normalized[place] = weight
    return normalized


def _backend_name(name: str | None, device: torch.device) -> str:
    try:
        return backends.name_of(backends.select(name, device))
    except (ValueError, RuntimeError):
        return f"{name} (cannot run)"
