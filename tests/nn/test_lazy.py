"""Lazy modules with a spectral norm: state dicts before the first forward, copies, second norms."""

import copy
import pickle

import pytest
import torch
from torch import nn

import spectral_ext

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules")

SETTINGS = {
    "plain": {},
    "v_first": {"order": "v_first"},
    "gain": {"gain": "sigma_per_channel"},
    "blocks": {"blocks": 2},
}
COPIES = {
    "same": lambda net: net,
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
}


def net_of(settings):
    linear = spectral_ext.spectral_norm(nn.LazyLinear(8), **settings)
    conv = spectral_ext.spectral_norm(nn.LazyConvTranspose1d(4, 3), **settings)
    return nn.Sequential(linear, nn.ReLU(), nn.Unflatten(1, (2, 4)), conv)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("assign", [False, True])
def test_the_state_dict_of_a_normalized_module_loads_before_the_first_forward(
    settings, copied, assign
):
    torch.manual_seed(0)
    x, first = torch.randn(2, 6), net_of(settings)
    for _ in range(3):
        first(x)
    saved = {key: value.clone() for key, value in first.state_dict().items()}
    second = net_of(settings)
    assert str(second.load_state_dict(first.state_dict(), assign=assign)).startswith("<All keys")
    second = copied(second)
    for net in (first, second):
        net.eval()
    torch.testing.assert_close(second(x), first(x), rtol=0, atol=0)
    assert second.state_dict().keys() == saved.keys()
    for key, value in second.state_dict().items():
        assert torch.equal(value, saved[key]), key
    for net in (first, second):
        net.train()
    torch.testing.assert_close(second(x), first(x), rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in second.modules())
    assert not any(module._load_state_dict_pre_hooks for module in second.modules())


def test_a_state_dict_without_a_norm_loads_too():
    plain, lazy = nn.Sequential(nn.Linear(6, 8)), nn.Sequential(nn.LazyLinear(8))
    spectral_ext.spectral_norm(lazy[0])
    lazy.load_state_dict(plain.state_dict())
    lazy(torch.randn(2, 6))
    assert torch.equal(lazy[0].parametrizations.weight.original, plain[0].weight)


def test_a_tensor_of_another_model_is_named():
    saved = spectral_ext.spectral_norm(nn.Linear(6, 8), gain="one").state_dict()
    lazy = spectral_ext.spectral_norm(nn.LazyLinear(8))
    lazy.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="gain"):
        lazy(torch.randn(2, 6))


def test_a_lazy_module_gets_one_norm_only():
    model = nn.Sequential(nn.LazyLinear(8))
    assert spectral_ext.apply_spectral_norm(model).normalized == ("0.weight",)
    again = spectral_ext.apply_spectral_norm(model)
    assert again.normalized == () and "first forward" in again.skipped["0.weight"]
    with pytest.raises(RuntimeError, match="two spectral norms"):
        spectral_ext.spectral_norm(model[0], order="v_first")
    model(torch.randn(2, 6))
    assert len(model[0].parametrizations.weight) == 1
