"""What is set for each layer, as its user gives it and as the operators take it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Order
from .validation import check_blocks, check_settings, check_target

__all__ = ["LEAST_EPS", "LayerSettings", "Settings"]


# The smallest eps of the kernels: a smaller one is zero in float32, and a zero vector over it NaN.
LEAST_EPS = 2.0**-126


class LayerSettings(NamedTuple):
    """The settings of one layer, as its user gives them; see ``functional.spectral_normalize``.

    Numbers may be those of NumPy, also where a user assigns one to a layer later.
    """

    dim: int = 0
    n_power_iterations: int = 1
    eps: float = 1e-12
    order: Order = "u_first"
    tol: float = 0.0
    scale: float = 1.0
    bound: float | None = None
    detach_sigma: bool = False
    blocks: int = 1

    def check(self, name: str) -> None:
        """Raise TypeError or ValueError, naming the layer, unless the settings make sense."""
        check_settings(name, self.n_power_iterations, self.eps, self.order)
        check_target(name, self.scale, self.bound, self.detach_sigma, self.tol)
        check_blocks(name, self.blocks)


class Settings(NamedTuple):
    """The settings of all layers of a call, a list for each kind as the operators take them."""

    dims: list[int]
    n_power_iterations: list[int]
    eps: list[float]
    v_first: list[bool]
    tols: list[float]
    scales: list[float]
    soft: list[bool]
    detach_sigma: list[bool]
    blocks: list[int]

    @classmethod
    def of(cls, layers: Sequence[LayerSettings]) -> "Settings":
        """Return the settings of several layers as lists of Python numbers, which operators require."""
        targets = [layer.scale if layer.bound is None else layer.bound for layer in layers]
        return cls(
            [int(layer.dim) for layer in layers],
            [int(layer.n_power_iterations) for layer in layers],
            [float(layer.eps) or LEAST_EPS for layer in layers],
            [layer.order == "v_first" for layer in layers],
            [float(layer.tol) for layer in layers],
            [float(target) for target in targets],
            [layer.bound is not None for layer in layers],
            [layer.detach_sigma for layer in layers],
            [int(layer.blocks) for layer in layers],
        )

    def with_least_eps(self, weights: Sequence[Tensor]) -> "Settings":
        """Return settings whose eps is not zero in the dtype that a weight is computed in."""
        if min(self.eps, default=1.0) >= LEAST_EPS:
            return self
        wide = (torch.float64, torch.complex128)
        pairs = zip(self.eps, weights, strict=True)
        return self._replace(eps=[e if w.dtype in wide else max(e, LEAST_EPS) for e, w in pairs])

    def select(self, indices: Sequence[int]) -> "Settings":
        """Return the settings of some of the layers."""
        columns: tuple[list[Any], ...] = tuple([column[i] for i in indices] for column in self)
        return Settings(*columns)

    def of_forward(self, update: bool) -> tuple[Any, ...]:
        """Return what ``forward_`` takes."""
        return (
            self.dims,
            self.n_power_iterations,
            self.eps,
            self.v_first,
            self.tols,
            self.scales,
            self.soft,
            update,
        )

    @property
    def of_node(self) -> tuple[Any, ...]:
        """What ``attach`` takes, and ``backward`` up to ``mask``."""
        return self.dims, self.scales, self.soft, self.detach_sigma
