"""An interrupt at any call of a forward leaves nothing in force: not of the model, not of the thread."""

import sys
from pathlib import Path

import pytest
import torch
from nets import assert_close
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext

PACKAGE = str(Path(spectral_ext.__file__).parent)
NORMS = {"parametrization": parametrizations.spectral_norm, "hook": hook_spectral_norm}


def active():
    return sys.modules["spectral_ext.nn.active"].active


def x():
    return torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Interrupts:
    """Raises KeyboardInterrupt at one of the calls in the package: CPython looks for signals there.

    A call by CPython of a special method, such as ``__exit__``, is one, too.
    """

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls += 1
            if self.calls == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def run_by_the_root(net, group):
    return net(x())


def run_by_hand(net, group):
    with group.normalized():
        return net[2](torch.tanh(net[0](x())))


# An interrupt while a generator or an entry is thrown away is told as a warning, and goes nowhere.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("run", [run_by_the_root, run_by_hand])
def test_nothing_is_in_force_after_an_interrupt(run, norm, update):
    torch.manual_seed(0)
    net = nn.Sequential(*(NORMS[norm](nn.Linear(4, 4).double()) for _ in "ab"))
    net.insert(1, nn.Tanh())
    group = spectral_ext.fuse(net, update=update)
    interrupted = 0
    for at in range(1, 500):
        with Interrupts(at) as interrupts:
            try:
                run(net, group)
            except KeyboardInterrupt:
                interrupted += 1
        if interrupts.calls < at:
            break
        assert active().record is None, f"call {at}"
        assert group.visible.record is None, f"call {at}"
    assert interrupted > 10
    net.train()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.parametrizations.weight.original.mul_(torch.rand(4, 4))
    for _ in range(200):
        net(x())
    net.eval()
    lone = net[2](torch.tanh(net[0](x())))
    assert_close(net(x()), lone, "output", 1e-9)
