"""A layer with a spectral norm in a small model, for each of the ways that the norm is computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext

__all__ = ["APPLY", "HookRooted", "Rooted", "linear", "noise", "swapping", "without_graph"]

F64 = torch.float64
APPLY = {
    "stock": parametrizations.spectral_norm,
    "ours": spectral_ext.spectral_norm,
    "fused": parametrizations.spectral_norm,
}


@contextmanager
def swapping(on: bool) -> Iterator[bool]:
    """Let conversions, loading and removal exchange the contents of parameters."""
    torch.__future__.set_swap_module_params_on_conversion(on)
    try:
        yield on
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Rooted:
    """A layer inside of a model, whose call enters the group where there is one."""

    def __init__(self, kind: str, layer: nn.Module, *names: str) -> None:
        self.kind, self.layer, self.root = kind, layer, nn.Sequential(layer)
        self.normalize(*(names or ("weight",)))

    def normalize(self, *names: str) -> None:
        for name in names:
            APPLY[self.kind](self.layer, name)
        self.fuse()

    def fuse(self) -> None:
        if self.kind == "fused":
            spectral_ext.fuse(self.root)

    @property
    def norm(self) -> nn.Module:
        return self.layer.parametrizations.weight[0]

    @property
    def original(self) -> nn.Parameter:
        return self.layer.parametrizations.weight.original

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.norm._u, self.norm._v

    def vectors(self) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in self.buffers)

    def set_vectors(self, vectors: tuple[Tensor, ...]) -> None:
        for buffer, vector in zip(self.buffers, vectors, strict=True):
            buffer.data.copy_(vector)

    def remove(self, name: str = "weight", **settings: bool) -> None:
        parametrize.remove_parametrizations(self.layer, name, **settings)

    def __call__(self, x: Tensor) -> Tensor:
        return self.root(x)


class HookRooted(Rooted):
    """The same with ``torch.nn.utils.spectral_norm``."""

    def normalize(self, *names: str) -> None:
        for name in names:
            hook_spectral_norm(self.layer, name)
        self.fuse()

    @property
    def original(self) -> nn.Parameter:
        return self.layer.weight_orig

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.layer.weight_u, self.layer.weight_v

    def remove(self, name: str = "weight", **settings: bool) -> None:
        remove_spectral_norm(self.layer, name)


def linear(*shape: int) -> nn.Linear:
    return nn.Linear(*shape, dtype=F64)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def without_graph(function: Callable[[], Tensor]) -> Tensor:
    """A graph that is alive refers to the weight, and swap_tensors refuses it."""
    return function().detach().clone()
