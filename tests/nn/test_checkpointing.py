"""Activation checkpointing of any block: the gradients of a model without it, and u, v advance once."""

import pytest
import torch
from nets import OURS, STOCK, Net, assert_same_state, inputs, make
from torch.utils.checkpoint import checkpoint

import spectral_ext


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        x = self.up(torch.tanh(self.conv(x))).flatten(1)
        x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return checkpoint(self.head, x, use_reentrant=self.reentrant)


def models(kind, reentrant, backend, **settings):
    """Return stock without checkpoints and a model with them, of one seed."""
    plain = make(STOCK["u_first"])
    net = make((OURS if kind == "alone" else STOCK)["u_first"])
    net.__class__ = type("Checkpointed", (Checkpointed,), {"reentrant": reentrant})
    if kind == "fused":
        spectral_ext.fuse(net, backend=backend, **settings)
    for module in net.modules():
        if isinstance(module, spectral_ext.nn.SpectralNorm):
            module.backend = backend
    return plain, net


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["fused", "alone"])
def test_gradients_and_vectors_are_as_without(kind, training, reentrant, backend):
    plain, net = models(kind, reentrant, backend)
    for model in (plain, net):
        model.train(training)
        model(inputs()).square().sum().backward()
    assert_same_state(net, plain)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["fused", "alone"])
def test_each_forward_is_recomputed_with_its_own_vectors(kind, reentrant, backend):
    """Two forwards before the backward, as of a discriminator; their vectors differ."""
    plain, net = models(kind, reentrant, backend)
    for model in (plain, net):
        losses = [model(inputs(i)).square().sum() for i in range(2)]
        with torch.no_grad():
            model(inputs(2))
        losses[1].backward()
        losses[0].backward()
    assert_same_state(net, plain)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_with_weights_that_are_kept(reentrant, backend):
    plain, net = models("fused", reentrant, backend, update="step")
    plain(inputs()).square().sum().backward()
    for parameter in plain.parameters():
        parameter.grad = 2 * parameter.grad
    for loss in [net(inputs()).square().sum() for _ in range(2)]:
        loss.backward()
    assert_same_state(net, plain)
