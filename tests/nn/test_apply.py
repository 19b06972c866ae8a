"""Spectral normalization for a whole model, and the account of it."""

import pytest
import torch
from nets import OURS, Net, assert_same_state, inputs, make
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext
from spectral_ext.nn.apply import LAYER_TYPES


def test_normalizes_every_layer_as_stock_would():
    torch.manual_seed(0)
    net = Net().double()
    stock = Net().double()
    stock.load_state_dict(net.state_dict())
    torch.manual_seed(1)
    result = spectral_ext.apply_spectral_norm(net, n_power_iterations=2)
    torch.manual_seed(1)
    for module in (stock.conv, stock.up, stock.body[0], stock.body[2], stock.head):
        parametrizations.spectral_norm(module, n_power_iterations=2)
    assert result.normalized == (
        "conv.weight",
        "up.weight",
        "body.0.weight",
        "body.2.weight",
        "head.weight",
    )
    assert result.skipped == {}
    for model in (net, stock):
        model(inputs()).sum().backward()
    for a, b in zip(net.state_dict().values(), stock.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_the_types_are_those_of_the_issue():
    dims = ["1d", "2d", "3d"]
    names = ["Linear", "Embedding", *(f"{c}{d}" for c in ("Conv", "ConvTranspose") for d in dims)]
    assert {cls.__name__ for cls in LAYER_TYPES} == set(names)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_skipped_has_a_reason():
    net = nn.Sequential()
    net.normal = nn.Linear(3, 3)
    net.again = net.normal
    net.hooked = hook_spectral_norm(nn.Linear(3, 3))
    net.stock = parametrizations.spectral_norm(nn.Linear(3, 3))
    net.ours = spectral_ext.spectral_norm(nn.Linear(3, 3))
    net.lazy = nn.LazyLinear(3)
    net.norm = nn.BatchNorm1d(3)
    net.no_affine = nn.BatchNorm1d(3, affine=False)
    net.left_out = nn.Linear(3, 3)
    net.empty = nn.Conv1d(2, 0, 1)
    net.activation = nn.ReLU()
    net.table = nn.Embedding(3, 3)
    before = {name: type(module) for name, module in net.named_modules(remove_duplicate=False)}
    result = spectral_ext.apply_spectral_norm(net, exclude="^left")
    assert result.normalized == ("normal.weight", "lazy.weight", "table.weight")
    reasons = {
        "again": "the same module as normal",
        "hooked": "already normalized",
        "stock": "already normalized",
        "ours": "already normalized",
        "norm": "BatchNorm1d is not among the types",
        "no_affine": "BatchNorm1d is not among the types",
        "left_out": "excluded",
        "empty": "no elements",
    }
    assert result.skipped.keys() == {f"{name}.weight" for name in reasons}
    for name, reason in reasons.items():
        assert reason in result.skipped[f"{name}.weight"]
        assert type(net.get_submodule(name)) is before[name] or name == "again"
    text = repr(result)
    assert text.startswith("AppliedSpectralNorm(3 normalized, 8 not")
    assert "hooked.weight     skipped: already normalized" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"types": nn.Conv2d}, ("conv.weight",)),
        ({"types": [nn.Linear], "include": "body"}, ("body.0.weight", "body.2.weight")),
        ({"name": "bias", "include": "conv"}, ("conv.bias",)),
        ({"include": lambda name, module: name == "head"}, ("head.weight",)),
    ],
)
def test_selection(arguments, expected):
    net = Net()
    assert spectral_ext.apply_spectral_norm(net, **arguments).normalized == expected
    assert sum(parametrize.is_parametrized(module) for module in net.modules()) == len(expected)


def test_the_model_may_be_a_layer():
    net = nn.Linear(3, 3)
    assert spectral_ext.apply_spectral_norm(net, order="v_first").normalized == ("weight",)
    assert net.parametrizations.weight[0].order == "v_first"


def test_tied_weights_are_normalized_in_every_module():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert spectral_ext.apply_spectral_norm(net).normalized == ("0.weight", "1.weight")
    assert net[0].parametrizations.weight.original is net[1].parametrizations.weight.original


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": 3}, TypeError),
        ({"eps": -1e-12}, ValueError),
        ({"include": "typo"}, ValueError),
        ({"types": "Linear"}, TypeError),
        ({"types": [nn.Linear, 3]}, TypeError),
        ({"name": 3}, TypeError),
        ({"per_group": "no"}, TypeError),
        ({"tol": "small"}, TypeError),
        ({"n_power_iterations": -1}, ValueError),
        ({"order": "first"}, ValueError),
        ({"backend": "gpu"}, ValueError),
        ({"include": 3}, TypeError),
        ({"exclude": "("}, ValueError),
    ],
)
def test_bad_input_changes_nothing(arguments, error):
    net = Net()
    with pytest.raises(error):
        spectral_ext.apply_spectral_norm(**{"model": net, **arguments})
    assert not any(parametrize.is_parametrized(module) for module in net.modules())


def test_an_applied_model_fuses(backend):
    nets = [make(OURS["u_first"]), make(OURS["u_first"])]
    spectral_ext.fuse(nets[1], backend=backend)
    for net in nets:
        spectral_ext.apply_spectral_norm(net, name="bias", types=nn.Conv2d)
        net(inputs()).sum().backward()
    assert_same_state(nets[1], nets[0])
