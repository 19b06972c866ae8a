"""A small model of four units, whose weights do not divide by the number of ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext

# The normalized layers, by name, and the settings that stock has too.
LAYERS: dict[str, dict[str, Any]] = {
    "stem": {},
    "blocks.0.0": {"n_power_iterations": 2},  # transposed: its rows are of dimension 1
    "blocks.1.1": {"eps": 1e-6},
    "blocks.2.0": {"n_power_iterations": 3},
    "blocks.2.2": {},
}
# What each layer of the list may have beyond stock.
EXTENDED: list[dict[str, Any]] = [
    {"tol": 1e-2, "max_power_iterations": 4},
    {"scale": 2.0},
    {"bound": 0.5},
    {"gain": "one_per_channel"},
    {"detach_sigma": True},
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(5, 3, 2), nn.Tanh()),
                nn.Sequential(nn.Flatten(), nn.Linear(75, 7), nn.Tanh()),
                nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x


def ours(module: nn.Module, **settings: Any) -> None:
    spectral_ext.spectral_norm(module, **settings)


def ours_v_first(module: nn.Module, **settings: Any) -> None:
    spectral_ext.spectral_norm(module, order="v_first", **settings)


KINDS: dict[str, Callable[..., Any]] = {
    "u_first": ours,
    "v_first": ours_v_first,
    "stock": parametrizations.spectral_norm,
    "hook": hook_spectral_norm,
}


def make(
    *kinds: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    more: Sequence[dict[str, Any]] = ({},),
) -> Net:
    """Return a net whose layers are normalized by the given kinds, and with more settings, in turn."""
    torch.manual_seed(seed)
    net = Net().to(dtype)
    for i, (name, settings) in enumerate(LAYERS.items()):
        KINDS[kinds[i % len(kinds)]](net.get_submodule(name), **settings, **more[i % len(more)])
    return net


def batch(size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, 6, 6, dtype=dtype, generator=generator)


def whole(tensor: Any) -> Tensor:
    """Return a tensor that may be distributed as a whole."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def vectors(net: nn.Module) -> dict[str, Tensor]:
    """Return u and v of all layers by name."""
    return {
        key: value.detach().clone()
        for key, value in net.named_buffers()
        if key[-2:] in ("_u", "_v")
    }


def state(net: nn.Module) -> dict[str, Tensor]:
    """Return parameters, gradients and vectors of all layers, whole."""
    found = {key: whole(parameter) for key, parameter in net.named_parameters()}
    for key, parameter in net.named_parameters():
        if parameter.grad is not None:
            found[f"{key} grad"] = whole(parameter.grad)
    return found | vectors(net)


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10, floor: float = 1e-3
) -> None:
    """Assert that tensors differ by at most ``rtol`` of their largest value, or of ``floor``."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, value in expected.items():
        difference = (found[key] - value).abs().max().item()
        size = max(value.abs().max().item(), floor)
        assert difference <= rtol * size, f"{key}: {difference:.2e} of {size:.2e}"
