"""What ``update="step"`` and ``"manual"`` keep from one forward to the next, and when they must not."""

import copy
import itertools
import sys

import pytest
import torch
from nets import OURS, assert_close, inputs, make
from torch import nn
from torch.nn.utils import spectral_norm

import spectral_ext


def fused(backend, update):
    net = make(OURS["u_first"])
    return net, spectral_ext.fuse(net, update=update, backend=backend)


@pytest.mark.parametrize("update", ["step", "manual"])
def test_weights_that_are_swapped_through_data_are_seen_in_evaluation(update, backend):
    """As libraries do that keep a moving average; nothing shows it."""
    net, _ = fused(backend, update)
    net(inputs())
    parameters = list(net.parameters())
    trained = [p.detach().clone() for p in parameters]
    for modes in ([False], [False, True], [True, False]):
        for swapped in ([torch.randn_like(p) for p in parameters], trained):
            for training in modes:
                net.train(training)(inputs(1))
            for p, value in zip(parameters, swapped, strict=True):
                p.data.copy_(value)
            net.eval()
            expected = spectral_ext.bake(net)
            assert_close(net(inputs()), expected(inputs()), f"{modes}")


@pytest.mark.parametrize("update", ["step", "manual"])
@pytest.mark.parametrize("training", [True, False])
def test_a_change_of_a_normalized_weight_ends_with_its_forward(update, training, backend):
    class Clipped(nn.Linear):
        clips = False

        def forward(self, x):
            weight = self.weight
            if self.clips:
                with torch.no_grad():
                    weight.clamp_(-0.1, 0.1)
            return nn.functional.linear(x, weight, self.bias)

    net = nn.Sequential(spectral_ext.spectral_norm(Clipped(4, 4).double())).train(training)
    group = spectral_ext.fuse(net, update=update, backend=backend)
    x = torch.randn(2, 4).double()
    outputs = []
    for clips in (False, True, False):
        net[0].clips = clips
        if update == "step":
            group.warm_start()  # until another iteration changes nothing
        with torch.no_grad():
            outputs.append(net(x))
    assert not torch.allclose(outputs[1], outputs[0])
    assert_close(
        outputs[2], outputs[0], "output after a clipped one", 1e-3 if update == "step" else 1e-12
    )


MODES = [(mode, context) for mode in (True, False) for context in ("inference", "no grad", "grad")]


@pytest.mark.parametrize("update", ["forward", "step", "manual"])
@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_modes_follow_each_other_in_any_order(update, order, backend):
    contexts = {
        "inference": torch.inference_mode,
        "no grad": torch.no_grad,
        "grad": torch.enable_grad,
    }
    x = torch.randn(3, 4)
    for phases in itertools.product(MODES, repeat=2):
        torch.manual_seed(0)
        net = nn.Sequential(spectral_ext.spectral_norm(nn.Linear(4, 4), order=order), nn.Tanh())
        lone = copy.deepcopy(net)
        spectral_ext.fuse(net, update=update, backend=backend)
        for training, context in phases:
            with contexts[context]():
                y = net.train(training)(x)
            if context == "grad":
                net.zero_grad()
                y.square().sum().backward()
                assert net[0].parametrizations.weight.original.grad is not None
        lone.load_state_dict(net.state_dict())
        assert_close(net.eval()(x), lone.eval()(x), f"{phases}", 1e-5)


@pytest.mark.parametrize("update", ["step", "manual"])
def test_a_captured_forward_computes_and_leaves_nothing(update, backend, monkeypatch):
    """The replays of a CUDA graph change weights without a trace; the capture is a fake."""
    net, group = fused(backend, update)
    net(inputs())
    computed = []
    run = group._run
    monkeypatch.setattr(group, "_run", lambda *args: computed.append(1) or run(*args))
    net(inputs())
    assert not computed
    capturing = True
    monkeypatch.setattr(sys.modules[type(group).__module__], "is_capturing", lambda _: capturing)
    net(inputs())
    assert len(computed) == 1, "the captured forward did not compute"
    capturing = False
    net(inputs())
    assert len(computed) == 2, "a forward took what an earlier one left, after a capture"


@pytest.mark.parametrize("what", [None, "weight_orig", "weight_u", "weight_v"])
def test_a_change_after_the_first_forward_of_hook_layers_is_seen(what, backend):
    """Layers are on trial in that forward, and take its vectors over when they are called."""
    net = nn.Sequential(*(spectral_norm(nn.Linear(4, 4).double()) for _ in range(2)))
    spectral_ext.fuse(net, update="step", backend=backend)
    x = torch.randn(2, 4).double()
    net(x)
    before = net[1].weight_u.clone()
    if what is not None:
        with torch.no_grad():
            changed = getattr(net[0], what)
            changed.copy_(nn.functional.normalize(torch.randn_like(changed), dim=0))
    output = net(x)
    assert torch.equal(net[1].weight_u, before) is (what is None)
    assert_close(output, spectral_ext.bake(net)(x), "output")


def test_a_first_forward_in_inference_mode_serves_the_next_one(backend):
    """Of layers with PyTorch's hook, whose first forward advances copies of u and v."""
    net = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 4)))
    spectral_ext.fuse(net, update="step", backend=backend)
    x = torch.randn(2, 4)
    with torch.inference_mode():
        net(x)
    u = net[0].weight_u.clone()
    net(x).sum().backward()
    assert torch.equal(net[0].weight_u, u)
