"""The twin of a fused model: stock PyTorch, made to compute what a fused model promises.

This file is the only place that knows in which ways a fused model is meant to differ from stock:

- Entering the forward of a fused root computes every layer of its group once. Stock iterates at each
  access (parametrization) or at each call of the module (hook). ``TwinGroup.entered`` therefore computes
  every layer of the group on entry, under ``parametrize.cached()``, and silences the hooks inside.
  Layers that the forward does not use advance as well.
- With ``update="step"`` a training forward advances ``u`` and ``v`` only if something has changed since
  the last one, or a forward in evaluation was in between; with ``"manual"`` none does. After a capture
  every training forward computes. ``TwinGroup.advances`` and ``note`` decide it.
- The hook of a root's own tensor leaves its weight to the entry, which computes it once. Under
  ``parametrize.cached()`` of the user a group computes hook layers once, too.
- A layer whose hook was never called is computed by its first call. One that is never called, because
  another module reads its weight, keeps the raw weight, as in stock.
- Layers outside of a group, and all accesses outside of a root's forward, are stock's own.

Layers with settings that stock does not have are this package's, unfused, on the reference backend.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm as StockSpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook


class Norm(NamedTuple):
    """A spectral norm in a model, of either side and of any make."""

    name: str  # of the tensor, the same in both layouts
    module: nn.Module
    tensor: str
    norm: Any  # the parametrization or the hook

    @property
    def is_hook(self) -> bool:
        return isinstance(self.norm, StockHook)

    @property
    def is_waiting(self) -> bool:
        """Whether it is a hook in a group and was never called."""
        return isinstance(self.norm, QuietHook) and not self.norm.called

    @property
    def training(self) -> bool:
        return self.module.training if self.is_hook else self.norm.training

    @property
    def weight(self) -> nn.Parameter:
        if self.is_hook:
            return self.module._parameters[f"{self.tensor}_orig"]
        return self.module.parametrizations[self.tensor].original

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        if self.is_hook:
            setattr(self.module, f"{self.tensor}_orig", value)
        else:
            self.module.parametrizations[self.tensor].original = value

    @property
    def vectors(self) -> list[Tensor]:
        """``u`` and ``v``; nothing for a 1-D weight of the parametrization."""
        if self.is_hook:
            return [self.module._buffers[self.tensor + suffix] for suffix in ("_u", "_v")]
        return [self.norm._buffers[n] for n in ("_u", "_v") if n in self.norm._buffers]

    def sigma(self) -> float:
        """Return σ of the weight with the vectors that the layer has."""
        weight = self.weight.detach().double()  # which autocast leaves alone
        if not self.vectors:
            return weight.norm().item()
        u, v = (vector.double() for vector in self.vectors)
        return torch.dot(u, weight.movedim(self.norm.dim, 0).reshape(len(u), -1) @ v).item()

    def sigma_on_trial(self, update: bool) -> float:
        """Return σ of what a forward has computed, also for a hook that it has not called yet.

        If the forward fails before the call, the group tells that σ and the vectors stay.
        """
        if not (self.is_waiting and update):
            return self.sigma()
        buffers, own = self.module._buffers, dict(self.module._buffers)
        buffers.update({name: None if b is None else b.clone() for name, b in own.items()})
        try:
            with torch.no_grad():
                self.norm.compute_weight(self.module, do_power_iteration=True)
            return self.sigma()
        finally:
            buffers.update(own)


def norms(model: nn.Module) -> list[Norm]:
    """Return all spectral norms in a model, in the order of its modules."""
    found: dict[str, Norm] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, StockHook):
                found[prefix + hook.name] = Norm(prefix + hook.name, module, hook.name, hook)
        registered = module._modules.get("parametrizations")
        for tensor, list_ in () if registered is None else registered.items():
            if isinstance(list_[0], StockSpectralNorm):
                found[prefix + tensor] = Norm(prefix + tensor, module, tensor, list_[0])
    return list(found.values())


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a transform of ``torch.func`` has wrapped a tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class QuietHook(StockHook):
    """Stock's hook, which a group on entry can run in its place."""

    called = False
    # Nothing is kept of its last call: of a copied layer, and of a transform of torch.func, whose tensors
    # end with it. An access computes the weight.
    forgotten = False
    # Inside of a forward of its group: that the weight is in force, and how a first call makes it.
    quiet = False
    first: bool | None = None

    @classmethod
    def install(cls, norm: Norm) -> None:
        """Exchange the class of a hook."""
        if type(norm.norm) is StockHook:
            attribute = getattr(norm.module, norm.tensor)
            norm.norm.__class__ = cls
            norm.norm.called = not torch._C._is_alias_of(attribute.detach(), norm.weight.detach())

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if not self.quiet and not self.is_of_root(module):
            update = module.training if self.first is None else self.first
            self.put_in_force(module, update)
            self.quiet, self.first = self.first is not None, None
        self.called = True

    def is_of_root(self, module: nn.Module) -> bool:
        """Return whether the forward of the module, which comes next, enters the group and computes it."""
        forward = module.__dict__.get("forward")
        return forward is not None and id(self) in forward.__self__.ids

    def put_in_force(self, module: nn.Module, update: bool) -> None:
        buffers, own = module._buffers, dict(module._buffers)
        if not update:  # stock's graph would hold the buffers, which a later forward changes
            buffers.update({name: None if b is None else b.clone() for name, b in own.items()})
        weight = self.compute_weight(module, do_power_iteration=update)
        setattr(module, self.name, weight)
        self.forgotten = is_transformed(weight)
        buffers.update(own)


class CacheOfGroups(dict):  # type: ignore[type-arg]
    """The cache of ``parametrize.cached()`` inside of a root: only layers of its groups are kept.

    A group that is entered inside of another one starts with the outer weights and computes its own.
    """

    groups: list[list[tuple[int, str]]]

    def __setitem__(self, key: tuple[int, str], value: Tensor) -> None:
        if any(key in keys for keys in self.groups):
            super().__setitem__(key, value)


class TwinGroup:
    """The layers that a fused root computes on entry."""

    def __init__(self, root: nn.Module, members: list[Norm], update: str) -> None:
        self.root, self.update = root, update
        self.ids = {id(norm.norm) for norm in members}
        self.objects = [norm.norm for norm in members]  # so that an id stays theirs
        self.kept: list[bool] | None = None
        self.kept_state: list[tuple[int, int]] = []
        self.was_captured = self.has_run = False
        # σ of each layer in the last forward and in the one before, which an interrupt may leave.
        self.sigmas: dict[int, float] = {}
        self.sigmas_before: dict[int, float] = {}
        for norm in members:
            if norm.is_hook:
                QuietHook.install(norm)
        root.forward = self.forward

    def members(self) -> list[Norm]:
        return [norm for norm in norms(self.root) if id(norm.norm) in self.ids]

    def forward(self, *args: Any, **keywords: Any) -> Any:
        with self.entered():
            return type(self.root).forward(self.root, *args, **keywords)

    def advances(self, members: list[Norm]) -> list[bool]:
        """Decide which layers a forward advances."""
        if self.update == "forward":
            return [norm.training for norm in members]
        wanted = [norm.training and self.update == "step" for norm in members]
        if self.was_captured or self.kept is None or len(self.kept) != len(members):
            return wanted
        if self.kept_state != self.state(members):
            return wanted
        for norm, w, k in zip(members, wanted, self.kept, strict=True):
            if w and not k and self.computes(norm):
                return wanted
        return [False] * len(members)

    def computes(self, norm: Norm) -> bool:
        """Return whether a layer counts: one that no forward has called has left the group."""
        return not (norm.is_waiting and self.has_run)

    def state(self, members: list[Norm]) -> list[tuple[int, int]]:
        computed = filter(self.computes, members)
        tensors = [t for norm in computed for t in (norm.weight, *norm.vectors)]
        return [
            (id(t), 0)  # of torch.func, without memory of its own
            if is_transformed(t)
            else (t.data_ptr(), 0 if t.is_inference() else t._version)
            for t in tensors
        ]

    @contextmanager
    def entered(self) -> Iterator[None]:
        members = self.members()
        advance = self.advances(members)
        of_the_user = bool(parametrize._cache_enabled) and type(parametrize._cache) is dict
        keys = [(id(norm.module), norm.tensor) for norm in members]
        with parametrize.cached():
            if not of_the_user:
                cache = CacheOfGroups(parametrize._cache)
                cache.groups = [*getattr(parametrize._cache, "groups", ()), keys]
                for key in keys:
                    cache.pop(key, None)
                outer, parametrize._cache = parametrize._cache, cache
            for norm, update in zip(members, advance, strict=True):
                self.compute(norm, update)
            self.note(members, advance)
            if not of_the_user:
                self.sigmas_before = self.sigmas
                self.sigmas = {
                    id(norm.norm): norm.sigma_on_trial(update)
                    for norm, update in zip(members, advance, strict=True)
                }
            waiting = [norm for norm in members if norm.is_waiting]
            went_well = False
            try:
                yield
                went_well = True
            finally:
                if waiting:
                    self.first_calls(members)
                self.has_run |= went_well
                self.sigmas |= {
                    id(norm.norm): norm.sigma() for norm in waiting if not norm.is_waiting
                }
                for norm in members:
                    if norm.is_hook:
                        norm.norm.quiet, norm.norm.first = False, None
                if not of_the_user:
                    parametrize._cache = outer

    def note(self, members: list[Norm], advance: list[bool]) -> None:
        """Note what a forward has computed: one in evaluation keeps nothing, nor a captured one."""
        if any(map(is_transformed, (norm.weight for norm in members))):
            return
        if self.was_captured or not any(n.training for n in members if self.computes(n)):
            self.kept = None
        elif any(advance) or self.kept is None or self.kept_state != self.state(members):
            self.kept = advance
        self.kept_state = self.state(members)

    def compute(self, norm: Norm, update: bool) -> None:
        """Put the weight of one layer in force, and keep it so until the forward is left."""
        if norm.is_hook:
            key = (id(norm.module), norm.tensor)
            is_cached = key in parametrize._cache
            if type(parametrize._cache) is dict:  # that of the user
                parametrize._cache[key] = norm.weight  # says that the attribute of the module is it
            if norm.norm.called:
                if not is_cached:
                    norm.norm.put_in_force(norm.module, update)
                norm.norm.quiet = True
            else:
                norm.norm.first = update
                self.refresh(norm)
            return
        before = norm.norm.training
        norm.norm.training = update
        try:
            # An access that is made with gradients gets them from a fused model, whatever the entry was.
            with nullcontext() if torch.is_inference_mode_enabled() else torch.enable_grad():
                getattr(norm.module, norm.tensor)
        finally:
            norm.norm.training = before

    def first_calls(self, members: list[Norm]) -> None:
        """Note what first calls of hooks have done; a layer that waits for its one is computed again."""
        if self.kept is not None and not any(is_transformed(norm.weight) for norm in members):
            waits = any(norm.is_waiting for norm in members)
            self.kept = None if waits and not self.has_run else self.kept
            self.kept_state = self.state(members)

    @staticmethod
    def refresh(norm: Norm) -> None:
        """Let a weight that no call has computed be the raw one, and renew one that is not kept.

        In stock the first is the memory that the raw weight had at first, whatever became of it.
        """
        if norm.is_hook and not norm.norm.called:
            setattr(norm.module, norm.tensor, norm.weight.detach())
        elif norm.is_hook and norm.norm.forgotten:
            with torch.no_grad():
                norm.norm.put_in_force(norm.module, False)
            norm.norm.forgotten = True

    def iterate(self) -> None:
        """Do what ``SpectralGroup.iterate`` does: one update of all layers, in any mode.

        The next forward in training takes what it has computed, if there is a layer in training now.
        """
        members = self.members()
        with torch.no_grad():
            for norm in members:
                if norm.is_hook:
                    norm.norm.compute_weight(norm.module, do_power_iteration=True)
                    continue
                before = norm.norm.training
                norm.norm.training = True
                getattr(norm.module, norm.tensor)
                norm.norm.training = before
        self.sigmas_before, self.sigmas = self.sigmas, {id(n.norm): n.sigma() for n in members}
        if not self.was_captured and any(norm.training for norm in members):
            self.kept, self.kept_state = [True] * len(members), self.state(members)
