"""Stock PyTorch's spectral normalization of one weight, as truth (in float64) and as yardstick.

The tolerance rule of all numeric tests: the error against float64 is at most twice the error that
stock makes in the weight's own dtype on the same input (plus a few roundings, since stock may be exact
by luck).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

ROUNDINGS = 8


@dataclass
class Layer:
    """The arguments of one layer. Stock knows nothing of those after ``order``."""

    weight: Tensor
    u: Tensor
    v: Tensor
    dim: int = 0
    n_power_iterations: int = 1
    eps: float = 1e-12
    order: str = "u_first"
    tol: float = 0.0
    scale: float = 1.0
    bound: float | None = None
    detach_sigma: bool = False

    def with_tensors(self, weight: Tensor, u: Tensor, v: Tensor) -> "Layer":
        return replace(self, weight=weight, u=u, v=v)

    def to(self, dtype: torch.dtype) -> "Layer":
        tensors = (self.weight, self.u, self.v)
        return self.with_tensors(*(t.detach().to(dtype, copy=True) for t in tensors))

    def plain(self) -> "Layer":
        """Return a copy with what stock knows of it."""
        copy = self.to(self.weight.dtype)
        return replace(copy, tol=0.0, scale=1.0, bound=None, detach_sigma=False)


@dataclass
class Outcome:
    """What stock gives for one layer; ``weight`` is in the graph of the layer's weight."""

    weight: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor


def forward(layer: Layer, update: bool = True) -> Outcome:
    """Run stock's own code on a copy of the layer's vectors."""
    u, v = layer.u.clone(), layer.v.clone()
    if layer.order == "u_first":
        module = _SpectralNorm.__new__(_SpectralNorm)  # its constructor would iterate 15 times
        nn.Module.__init__(module)
        module.dim, module.eps = layer.dim, layer.eps
        module.n_power_iterations = layer.n_power_iterations
        module.register_buffer("_u", u)
        module.register_buffer("_v", v)
        normalized = module.train(update)(layer.weight)
    else:
        hook = SpectralNorm("weight", layer.n_power_iterations, layer.dim, layer.eps)
        holder = nn.Module()
        holder.weight_orig, holder.weight_u, holder.weight_v = layer.weight, u, v
        normalized = hook.compute_weight(holder, do_power_iteration=update)
    matrix = layer.weight.movedim(layer.dim, 0).reshape(u.numel(), v.numel())
    sigma = torch.dot(u, matrix @ v)
    if layer.bound is not None or layer.scale != 1 or layer.detach_sigma:
        normalized = layer.weight * target(layer, sigma)
    return Outcome(normalized, sigma.detach(), u, v)


def target(layer: Layer, sigma: Tensor) -> Tensor:
    """Return the factor of a weight for a target that stock does not have, in stock's words."""
    if layer.detach_sigma:
        sigma = sigma.detach()
    if layer.bound is None:
        return layer.scale / sigma
    return 1 / torch.where(sigma > layer.bound, sigma / layer.bound, 1)


def iterate(layer: Layer) -> tuple[int, float]:
    """Count the steps that a layer makes by its definition, with vectors; and the last residual.

    Stock makes a step from the ``v`` (v_first: the ``u``) that it has to the next pair. The old vector
    and the new one of the other side miss being a pair by ``‖Mᵀu − ‖Mv‖v‖`` (v_first: ``‖Mv − ‖Mᵀu‖u‖``).
    """
    matrix = layer.weight.movedim(layer.dim, 0).reshape(layer.u.numel(), layer.v.numel())
    one = replace(layer.plain(), n_power_iterations=1)
    residual = float("nan")
    for step in range(1, layer.n_power_iterations + 1):
        outcome = forward(one)
        if layer.order == "u_first":
            missed = matrix.mT @ outcome.u - (matrix @ one.v).norm() * one.v
        else:
            missed = matrix @ outcome.v - (matrix.mT @ one.u).norm() * one.u
        residual = (missed.norm() / outcome.sigma).item()
        one = one.with_tensors(one.weight, outcome.u, outcome.v)
        if layer.tol > 0 and residual <= layer.tol:
            return step, residual
    return layer.n_power_iterations, residual


def error(value: Tensor, truth: Tensor) -> float:
    """Return the relative error in the 2-norm; infinite if a value is missing or not finite."""
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    difference = torch.linalg.vector_norm(value.detach().double() - truth.detach())
    scale = torch.linalg.vector_norm(truth.detach())
    relative = (difference / scale if scale > 0 else difference).item()
    return relative if relative == relative else float("inf")


def check(what: str, value: Tensor, stock: Tensor, truth: Tensor, scale: float = 0.0) -> None:
    """Assert the tolerance rule; ``scale`` is the size of terms that cancel in the truth."""
    # In float64 the truth has the same rounding errors as what is measured.
    floor = 1e-12 if stock.dtype == torch.float64 else ROUNDINGS * torch.finfo(stock.dtype).eps
    size = truth.detach().norm().item()
    relative = 1.0 if size == 0 else max(1.0, scale / size)
    found, allowed = error(value, truth), 2 * error(stock, truth) + floor * relative
    if size == 0:
        allowed = 2 * error(stock, truth) + floor * scale
    assert found <= allowed, f"{what}: error {found:.2e}, allowed {allowed:.2e}"
