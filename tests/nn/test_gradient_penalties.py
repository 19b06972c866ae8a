"""Penalties on gradients: WGAN-GP, R1, path length. A gradient of the gradient goes by the weights.

In float64 ours is stock to rounding; in float32 the error against float64 is at most twice stock's.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from nets import STOCK, assert_close, assert_same_state, inputs, make
from stock import check
from torch import nn
from torch.nn.utils import parametrize

import spectral_ext


def wgan_gp(net):
    """Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, equation (3)."""
    real, fake = (x.to(net.head.parametrizations.weight.original.dtype) for x in pair())
    share = torch.linspace(0, 1, len(real), dtype=real.dtype).view(-1, 1, 1, 1)
    between = torch.lerp(real, fake, share).requires_grad_()
    (gradient,) = torch.autograd.grad(net(between).sum(), between, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return net(fake).mean() - net(real).mean() + 10 * penalty


def r1(net):
    """Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018, equation (9)."""
    real = pair()[0].to(net.head.parametrizations.weight.original.dtype).requires_grad_()
    scores = net(real)
    (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    return nn.functional.softplus(-scores).mean() + gradient.square().sum((1, 2, 3)).mean()


def path_length(net):
    """Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, equation (4)."""
    latent = pair()[0].to(net.head.parametrizations.weight.original.dtype).requires_grad_()
    outputs = net(latent)
    noise = torch.linspace(-1, 2, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    (gradient,) = torch.autograd.grad((outputs * noise).sum(), latent, create_graph=True)
    lengths = gradient.square().sum((1, 2, 3)).sqrt()
    return (lengths - 0.1).square().mean() + outputs.mean()


def pair():
    return inputs(0), inputs(1)


PENALTIES = [wgan_gp, r1, path_length]


def gradients(net, penalty, passes=nullcontext, steps=2):
    """Return losses and gradients of some steps of gradient descent, whose passes share a context."""
    found = []
    for _ in range(steps):
        net.zero_grad()
        with passes():
            loss = penalty(net)
            loss.backward()
        found += [loss.detach()] + [p.grad.clone() for p in net.parameters() if p.grad is not None]
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
    return found


@pytest.mark.parametrize("settings", [None, {}, {"bucket_mb": 1e-4}, {"update": "step"}], ids=str)
@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda f: f.__name__)
def test_gradients_are_stocks(penalty, settings, backend):
    """Of layers alone and of fused ones, with several forwards before a backward."""

    def ours():
        if settings is None:
            return make(partial(spectral_ext.spectral_norm, backend=backend))
        net = make(STOCK["u_first"])
        spectral_ext.fuse(net, backend=backend, **settings)
        return net

    def stocks():
        return make(STOCK["u_first"])

    # Under update="step" the passes of a step share one computation; this is what stock has for it.
    passes = parametrize.cached if (settings or {}).get("update") == "step" else nullcontext
    expected = gradients(stocks(), penalty, passes)
    for i, (found, truth) in enumerate(zip(gradients(ours(), penalty), expected, strict=True)):
        assert_close(found, truth, f"{i}", rtol=1e-10)
    results = (
        gradients(ours().float(), penalty),
        gradients(stocks().float(), penalty, passes),
    )
    for i, (found, stock, truth) in enumerate(zip(*results, expected, strict=True)):
        check(f"{i}", found, stock, truth)


def test_the_passes_of_a_step_share_one_computation(backend):
    """Under update="step" the weights are those of one iteration, in the penalty too."""
    stock, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    spectral_ext.fuse(net, backend=backend, update="step")
    for _ in range(2):
        for model in (stock, net):
            model.zero_grad()
        with parametrize.cached():  # what stock has for it
            wgan_gp(stock).backward()
        wgan_gp(net).backward()
        assert_same_state(net, stock, rtol=1e-10)
        with torch.no_grad():
            for parameter in (*stock.parameters(), *net.parameters()):
                parameter -= 0.01 * parameter.grad


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_compiled_code_has_no_double_backward(fused):
    """Torch's own limit, which it says; the model itself goes on without torch.compile."""
    net = make(STOCK["u_first"])
    if fused:
        spectral_ext.fuse(net)
    compiled = torch.compile(net, backend="aot_eager")
    x = inputs().requires_grad_()
    # With donated buffers torch refuses create_graph=True before it comes to a second derivative.
    with torch._functorch.config.patch(donated_buffer=False):
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.square().sum().backward()
    assert r1(net).isfinite()
