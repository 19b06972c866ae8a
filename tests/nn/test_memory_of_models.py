"""Memory of fused models: the peak of a step, what stays from step to step, what stays of a group."""

import ctypes
import gc
import math
import sys
import weakref
from pathlib import Path

import pytest
import samples
import torch
from nets import STOCK, assert_same_state, inputs, make
from torch import nn
from torch.nn.utils import parametrizations

import spectral_ext
from spectral_ext.benchmark.memory import peak_bytes
from spectral_ext.nn import dynamic_class, kept


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)
def test_forward_and_backward_of_a_large_model_peak_below_stock():
    ours, stock = (peak_bytes("biggan128_D_ch96", name) for name in ("ours", "stock"))
    shapes = samples.MODELS["biggan128_D_ch96"]
    least = 8 * sum(
        math.prod(layer["shape"]) for layer in shapes
    )  # the weights and their gradients
    assert least <= ours <= stock, f"of the least: {ours / least:.3f}, stock {stock / least:.3f}"


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform != "linux", reason="the resident size is read from Linux's /proc")
@pytest.mark.parametrize(
    "settings", [{}, {"update": "step"}, {"bucket_mb": 0.1, "check_finite": True}], ids=str
)
def test_a_thousand_steps_do_not_grow(settings, backend):
    """A step that kept its vectors would keep 64 KiB, 64 MiB in all."""
    if backend == "triton":
        pytest.skip("a thousand steps take minutes in Triton's interpreter")
    net = nn.Sequential(nn.Linear(8192, 8), nn.Linear(8, 8192))
    for layer in net:
        parametrizations.spectral_norm(layer)
    group = spectral_ext.fuse(net, backend=backend, **settings)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    x = torch.randn(1, 8192)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            assert len(group.sigmas) == 2

    run(50)
    before, objects = resident(), len(gc.get_objects())
    run(1000)
    assert resident() - before < 8 << 20
    assert len(gc.get_objects()) - objects < 100


@pytest.mark.parametrize("update", ["forward", "step"])
def test_cycles_of_fusing_leak_nothing(update):
    net = make(STOCK["u_first"], STOCK["v_first"])
    net.__class__ = type("Own", (type(net),), {})  # no other model has its fused class
    expected = make(STOCK["u_first"], STOCK["v_first"])
    gone = []
    classes = len(dynamic_class._fused_classes)
    for _ in range(20):
        group = spectral_ext.fuse(net, update=update)
        net(inputs()).sum().backward()
        gone += [weakref.ref(group), weakref.ref(type(net))]
        norms = [layer.parametrization for layer in group.layers]
        gone += [weakref.ref(norm) for norm in norms if norm.origin == "hook"]
        norms.clear()
        del group
        spectral_ext.unfuse(net)
    gc.collect()
    assert not [x for x in gone if x() is not None]
    assert len(dynamic_class._fused_classes) <= classes + 1  # one for each class of models
    assert not kept._groups
    for _ in range(20):
        expected(inputs()).sum().backward()
    assert_same_state(net, expected)


def test_a_fused_model_is_gone_when_nobody_holds_it():
    net = make(STOCK["u_first"])
    group = spectral_ext.fuse(net, update="step")
    net(inputs()).sum().backward()
    gone = [weakref.ref(net), weakref.ref(net.conv), weakref.ref(net.conv.parametrizations)]
    del net
    gc.collect()
    assert gone[0]() is None  # a group does not hold its root
    gone += [weakref.ref(group)]
    del group
    gc.collect()
    assert not [x for x in gone if x() is not None]
