"""copy, pickle and torch.save of whole models, in this process and into another one."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import OURS, STOCK, Net, equal_states, inputs, make, state
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import spectral_ext

KINDS = {
    "ours": (OURS["u_first"], OURS["v_first"]),
    "stock": (STOCK["u_first"], STOCK["v_first"]),
}


def pickled(net):
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("copied_by", [copy.deepcopy, pickled, copy.copy])
@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_a_fused_model_of_its_own(kind, after_forward, copied_by, backend):
    net = make(*KINDS[kind])
    group = spectral_ext.fuse(net, backend=backend, bucket_mb=3)
    if after_forward:
        net(inputs()).sum().backward()
        net.zero_grad()
    copied = copied_by(net)
    assert type(copied) is type(net)
    assert isinstance(copied, Net)
    assert equal_states(state(copied), state(net))
    copied_group = spectral_ext.group_of(copied)
    assert copied_group is not group
    assert (copied_group.backend, copied_group.bucket_mb) == (backend, 3)
    assert [x.qualified_name for x in copied_group.layers] == [
        x.qualified_name for x in group.layers
    ]
    if copied_by is copy.copy:  # shares its layers
        copied(inputs())
        assert equal_states(state(copied), state(net))
        return
    assert all(x.module is copied.get_submodule(x.name) for x in copied_group.layers)
    before = state(net)
    copied(inputs()).sum().backward()
    copied.zero_grad()
    assert equal_states(state(net), before)
    net(inputs())
    assert equal_states(state(copied), state(net))
    spectral_ext.unfuse(copied)
    assert type(copied) is Net
    assert len(group.layers) == len(copied_group.layers) + 6


def test_removal_from_a_copy_leaves_the_original():
    """Copies of stock's parametrized modules share a class, so there it removes from both."""
    net = spectral_ext.spectral_norm(nn.Linear(3, 2))
    for copied in (copy.deepcopy(net), pickled(net)):
        parametrize.remove_parametrizations(copied, "weight")
        assert type(copied) is nn.Linear
        assert net.weight.shape == (2, 3)
        assert parametrize.is_parametrized(net)


def test_the_parts_of_a_copy_know_its_group():
    net = make(STOCK["u_first"])
    spectral_ext.fuse(net)
    copied = copy.deepcopy(net)
    spectral_ext.fuse(copied.body)
    assert [layer.name for layer in spectral_ext.group_of(copied).layers] == ["conv", "up", "head"]
    assert len(spectral_ext.group_of(net).layers) == 6


def test_a_copied_part_leaves_its_group_behind():
    net = make(STOCK["u_first"])
    spectral_ext.fuse(net)
    part = copy.deepcopy(net.body)
    assert len(pickle.dumps(part)) < len(pickle.dumps(net))
    assert part[0].parametrizations.weight[0]._group is None
    assert len(spectral_ext.fuse(part).layers) == 3
    assert len(spectral_ext.group_of(net).layers) == 6


class Stateful(Net):
    """With its own ideas about pickling."""

    def __getstate__(self):
        return {**self.__dict__, "note": "kept"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.restored = True


class Reduced(Net):
    def __reduce__(self):
        return (Reduced, (), self.__getstate__())


@pytest.mark.parametrize("cls", [Stateful, Reduced])
@pytest.mark.parametrize("copied_by", [copy.deepcopy, pickled])
def test_the_class_of_the_model_has_its_say(cls, copied_by):
    net = make(STOCK["u_first"])
    net.__class__ = cls
    spectral_ext.fuse(net)
    copied = copied_by(net)
    assert isinstance(copied, cls)
    assert cls is not Stateful or (copied.note == "kept" and copied.restored)
    assert equal_states(state(copied), state(net))
    assert len(spectral_ext.group_of(copied).layers) == 6
    for model in (net, copied):
        model(inputs())
    assert equal_states(state(copied), state(net))


def test_layers_with_other_parametrizations():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    spectral_ext.spectral_norm(net[0])
    parametrize.register_parametrization(net[0], "bias", nn.Tanh())
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    parametrizations.orthogonal(net[1], "weight")
    spectral_ext.spectral_norm(net[1])
    spectral_ext.fuse(net)
    x = torch.ones(1, 3)
    net.eval()
    for copied_by in (copy.deepcopy, pickled):
        copied = copied_by(net)
        assert torch.equal(copied(x), net(x))
        for name in ("bias", "weight"):
            parametrize.remove_parametrizations(copied[0], name)
        assert torch.equal(copied(x), net(x))


SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
net = torch.load(sys.argv[1], weights_only=False)
from nets import inputs, state
import spectral_ext
assert len(spectral_ext.group_of(net).layers) == 6
net(inputs()).sum().backward()
net.zero_grad()
torch.save((state(net), spectral_ext.stock_state_dict(net, "hook")), sys.argv[1])
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_goes_on_in_another_process(kind, tmp_path, backend):
    net = make(*KINDS[kind])
    spectral_ext.fuse(net, backend=backend)
    net(inputs(1))
    torch.save(net, tmp_path / "net.pt")
    paths = [str(Path(__file__).parent), str(Path(spectral_ext.__file__).parents[1])]
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "net.pt", *paths], check=True)
    found, checkpoint = torch.load(tmp_path / "net.pt")
    net(inputs()).sum().backward()
    net.zero_grad()
    expected = state(net)
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(found[key], expected[key], rtol=1e-12, atol=1e-14), key
    stock = make(STOCK["v_first"], seed=1)
    stock.load_state_dict(checkpoint)
