"""Mixed precision: the norms stay in float32, whatever torch.autocast does to the model around them."""

import contextlib
import copy

import pytest
import torch
from nets import OURS, STOCK, make
from stock import check, error
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectral_ext

HALF = [torch.bfloat16, torch.float16]


def autocast(dtype, enabled=True):
    return torch.autocast("cpu", dtype, enabled=enabled)


def all_kinds(backend=None):
    """Return a model with a layer of each kind that is computed in another way."""
    torch.manual_seed(0)
    norm = spectral_ext.spectral_norm
    net = nn.Sequential(
        norm(nn.Conv2d(2, 4, 3, padding=1), backend=backend),
        norm(nn.Conv2d(4, 4, 3, padding=1), norm="operator", input_size=(6, 6)),
        nn.Flatten(),
        norm(norm(nn.Linear(144, 6), backend=backend), "bias"),
        norm(nn.Linear(6, 6), blocks=2, order="v_first", backend=backend),
        norm(nn.Linear(6, 4), gain="sigma", backend=backend),
    )
    return net


def picture():
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_norms_are_those_without_autocast(dtype, fused, backend):
    """u, v and the weights, to the bit."""
    nets = [all_kinds(backend) for _ in range(2)]
    for net, enabled in zip(nets, (False, True), strict=True):
        if fused:
            spectral_ext.fuse(net, backend=backend)
        with autocast(dtype, enabled), torch.no_grad():
            net(picture())
    for (name, expected), found in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected), name
    with autocast(dtype), torch.no_grad():
        weights = [m.weight for m in nets[1].eval() if hasattr(m, "weight")]
    assert all(weight.dtype == torch.float32 for weight in weights)


def train(net, dtype, scaler, steps=3):
    """Return the losses and the last gradients of some steps, under autocast if a dtype is given."""
    losses = []
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(step))
        with autocast(dtype) if dtype else contextlib.nullcontext():
            y = net(x.double() if dtype is None else x)
            loss = y.square().mean()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return torch.tensor(losses, dtype=torch.float64), [p.grad for p in net.parameters()]


@pytest.mark.parametrize("autocast_weights", [False, True], ids=["cast", "direct"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_training_is_as_near_to_float64_as_stocks(dtype, autocast_weights, backend):
    """Losses and gradients after three steps; weights are cast by each layer, or written so."""
    results = []
    for kind in ("truth", "stock", "ours"):
        net = make(STOCK["u_first"])
        if kind != "truth":
            net.float()
        if kind == "ours":
            spectral_ext.fuse(net, backend=backend, autocast=autocast_weights)
        scaler = torch.amp.GradScaler("cpu", 2.0**10, enabled=kind != "truth")
        results.append(train(net, None if kind == "truth" else dtype, scaler))
    truth, stock, ours = results
    assert error(ours[0], truth[0]) <= 2 * error(stock[0], truth[0]) + torch.finfo(dtype).eps
    for i, (found, other, expected) in enumerate(zip(ours[1], stock[1], truth[1], strict=True)):
        assert found.dtype == torch.float32
        check(f"gradient {i}", found, other.to(dtype), expected)


def test_the_weights_are_written_in_the_dtype_of_autocast(backend):
    net = make(OURS["u_first"], OURS["v_first"], dtype=torch.float32)
    group = spectral_ext.fuse(net, backend=backend, autocast=True)
    for training in (True, False):
        net.train(training)
        plain = copy.deepcopy(net)
        spectral_ext.group_of(plain).autocast = False
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                autocast(torch.bfloat16),
                group.normalized(),
                spectral_ext.group_of(plain).normalized(),
            ):
                pairs = list(zip(weights(net), weights(plain), strict=True))
        for narrow, wide in pairs:
            assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())
        with group.normalized():  # outside of autocast
            assert net.head.weight.dtype == torch.float32
        assert net.head.weight.dtype == torch.float32  # outside of a forward
        assert group.sigmas.dtype == torch.float32


def weights(net):
    return [layer.weight for layer in (net.conv, net.up, net.body[0], net.body[2], net.head)]


def one_step(net, call, dtype=torch.bfloat16):
    net.zero_grad()
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with autocast(dtype):
        call(x).float().square().mean().backward()
    return [p.grad.clone() for p in net.parameters()] + [b.clone() for b in net.buffers()]


def test_checkpoints_kept_weights_and_buckets_under_autocast(backend):
    """Each takes another way to the weights, and gives the same gradients."""
    expected = None
    for settings in ({}, {"bucket_mb": 1e-4}, {"update": "step"}):
        net = make(STOCK["u_first"], dtype=torch.float32)
        group = spectral_ext.fuse(net, backend=backend, autocast=True, **settings)
        found = one_step(net, net)
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b)
        if settings.get("update"):
            with group.normalized():  # what was kept has another dtype
                assert net.head.weight.dtype == torch.float32
    for whole in (True, False):
        net = make(STOCK["u_first"], dtype=torch.float32)
        spectral_ext.fuse(net, backend=backend, autocast=True)
        if whole:
            found = one_step(net, lambda x, net=net: checkpoint(net, x, use_reentrant=False))
        else:
            body = net.body.forward
            net.body.forward = lambda x, body=body: checkpoint(body, x, use_reentrant=False)
            found = one_step(net, net)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("autocast_weights", [False, True], ids=["cast", "direct"])
def test_compiled(autocast_weights, backend):
    torch._dynamo.reset()
    nets = [make(STOCK["u_first"], dtype=torch.float32) for _ in range(2)]
    for net in nets:
        spectral_ext.fuse(net, backend=backend, autocast=autocast_weights)
    expected = one_step(nets[0], nets[0])
    found = one_step(nets[1], torch.compile(nets[1], fullgraph=True, backend="aot_eager"))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and error(a, b.double()) < 2**-7
    torch._dynamo.reset()
