"""A small model whose layers differ in everything that a spectral norm can differ in."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook

import spectral_ext

# Layer, tensor, settings.
NORMS = [
    ("conv", "weight", {}),
    ("up", "weight", {"n_power_iterations": 2}),
    ("body.0", "weight", {"eps": 1e-6}),
    ("body.0", "bias", {}),
    ("body.2", "weight", {"dim": 1, "n_power_iterations": 3}),
    ("head", "weight", {}),
]


@contextmanager
def matrices_only() -> Iterator[None]:
    """Leave out the vector. A group without one takes a shorter way."""
    place = next(i for i, (_, name, _) in enumerate(NORMS) if name == "bias")
    vector = NORMS.pop(place)
    try:
        yield
    finally:
        NORMS.insert(place, vector)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, stride=2)
        self.up = nn.ConvTranspose2d(5, 3, 2)
        self.body = nn.Sequential(nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
        self.head = nn.Linear(6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.up(torch.tanh(self.conv(x))).flatten(1)))


def u_first(module: nn.Module, name: str, **settings: object) -> None:
    spectral_ext.spectral_norm(module, name, **settings)


def v_first(module: nn.Module, name: str, **settings: object) -> None:
    spectral_ext.spectral_norm(module, name, order="v_first", **settings)


STOCK = {"u_first": parametrizations.spectral_norm, "v_first": hook_spectral_norm}
OURS = {"u_first": u_first, "v_first": v_first}


def make(
    *kinds: Callable[..., object],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    without: Collection[int] = (),
) -> Net:
    """Return a net whose layers are normalized by the given functions in turn."""
    torch.manual_seed(seed)
    net = Net().to(dtype)
    for i, (layer, name, settings) in enumerate(NORMS):
        if i not in without:
            kinds[i % len(kinds)](net.get_submodule(layer), name, **settings)
    return net


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 2, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def hook_of(module: nn.Module, name: str) -> StockHook | None:
    hooks = module._forward_pre_hooks.values()
    return next((h for h in hooks if isinstance(h, StockHook) and h.name == name), None)


def access(module: nn.Module, name: str) -> Tensor:
    """Read a normalized tensor; stock's hook computes it before a forward only."""
    hook = hook_of(module, name)
    if hook is not None:
        hook(module, None)
    return getattr(module, name)


def remove(module: nn.Module, name: str) -> None:
    if hook_of(module, name) is not None:
        remove_spectral_norm(module, name)
    else:
        parametrize.remove_parametrizations(module, name)


def state(net: nn.Module) -> dict[str, Tensor]:
    """Weights, vectors and gradients of all layers, by one set of names for all kinds."""
    found = {}
    for layer, name, _ in NORMS:
        module = net.get_submodule(layer)
        key = f"{layer}.{name}"
        if hook_of(module, name) is not None:
            weight = getattr(module, f"{name}_orig")
            found[f"{key} u"], found[f"{key} v"] = (getattr(module, name + s) for s in ("_u", "_v"))
        elif parametrize.is_parametrized(module, name):
            weight = module.parametrizations[name].original
            for vector, tensor in module.parametrizations[name][0].named_buffers():
                found[f"{key} {vector[1:]}"] = tensor
        else:
            weight = getattr(module, name)
        found[key] = weight
        if weight.grad is not None:
            found[f"{key} grad"] = weight.grad
    return {key: tensor.detach().clone() for key, tensor in found.items()}


def assert_close(found: Tensor, expected: Tensor, what: str = "", rtol: float = 1e-12) -> None:
    assert found.shape == expected.shape, what
    difference = (found.detach() - expected.detach()).abs().max()
    scale = expected.detach().abs().max()
    assert difference <= rtol * max(scale, 1e-3), f"{what}: {difference:.2e} of {scale:.2e}"


def assert_same_state(found: nn.Module, expected: nn.Module, rtol: float = 1e-12) -> None:
    a, b = state(found), state(expected)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for key in b:
        assert_close(a[key], b[key], key, rtol)


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
