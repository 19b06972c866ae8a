"""The layers of a group, flattened into the lists that one call takes.

A plan is made of the tensors that the layers have now. It holds as long as these are the same
objects; the group compares their identities on every entry and makes a new plan when one was
exchanged. Making a plan checks every layer, so that a call that starts is a call that can write.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from ..backends import Backend
from ..normalization import PreparedCall, is_traced, prepare, with_gain
from ..reference import Order
from ..settings import Settings
from .dynamic_class import parametrization_lists
from .parametrization import SETTINGS_OF_HOOK, SpectralNorm
from .sharded import is_sharded

try:  # every forward asks it
    from .._C import hold
except ImportError:

    def hold(
        dictionaries: tuple[dict[str, Any], ...], keys: tuple[str, ...], objects: tuple[Any, ...]
    ) -> bool:
        """Return whether each dictionary has this object, or for None nothing, under its key."""
        return all(map(is_, map(dict.get, dictionaries, keys), objects))


__all__ = ["Layer", "Plan", "UnitTensors"]


@dataclass(frozen=True)
class Layer:
    """One normalized tensor of a group."""

    name: str
    """Qualified name of the module in the model; empty for the model itself."""
    module: Module
    tensor_name: str
    parametrization: SpectralNorm

    @property
    def qualified_name(self) -> str:
        """Name of the tensor in the model, such as ``"block1.conv.weight"``."""
        return f"{self.name}.{self.tensor_name}" if self.name else self.tensor_name

    @property
    def weight(self) -> Tensor:
        """The weight before normalization."""
        return parametrization_lists(self.module)[self.tensor_name].original

    @property
    def n_power_iterations(self) -> int:
        """Steps of the power method for each forward in training."""
        return self.parametrization.n_power_iterations

    @property
    def eps(self) -> float:
        """Smallest divisor of a vector."""
        return self.parametrization.eps

    @property
    def dim(self) -> int:
        """The dimension of the weight that gives the rows of its matrix."""
        return self.parametrization.dim

    @property
    def order(self) -> Order:
        """The vector that an iteration renews first."""
        return self.parametrization.order

    def is_registered(self) -> bool:
        """Return whether the module still has this parametrization, at the first place."""
        found = parametrization_lists(self.module).get(self.tensor_name)
        return found is not None and found._modules.get("0") is self.parametrization

    def is_direct(self) -> bool:
        """Return whether its weight is available before the layer runs.

        A hook on the list of parametrizations makes it later: that of ``torch.nn.utils.prune``. So does a
        parametrization of the original. A weight on the meta device is loaded later: Accelerate keeps
        offloaded weights there between two calls.
        """
        list_ = parametrization_lists(self.module)[self.tensor_name]
        if parametrize.is_parametrized(list_, "original") or self.parametrization.is_bypassed:
            return False
        weight = _home_of_original(list_).get("original")
        return not list_._forward_pre_hooks and (weight is None or not weight.is_meta)

    def is_alone(self) -> bool:
        """Return whether no other parametrization is stacked on this one."""
        return len(parametrization_lists(self.module)[self.tensor_name]) == 1


class UnitTensors(NamedTuple):
    """The tensors of the units of a plan; ``u`` and ``v`` are None where the norm needs none."""

    weights: list[Tensor]
    us: list[Tensor | None]
    vs: list[Tensor | None]

    def select(self, places: list[int]) -> "UnitTensors":
        """Return the tensors of some of the units."""
        weights, us, vs = self
        return UnitTensors(
            [weights[i] for i in places], [us[i] for i in places], [vs[i] for i in places]
        )


def _home_of_original(list_: ParametrizationList) -> dict[str, Any]:
    """Return the dictionary that holds the original tensor of a list of parametrizations."""
    for home in (list_._parameters, list_._buffers):
        if "original" in home:
            return home
    return list_.__dict__  # a replica of DataParallel


def _links(root: Module, names: Iterable[str]) -> list[tuple[dict[str, Any], str, Any]]:
    """Return the entries of ``_modules`` on the ways from a model to modules in it, each once.

    A way that ends before its module, since one was taken out, has the entry where it ends.
    """
    links: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
    for name in names:
        module: Module | None = root
        for child in name.split(".") if name else ():
            if module is None:
                break
            children = module._modules
            module = children.get(child)
            links[id(children), child] = (children, child, module)
    return list(links.values())


class Plan:
    """What an entry of a group reads. A *unit* is one weight; tied layers share theirs.

    Attributes:
        layers: the layers that are still registered and have their weights at hand.
        unit_of_layer: for each layer the place of its unit.
        index: the same by ``id`` of the parametrization.
        settings: of the units.
        sharded: the units whose weights are distributed over several ranks.
        gathered: the units whose weights FSDP has gathered.

    Args:
        layers: the layers of the group that are in the model.
        root: the model. Without one, the plan does not notice that a module was replaced.
        absent: names of layers that have left the model; the plan notices when they come back.

    Raises:
        TypeError, ValueError: a layer's weight, vectors or settings do not fit; the message names
            it.
    """

    def __init__(
        self, layers: Sequence[Layer], root: Module | None = None, absent: Sequence[str] = ()
    ) -> None:
        registered = [layer for layer in layers if layer.is_registered()]
        self.layers = [layer for layer in registered if layer.is_direct()]
        self._lists = [
            parametrization_lists(layer.module)[layer.tensor_name] for layer in self.layers
        ]
        registrations = [
            (parametrization_lists(layer.module), layer.tensor_name, list_, list_._modules)
            for layer, list_ in zip(self.layers, self._lists, strict=True)
        ]
        self._parametrizations = [layer.parametrization for layer in self.layers]
        self._homes = [_home_of_original(list_) for list_ in self._lists]
        self._vectors: list[dict[str, Any]] = [
            {"_u": None, "_v": None} if p.is_vector else p._buffers for p in self._parametrizations
        ]
        for p, home in zip(self._parametrizations, self._homes, strict=True):
            if p._hook is not None:
                p._hook.give_settings(p, home["original"])
        self.check()
        self.unit_of_layer = self._find_units()
        self.index = {
            id(p): unit for p, unit in zip(self._parametrizations, self.unit_of_layer, strict=True)
        }
        for p, unit in zip(self._parametrizations, self.unit_of_layer, strict=True):
            p.__dict__["_place"] = unit
        indirect = [layer for layer in registered if not layer.is_direct()]
        for layer in indirect:
            layer.parametrization.__dict__["_place"] = -1
        # The first layer of every unit stands for it.
        units = range(max(self.unit_of_layer, default=-1) + 1)
        self._leads = [self.unit_of_layer.index(unit) for unit in units]
        self.has_ties = len(self._leads) < len(self.layers)
        self._share_vectors()
        leads = [self._parametrizations[i] for i in self._leads]
        self.settings = Settings.of([p.settings for p in leads])
        columns = self._columns()
        self._units = columns.select(self._leads) if self.has_ties else columns
        weights = self._units.weights
        self.sharded = frozenset(unit for unit in units if is_sharded(weights[unit]))
        self.gathered = frozenset(
            unit
            for unit in units
            if unit not in self.sharded
            and getattr(self._lists[self._leads[unit]], "_is_fsdp_managed_module", False)
        )
        self._calls: dict[int, PreparedCall | None] = {}
        self.sizes = [
            (0, 0) if u is None or v is None else (len(u), len(v))
            for u, v in zip(self._units.us, self._units.vs, strict=True)
        ]
        # For each unit the names of its layers.
        self.names = [""] * len(self._leads)
        for layer, unit in zip(self.layers, self.unit_of_layer, strict=True):
            before = f"{self.names[unit]}, " if self.names[unit] else ""
            self.names[unit] = before + layer.qualified_name
        self._units_of_weight = Counter(id(weight) for weight in columns.weights)
        self.weight_ids = {id(weight) for weight in columns.weights}
        self._norms = leads
        self.gains = [p.learned_gain for p in leads]
        self.has_gains = any(gain is not None for gain in self.gains)
        # For each unit whose layers all came with PyTorch's hook, the hooks.
        self.hooks: dict[int, list[Any]] = {}
        others = set()
        for p, unit in zip(self._parametrizations, self.unit_of_layer, strict=True):
            if p._hook is None:
                others.add(unit)
            else:
                self.hooks.setdefault(unit, []).append(p._hook)
        self._hooked = [p for p in self._parametrizations if p._hook is not None]
        for unit in others:
            self.hooks.pop(unit, None)
        # The tensors of the root itself that came with PyTorch's hook, and their units.
        self._of_root = [
            (p._hook, list_, unit)
            for layer, p, list_, unit in zip(
                self.layers, self._parametrizations, self._lists, self.unit_of_layer, strict=True
            )
            if p._hook is not None and layer.module is root
        ]
        self.has_trial = any(map(self.is_on_trial, self.hooks))
        # Where the plan looks whether everything is still the same: dictionary, key, what was there.
        places: list[tuple[dict[str, Any], str, Any]] = [
            place
            for registered, name, list_, modules in registrations
            for place in ((registered, name, list_), (modules, "0", list_[0]))
        ]
        places += [
            (home, "original", w) for home, w in zip(self._homes, columns.weights, strict=True)
        ]
        places += [(home, "_u", u) for home, u in zip(self._vectors, columns.us, strict=True)]
        places += [(home, "_v", v) for home, v in zip(self._vectors, columns.vs, strict=True)]
        places += [
            (p._parameters, "gain", p.learned_gain)
            for p in self._parametrizations
            if p.learned_gain is not None
        ]
        places += [
            (p._hook.__dict__, name, p._hook.__dict__[name])
            for p in self._hooked
            for name in SETTINGS_OF_HOOK
        ]
        places += [  # a pruned weight is a parameter again, an offloaded one is loaded
            (parameters, "original", parameters.get("original"))
            for layer in indirect
            for parameters in [parametrization_lists(layer.module)[layer.tensor_name]._parameters]
            if not layer.parametrization.is_bypassed
        ]
        places += [  # until their modules are called
            (layer.parametrization._hook.__dict__, "called", False)
            for layer in indirect
            if layer.parametrization.is_bypassed
        ]
        self._children: tuple[dict[str, Any], ...] = ()
        if root is not None:
            names = dict.fromkeys(layer.name for layer in layers) | dict.fromkeys(absent)
            links = _links(root, names)
            places += links
            self._children = tuple({id(link[0]): link[0] for link in links}.values())
        self._counts = [len(children) for children in self._children]
        self._places: tuple[tuple[Any, ...], ...] = tuple(zip(*places, strict=True))

    def check(self) -> None:
        """Raise, naming the layer, unless weights, vectors and settings fit each other."""
        for layer, home in zip(self.layers, self._homes, strict=True):
            layer.parametrization.check(home["original"])

    def _find_units(self) -> list[int]:
        """Number the units: layers with one weight and the same settings get one number."""
        units: dict[tuple[Any, ...], int] = {}
        return [
            units.setdefault((id(home["original"]), id(p.learned_gain), *p.settings), len(units))
            for p, home in zip(self._parametrizations, self._homes, strict=True)
        ]

    def _share_vectors(self) -> None:
        """Give the layers of one unit the same vectors, and those of two units different ones."""
        unit_of_vector: dict[int, int] = {}
        for vectors, unit in zip(self._vectors, self.unit_of_layer, strict=True):
            lead = self._vectors[self._leads[unit]]
            for name in ("_u", "_v"):
                vector = lead[name]
                if vector is None:
                    continue
                if unit_of_vector.setdefault(id(vector), unit) != unit:
                    with torch.inference_mode(False), torch.no_grad():
                        lead[name] = vector = vector.clone()
                    unit_of_vector[id(vector)] = unit
                vectors[name] = vector

    def _columns(self) -> UnitTensors:
        return UnitTensors(
            [home["original"] for home in self._homes],
            [vectors["_u"] for vectors in self._vectors],
            [vectors["_v"] for vectors in self._vectors],
        )

    def gather(self) -> UnitTensors | None:
        """Return the tensors of all units; None if the plan does not hold any more."""
        if self._places:
            if not hold(*self._places):
                return None
            if list(map(len, self._children)) != self._counts:  # a module was added
                return None
        return self._units

    def is_on_trial(self, unit: int) -> bool:
        """Return whether the modules of a unit have PyTorch's hook, and none of them was called yet."""
        hooks = self.hooks.get(unit)
        if hooks is None:
            return False
        for hook in hooks:  # noqa: SIM110, Dynamo cannot trace a generator here
            if hook.called:
                return False
        return True

    def on_trial(self, training: list[bool]) -> list[int]:
        """Return the units on trial whose vectors would advance."""
        if not self.has_trial:
            return []
        return [unit for unit in self.hooks if training[unit] and self.is_on_trial(unit)]

    def is_without_bypassed(self) -> bool:
        """Return whether the plan has no layer that the group does not compute any more."""
        return not any(p.is_bypassed for p in self._parametrizations)

    def begin_forward(
        self, tensors: UnitTensors, training: list[bool]
    ) -> tuple[UnitTensors, dict[int, tuple[Tensor, Tensor]]]:
        """Let the layers forget the weights of their last calls; return copies of vectors on trial.

        Returns:
            The tensors to compute with, and by unit the copies of ``u`` and ``v`` that are among them.
        """
        for norm in self._hooked:
            if norm._hook.called:
                norm.__dict__["_last_weight"] = None
        if not self.has_trial or is_traced():
            return tensors, {}
        weights, us, vs = tensors.weights, list(tensors.us), list(tensors.vs)
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for unit in self.on_trial(training):
            u, v = us[unit], vs[unit]
            assert u is not None and v is not None
            # Not inference tensors: what is made of those cannot be kept.
            with torch.inference_mode(False), torch.no_grad():
                copies[unit] = us[unit], vs[unit] = u.clone(), v.clone()
        return UnitTensors(weights, us, vs), copies

    def keep_of_root(self, normalized: list[Tensor | None]) -> None:
        """Keep the weights of the root itself until its next call, as PyTorch's hook does."""
        for hook, list_, unit in self._of_root:
            if hook.called:
                hook.keep(list_, normalized[unit])

    def is_of_the_same(self, other: "Plan | None") -> bool:
        """Return whether another plan has the same units, whose weights FSDP has exchanged."""
        return (
            other is not None
            and bool(self.sharded | self.gathered)
            and self.layers == other.layers
            and self.unit_of_layer == other.unit_of_layer
        )

    def with_gains(self, normalized: list[Tensor | None]) -> list[Tensor | None]:
        """Return normalized weights times the gains of their units."""
        if not self.has_gains:
            return normalized
        return [
            None if weight is None else self.with_gain(place, weight)
            for place, weight in enumerate(normalized)
        ]

    def with_gain(self, place: int, weight: Tensor) -> Tensor:
        """Return the normalized weight of a unit times its gain."""
        return with_gain(weight, self._norms[place].learned_gain, self.settings.dims[place])

    def reread(self, parametrization: SpectralNorm) -> bool:
        """Take the settings of a layer that were changed; return whether the plan can.

        A layer that shares a weight with another one may need a unit of its own now.
        """
        unit = self.index.get(id(parametrization))
        if unit is None or self._units_of_weight[id(self._units.weights[unit])] > 1:
            return False
        parametrization.check(self._units.weights[unit])
        row = Settings.of([parametrization.settings])
        pairs: Any = zip(self.settings, row, strict=True)
        for column, values in pairs:
            column[unit] = values[0]
        self.forget_calls()
        return True

    def forget_calls(self) -> None:
        """Let go of the tensors that prepared calls hold in C++."""
        self._calls.clear()

    def prepared(self, backend: Backend) -> PreparedCall | None:
        """Return one call for all units, if there is one.

        ``torch.utils.swap_tensors`` exchanges what two Python objects hold, which C++ does not see: as long
        as torch may swap parameters, no call is prepared.
        """
        if torch.__future__.get_swap_module_params_on_conversion():
            self.forget_calls()
            return None
        key = id(backend)  # a module, which stays
        if key not in self._calls:
            self._calls[key] = prepare(*self._units, self.settings, backend)
        return self._calls[key]

    def traceable(self) -> UnitTensors:
        """Return what :meth:`gather` does, in the words that ``torch.compile`` understands."""
        lists = [self._lists[i] for i in self._leads]
        leads = [self._parametrizations[i] for i in self._leads]
        return UnitTensors(
            [list_.original for list_ in lists],
            [None if p.is_vector else p._u for p in leads],
            [None if p.is_vector else p._v for p in leads],
        )

    @property
    def device(self) -> torch.device:
        """Where the first unit is; the CPU if there is none."""
        weights = self._units.weights
        return weights[0].device if weights else torch.device("cpu")

    def training(self) -> list[bool]:
        """Return for each unit whether to update: where a layer of it is in training."""
        modes = [p.training for p in self._parametrizations]
        if self.has_ties:
            return [
                any(mode for mode, of in zip(modes, self.unit_of_layer, strict=True) if of == unit)
                for unit in range(len(self._leads))
            ]
        return modes
