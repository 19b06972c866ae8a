"""The spectral norms of other projects, written from what they compute; for tests of our equals.

The projects are no packages. Names, arguments and buffers are theirs, the code is not.
"""

import math
import sys
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "SNConv2d",
    "SNEmbedding",
    "SNLinear",
    "modules",
    "spectral_norm_conv",
    "spectral_norm_fc",
]


class _Biggan(nn.Module):
    """ajbrock/BigGAN-PyTorch: rows ``u0, u1, …`` follow as many pairs, each orthogonal to those before.

    A step takes ``v`` from ``u``, then ``u`` from ``v``. Evaluation makes one, too, and does not keep it.
    """

    weight: Tensor

    def start(self, num_svs: int, num_itrs: int, eps: float) -> None:
        self.num_svs, self.num_itrs, self.eps = num_svs, num_itrs, eps
        for i in range(num_svs):
            self.register_buffer(f"u{i}", torch.randn(1, len(self.weight)))
            self.register_buffer(f"sv{i}", torch.ones(1))

    def normalized(self) -> Tensor:
        matrix = self.weight.flatten(1)
        for _ in range(self.num_itrs):
            lefts, rights, sigmas = [], [], []
            for i in range(self.num_svs):
                kept = getattr(self, f"u{i}")
                with torch.no_grad():
                    rights.append(self.next(kept[0] @ matrix, rights))
                    lefts.append(self.next(matrix @ rights[-1], lefts))
                    if self.training:
                        kept[0] = lefts[-1]
                sigmas.append(lefts[-1] @ matrix @ rights[-1])
                if self.training:
                    getattr(self, f"sv{i}").fill_(sigmas[-1].detach())
        return self.weight / sigmas[0]

    def next(self, vector: Tensor, before: list[Tensor]) -> Tensor:
        for other in before:
            vector = vector - (vector @ other) * other
        return F.normalize(vector, dim=0, eps=self.eps)


class SNConv2d(nn.Conv2d, _Biggan):
    def __init__(self, *shape, num_svs=1, num_itrs=1, eps=1e-12, **settings) -> None:
        super().__init__(*shape, **settings)
        self.start(num_svs, num_itrs, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalized(), self.bias)


class SNLinear(nn.Linear, _Biggan):
    def __init__(self, *shape, num_svs=1, num_itrs=1, eps=1e-12, **settings) -> None:
        super().__init__(*shape, **settings)
        self.start(num_svs, num_itrs, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized(), self.bias)


class SNEmbedding(nn.Embedding, _Biggan):
    def __init__(self, *shape, num_svs=1, num_itrs=1, eps=1e-12, **settings) -> None:
        super().__init__(*shape, **settings)
        self.start(num_svs, num_itrs, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.normalized())


class _Due:
    """y0ast/DUE: before each forward ``weight = weight_orig / max(1, σ / coeff)``, by ``v`` first.

    ``apply`` and ``transpose`` are the linear map of the weight and its adjoint, of flat vectors.
    """

    def __init__(self, coeff, n_power_iterations, eps, apply, transpose) -> None:
        self.coeff, self.steps, self.eps = coeff, n_power_iterations, eps
        self.apply, self.transpose = apply, transpose

    def register(self, module: nn.Module, rows: int, columns: int) -> nn.Module:
        weight = module._parameters.pop("weight")
        module.register_parameter("weight_orig", weight)
        module.weight = weight.detach()
        for name, size in (("u", rows), ("v", columns)):
            vector = F.normalize(torch.randn(size), dim=0, eps=self.eps)
            module.register_buffer(f"weight_{name}", vector)
        module.register_buffer("weight_sigma", torch.ones(1))
        module.register_forward_pre_hook(self)
        return module

    def __call__(self, module: nn.Module, inputs: object) -> None:
        weight, u, v = module.weight_orig, module.weight_u, module.weight_v
        if module.training:
            with torch.no_grad():
                for _ in range(self.steps):
                    v.copy_(F.normalize(self.transpose(weight, u), dim=0, eps=self.eps))
                    u.copy_(F.normalize(self.apply(weight, v), dim=0, eps=self.eps))
        sigma = u.clone() @ self.apply(weight, v.clone())
        module.weight_sigma.fill_(sigma.detach())
        module.weight = weight / (sigma / self.coeff).clamp_min(1)


def spectral_norm_fc(module, coeff, n_power_iterations=1, eps=1e-12):
    def apply(weight: Tensor, v: Tensor) -> Tensor:
        return weight.flatten(1) @ v

    def transpose(weight: Tensor, u: Tensor) -> Tensor:
        return weight.flatten(1).mT @ u

    rows = len(module.weight)
    norm = _Due(coeff, n_power_iterations, eps, apply, transpose)
    return norm.register(module, rows, module.weight.numel() // rows)


def spectral_norm_conv(module, coeff, input_dim, n_power_iterations=1, eps=1e-12):
    settings = {"stride": module.stride, "padding": module.padding}
    output_dim = F.conv2d(torch.zeros(1, *input_dim), module.weight, **settings).shape[1:]

    def apply(weight: Tensor, v: Tensor) -> Tensor:
        return F.conv2d(v.view(1, *input_dim), weight, **settings).flatten()

    def transpose(weight: Tensor, u: Tensor) -> Tensor:
        output = u.view(1, *output_dim)
        return nn.grad.conv2d_input((1, *input_dim), weight, output, **settings).flatten()

    norm = _Due(coeff, n_power_iterations, eps, apply, transpose)
    return norm.register(module, math.prod(output_dim), math.prod(input_dim))


def modules() -> dict[str, ModuleType]:
    """Return what `sys.modules` needs so that code imports them from where the projects have them."""
    here, due = sys.modules[__name__], ModuleType("due")
    due.layers = here
    return {"layers": here, "due": due, "due.layers": here}
