"""Conversions and loading that swap tensors, as ``torch.__future__`` has it."""

import pytest
import torch
from nets import assert_close
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext

NORMS = {
    "parametrization": parametrizations.spectral_norm,
    "hook": hook_spectral_norm,
    "ours": spectral_ext.spectral_norm,
}
CALLS = [{}, {"update": "step"}, {"update": "manual"}, {"bucket_mb": 1}, {"check_finite": True}]


@pytest.fixture(autouse=True)
def flag():
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def swaps():
    torch.__future__.set_swap_module_params_on_conversion(True)


def x(dtype=torch.float32):
    return torch.ones(2, 3, dtype=dtype)


def model(norm, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(NORMS[norm](nn.Linear(3, 4)))
    return net, spectral_ext.fuse(net, **settings)


def is_right(net):
    """Compare with the formula, in evaluation."""
    net.eval()
    layer = net[0]
    norm = layer.parametrizations.weight[0]
    w, u, v = layer.parametrizations.weight.original, norm._u, norm._v
    dtype = w.dtype
    expected = x(dtype) @ (w / (u.to(dtype) @ w @ v.to(dtype))).T + layer.bias
    assert_close(net(x(dtype)), expected, "output", 1e-5)


@pytest.mark.parametrize("before", [True, False], ids=["flag first", "forward first"])
@pytest.mark.parametrize("settings", CALLS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_conversion_and_loading_after_a_forward(norm, settings, before, backend):
    if before:
        swaps()
    net, _ = model(norm, backend=backend, **settings)
    net(x()).sum().backward()
    net.zero_grad()
    swaps()
    net.double()
    assert all(p.dtype == torch.float64 for p in net.parameters())
    is_right(net)
    net.train()
    net(x(torch.float64)).sum().backward()
    net.zero_grad()
    state = {k: 2 * v if "original" in k else v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    is_right(net)
    assert torch.equal(
        net[0].parametrizations.weight.original, state["0.parametrizations.weight.original"]
    )


@pytest.mark.parametrize("assigned", [True, False])
@pytest.mark.parametrize("norm", ["parametrization", "ours"])
def test_assignment_and_removal_after_a_forward(norm, assigned, backend):
    net, _ = model(norm, backend=backend)
    net(x()).sum().backward()
    net.zero_grad()
    swaps()
    if assigned:
        net[0].weight = torch.eye(4, 3)
        is_right(net)
    parametrize.remove_parametrizations(net[0], "weight")
    net(x())
