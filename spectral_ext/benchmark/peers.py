"""The ways to normalize all layers of a model that are compared: stock's, others', ours.

All start from the same weights, ``u`` and ``v``. They share the memory of the weights, which nothing here
changes.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .. import backends
from ..nn import fuse
from ..nn.kept import Update
from ..reference import Order
from .models import Layer

__all__ = ["CPU_PEERS", "EPS", "GPU_PEERS", "PEERS", "Peer", "Setting", "why_not"]

EPS = 1e-12
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """How the layers are normalized, and where; ``update`` concerns ours alone."""

    n_power_iterations: int = 1
    order: Order = "u_first"
    training: bool = True
    dtype: torch.dtype = torch.float32
    update: Update = "forward"
    device: torch.device = CPU


@dataclass(frozen=True)
class Peer:
    """One way, ready to run."""

    run: Callable[[], list[Tensor]]
    """Returns all normalized weights."""
    originals: list[Tensor]
    """The weights that they are made of."""
    vectors: Callable[[], list[tuple[Tensor, Tensor]]] | None = None
    """Returns the present ``u`` and ``v``; None for a way that computes something else than a reference."""
    order: Order = "u_first"


class _Weight(nn.Module):
    """A module that has nothing but a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


class Weights(nn.Module):
    """All layers with stock's spectral norm; the forward takes every weight once.

    For ``v_first`` the spectral norm is stock's hook, which works when its module is called.
    """

    def __init__(self, layers: Sequence[Layer], setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(_Weight(layer.weight) for layer in layers)
        self.is_hooked = setting.order == "v_first"
        norm = torch.nn.utils.spectral_norm if self.is_hooked else parametrizations.spectral_norm
        for layer, module in zip(layers, self.layers, strict=True):
            norm(module, "weight", setting.n_power_iterations, EPS, layer.dim)
        if self.is_hooked:  # stock's other norm makes 15 iterations when it is made
            for _ in range(15):
                self()
        self.train(setting.training)

    def forward(self) -> list[Tensor]:
        """Return all normalized weights."""
        if self.is_hooked:
            return [layer() for layer in self.layers]
        return [layer.weight for layer in self.layers]  # type: ignore[misc]

    def originals(self) -> list[Tensor]:
        """Return the weights before normalization."""
        if self.is_hooked:
            return [layer.weight_orig for layer in self.layers]  # type: ignore[misc]
        return [layer.parametrizations.weight.original for layer in self.layers]  # type: ignore

    def vectors(self) -> list[tuple[Tensor, Tensor]]:
        """Return ``u`` and ``v`` of each layer, as they are now."""
        if self.is_hooked:
            return [(layer.weight_u, layer.weight_v) for layer in self.layers]  # type: ignore[misc]
        norms: list[Any] = [layer.parametrizations.weight[0] for layer in self.layers]  # type: ignore
        return [(norm._u, norm._v) for norm in norms]

    def peer(self, setting: Setting, run: Callable[[], list[Tensor]] | None = None) -> Peer:
        """Return this model, or what was made of it, as a way to normalize."""
        return Peer(self if run is None else run, self.originals(), self.vectors, setting.order)


def stock(layers: Sequence[Layer], setting: Setting) -> Peer:
    """Stock's spectral norm as it comes: the parametrization, or the hook for ``v_first``."""
    return Weights(layers, setting).peer(setting)


def compiled(layers: Sequence[Layer], setting: Setting) -> Peer:
    """``torch.compile`` of stock."""
    net = Weights(layers, setting)
    return net.peer(setting, torch.compile(net))


def ours(layers: Sequence[Layer], setting: Setting, backend: str | None = None) -> Peer:
    """Stock's modules after ``spectral_ext.fuse``."""
    net = Weights(layers, setting)
    fuse(net, update=setting.update, backend=backend)
    return net.peer(setting)


def ours_in_phases(layers: Sequence[Layer], setting: Setting) -> Peer:
    """Ours with a launch for each phase, instead of tickets in one."""
    peer = ours(layers, setting)

    def run() -> list[Tensor]:
        before = os.environ.get("SPECTRAL_EXT_CUDA_SCHEDULE")
        os.environ["SPECTRAL_EXT_CUDA_SCHEDULE"] = "phases"
        try:
            return peer.run()
        finally:
            if before is None:
                del os.environ["SPECTRAL_EXT_CUDA_SCHEDULE"]
            else:
                os.environ["SPECTRAL_EXT_CUDA_SCHEDULE"] = before

    return Peer(run, peer.originals, peer.vectors, peer.order)


def ours_by_triton(layers: Sequence[Layer], setting: Setting) -> Peer:
    """Ours by Triton's kernels."""
    return ours(layers, setting, backend="triton")


class _Foreach(torch.autograd.Function):
    """All layers by operations on lists: Y = W/σ, gW = (G − ⟨G,Y⟩u vᵀ)/σ."""

    @staticmethod
    def forward(
        ctx: Any,
        us: list[Tensor],
        vs: list[Tensor],
        dims: list[int],
        setting: Setting,
        *weights: Any,
    ) -> tuple[Tensor, ...]:
        matrices = [_matrix(weight, dim) for weight, dim in zip(weights, dims, strict=True)]
        sigmas = _iterate(matrices, us, vs, setting)
        normalized = torch._foreach_div(weights, sigmas)
        ctx.save_for_backward(*normalized, *torch._foreach_mul(us, 1), *torch._foreach_mul(vs, 1))
        ctx.sigmas, ctx.dims = sigmas, dims
        return tuple(normalized)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(grads)
        normalized, us, vs = saved[:count], saved[count : 2 * count], saved[2 * count :]
        products = [g.flatten().dot(y.flatten()) for g, y in zip(grads, normalized, strict=True)]
        outer = [
            torch.outer(u, v) for u, v in zip(torch._foreach_mul(us, products), vs, strict=True)
        ]
        shaped = [
            o.view(y.movedim(dim, 0).shape).movedim(0, dim)
            for o, y, dim in zip(outer, normalized, ctx.dims, strict=True)
        ]
        found = torch._foreach_sub(grads, shaped)
        torch._foreach_div_(found, ctx.sigmas)
        return (None, None, None, None, *found)


def _matrix(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).flatten(1)


def _iterate(
    matrices: list[Tensor], us: list[Tensor], vs: list[Tensor], setting: Setting
) -> list[Tensor]:
    """Make the iterations in place, and return each σ; the last half-step gives it without a product."""
    if not setting.training:
        products = [m.mv(v) for m, v in zip(matrices, vs, strict=True)]
        return [u.dot(product) for u, product in zip(us, products, strict=True)]
    norms: list[Tensor] = []
    for _ in range(setting.n_power_iterations):
        for is_u in (True, False) if setting.order == "u_first" else (False, True):
            if is_u:
                products = [m.mv(v) for m, v in zip(matrices, vs, strict=True)]
            else:
                products = [m.mT.mv(u) for m, u in zip(matrices, us, strict=True)]
            norms = list(torch._foreach_norm(products))
            divisors = torch._foreach_clamp_min(norms, EPS)
            torch._foreach_copy_(us if is_u else vs, torch._foreach_div(products, divisors))
    return norms


def foreach(layers: Sequence[Layer], setting: Setting) -> Peer:
    """A version by ``torch._foreach_*``: all layers in each operation but products, and own gradients."""
    start = Weights(layers, setting)
    weights, vectors = start.originals(), start.vectors()
    us, vs = [u for u, _ in vectors], [v for _, v in vectors]
    dims = [layer.dim for layer in layers]

    def run() -> list[Tensor]:
        return list(_Foreach.apply(us, vs, dims, setting, *weights))

    return Peer(run, weights, lambda: vectors, setting.order)


def biggan(layers: Sequence[Layer], setting: Setting) -> Peer:
    """As BigGAN-PyTorch's layers do it: one row ``u``, ``v`` anew in each pass, always ``v_first``."""
    start = Weights(layers, setting)
    weights, vectors = start.originals(), start.vectors()

    def normalized(weight: Tensor, dim: int, u: Tensor, v: Tensor) -> Tensor:
        matrix = _matrix(weight, dim)
        with torch.no_grad():
            row = u[None]
            for _ in range(setting.n_power_iterations):
                column = F.normalize(row @ matrix, eps=EPS)
                row = F.normalize(column @ matrix.mT, eps=EPS)
            if setting.training:
                u.copy_(row[0])
                v.copy_(column[0])
        return weight / (column @ matrix.mT @ row.mT).squeeze()

    def run() -> list[Tensor]:
        lists = zip(layers, weights, vectors, strict=True)
        return [normalized(weight, layer.dim, u, v) for layer, weight, (u, v) in lists]

    return Peer(run, weights, (lambda: vectors) if setting.training else None, "v_first")


def torchlip(layers: Sequence[Layer], setting: Setting) -> Peer:
    """As deel-torchlip's layers do it: stock's norm, then Björck's iteration for the other σ."""
    from deel.torchlip.utils import bjorck_norm

    net = Weights(layers, setting)
    for layer in net.layers:
        bjorck_norm(layer, name="weight", eps=1e-3)
    return Peer(net, net.originals())


def copies(layers: Sequence[Layer], setting: Setting) -> Peer:
    """``copy_`` of every weight into a tensor that is there: one read and one write."""
    sources = [layer.weight for layer in layers]
    targets = [torch.empty_like(source) for source in sources]

    def run() -> list[Tensor]:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return targets

    return Peer(run, sources)


def reads(layers: Sequence[Layer], setting: Setting) -> Peer:
    """The norm of every weight: one read, by the fastest of torch's reductions."""
    weights = [layer.weight for layer in layers]
    return Peer(lambda: [weight.norm() for weight in weights], weights)


Make = Callable[[Sequence[Layer], Setting], Peer]
#: The peers by name; ``graphed`` is added to some of these on a GPU.
PEERS: dict[str, Make] = {
    "stock": stock,
    "compiled": compiled,
    "foreach": foreach,
    "biggan": biggan,
    "torchlip": torchlip,
    "ours": ours,
    "ours phases": ours_in_phases,
    "ours triton": ours_by_triton,
    "copy_": copies,
    "read": reads,
}


#: What is measured if nothing is said; a provider that cannot run here is left out.
CPU_PEERS = ("stock", "compiled", "foreach", "biggan", "ours", "copy_", "read")
GPU_PEERS = (
    *("stock", "stock graphed", "compiled", "compiled graphed", "foreach", "foreach graphed"),
    *("ours", "ours graphed", "ours phases graphed", "ours triton graphed", "copy_", "read"),
)


def why_not(name: str, setting: Setting) -> str | None:
    """Return why a peer cannot run here with this setting, or None."""
    if name == "torchlip" and find_spec("deel") is None:
        return "deel-torchlip is not installed"
    if name == "torchlip" and setting.order == "v_first":
        return "deel-torchlip has no norm of that order"
    if name == "torchlip" and not setting.training:
        return "deel-torchlip keeps its weights in evaluation"
    if name == "ours phases" and setting.device.type != "cuda":
        return "only CUDA kernels have phases"
    if name == "ours triton":
        if setting.device.type != "cuda":
            return "on the CPU there is only Triton's interpreter"
        return backends.unavailable("triton", setting.device)
    return None
