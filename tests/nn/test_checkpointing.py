"""Activation checkpointing of any block: the gradients of a model without it, and u, v advance once."""

import pytest
import torch
from nets import OURS, STOCK, Net, assert_close, assert_same_state, inputs, make
from torch import nn
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


def test_blocks_and_gains_are_recomputed_with_their_own_vectors(backend):
    """Beside a plain layer, in one group; the backward of the first forward comes last."""
    nets = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        settings = ({"blocks": 2, "bound": 0.2}, {}, {"gain": "one"})
        layers = [nn.Linear(6, 6, dtype=torch.float64) for _ in settings]
        pairs = zip(layers, settings, strict=True)
        net = nn.Sequential(*(spectral_ext.spectral_norm(x, **s) for x, s in pairs))
        group = spectral_ext.fuse(net, backend=backend)
        xs = [torch.randn(3, 6, dtype=torch.float64) for _ in range(2)]
        losses = []
        for x in xs:
            with group.normalized():
                run = nn.Sequential.forward.__get__(net)
                y = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
            losses.append(y.square().sum())
        losses[1].backward()
        losses[0].backward()
        nets.append(net)
    for found, expected in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        assert_close(found.grad, expected.grad)
    for found, expected in zip(nets[1].buffers(), nets[0].buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_the_whole_model_in_a_checkpoint(reentrant, update, backend):
    plain, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    spectral_ext.fuse(net, backend=backend, update=update)
    for model in (plain, net):
        xs = [inputs(i).requires_grad_() for i in range(2)]
        if model is plain and update == "step":
            model(xs[0])
            model.eval()
        run = model if model is plain else lambda x: checkpoint(net, x, use_reentrant=reentrant)
        losses = [run(x).square().sum() for x in xs]
        losses[1].backward()
        losses[0].backward()
    assert_same_state(net, plain)
