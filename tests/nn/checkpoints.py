"""A block of normalized layers with checkpoints and without, to be compared."""

import pytest
import torch
from nets import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectral_ext


class Plain:
    """Calls in place of checkpoints."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, function, *arguments):
        return function(*arguments)


class Checkpoints:
    def __init__(self, reentrant, **options):
        self.options = {"use_reentrant": reentrant, **options}

    def __call__(self, function, *arguments):
        return checkpoint(function, *arguments, **self.options)


WIDTH = 6
both = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
kinds = pytest.mark.parametrize("kind", ["fused", "alone"])


def slow(layer):
    """Give a layer singular values so close to each other that ``u`` and ``v`` move for long."""
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(layer.weight)[0])
        layer.weight.mul_(torch.linspace(0.97, 1, WIDTH)[:, None])
    return layer


class Cell(nn.Module):
    """Two normalized layers in a block that ``block`` runs."""

    def __init__(self, block, norm=spectral_ext.spectral_norm, **settings):
        super().__init__()
        layers = [slow(nn.Linear(WIDTH, WIDTH, dtype=torch.float64)) for _ in range(2)]
        for layer in layers:
            norm(layer, **settings)
        self.body = nn.Sequential(layers[0], nn.Tanh(), layers[1])
        self.block = block

    def forward(self, x):
        return self.block(self.body, x)


def cell(kind, block, norm=spectral_ext.spectral_norm, fuse=None, **settings):
    torch.manual_seed(0)
    model = Cell(block, norm, **settings)
    if kind == "fused":
        spectral_ext.fuse(model, **(fuse or {}))
    return model


def sample(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def assert_same(found, expected):
    """Compare gradients and vectors of two models."""
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    for (name, parameter), other in pairs:
        assert_close(parameter.grad, other.grad, name)
    for (name, buffer), other in zip(found.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def compare(kind, reentrant, run, make_cell=cell, options=(), **settings):
    """Run a model with checkpoints and one without, and compare them."""
    models = []
    for block in (Plain(), Checkpoints(reentrant, **dict(options))):
        model = make_cell(kind, block, **settings)
        run(model, block)
        models.append(model)
    assert_same(models[1], models[0])
