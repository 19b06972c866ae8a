"""singular_values(model): the values of the SVD, and nothing left behind in the model."""

import copy

import pytest
import torch
from nets import NORMS, OURS, STOCK, Net, access, assert_close, equal_states, inputs, make, state
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import spectral_ext
from spectral_ext.nn.operator_norm import operator_norm
from spectral_ext.nn.singular_values import singular_values

KINDS = {
    "ours": (OURS["u_first"], OURS["v_first"]),
    "stock": (STOCK["u_first"], STOCK["v_first"]),
}
DIMS = {"conv": 0, "up": 1, "body.0": 0, "body.2": 1, "head": 0}


def svd(weight, dim, k):
    return torch.linalg.svdvals(weight.detach().movedim(dim, 0).flatten(1).double())[:k]


def raw_and_used(net):
    """Return by qualified name the weight before and, in evaluation, after its norm."""
    net = copy.deepcopy(net).eval()
    found = {}
    for layer, name, _ in NORMS:
        module = net.get_submodule(layer)
        used = access(module, name)
        if parametrize.is_parametrized(module, name):
            raw = module.parametrizations[name].original
        else:
            raw = getattr(module, f"{name}_orig", used)
        found[f"{layer}.{name}"] = raw, used
    return found


@pytest.mark.parametrize("use", [0, 1], ids=["raw", "normalized"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_weights(kind, fused, use):
    net = make(*KINDS[kind])
    expected = raw_and_used(net)
    if fused:
        spectral_ext.fuse(net)
    found = singular_values(net, 2, normalized=bool(use))
    assert sorted(found) == sorted(expected)
    for name, values in found.items():
        weight = expected[name][use]
        layer, _, tensor_name = name.rpartition(".")
        if tensor_name == "bias":
            assert_close(values, weight.norm()[None])
        else:
            assert_close(values, svd(weight, DIMS[layer], 2), name, rtol=1e-6)


def test_layers_without_a_norm_count_too():
    net = Net()
    found = singular_values(net)
    assert list(found) == [
        "conv.weight",
        "up.weight",
        "body.0.weight",
        "body.2.weight",
        "head.weight",
    ]
    assert_close(found["up.weight"], svd(net.up.weight, 1, 1), rtol=1e-5)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_as_it_is(kind, fused, normalized):
    net = make(*KINDS[kind])
    if fused:
        spectral_ext.fuse(net)
    net(inputs()).sum().backward()
    net.body.eval()
    before, modes = state(net), [module.training for module in net.modules()]
    random = torch.get_rng_state()
    values = singular_values(net, normalized=normalized)
    assert equal_states(state(net), before)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(value.requires_grad for value in values.values())


def test_modes_are_restored_after_an_error():
    net = nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"1\.weight"):
        singular_values(net)
    assert net[0].training


def test_parametrize_cached_keeps_nothing_of_it():
    module = spectral_ext.spectral_norm(nn.Linear(3, 2))
    with parametrize.cached():
        singular_values(module, normalized=True)
        assert module.weight.requires_grad


def test_the_operator_norm_is_seen_through():
    module = operator_norm(nn.Conv2d(2, 3, 3), input_size=5).eval()
    raw = singular_values(module)["weight"]
    assert_close(raw, svd(module.parametrizations.weight.original, 0, 1), rtol=1e-5)
    used = singular_values(module, normalized=True)["weight"]
    assert_close(used, svd(module.weight, 0, 1), rtol=1e-5)


@pytest.mark.parametrize("apply", [STOCK["u_first"], STOCK["v_first"], OURS["u_first"]])
def test_the_rows_are_those_of_the_norm(apply):
    module = nn.Conv1d(3, 4, 5).double()
    weight = module.weight
    apply(module, "weight", dim=2)
    assert_close(singular_values(module)["weight"], svd(weight, 2, 1), rtol=1e-6)


@pytest.mark.parametrize("normalize", [None, spectral_ext.spectral_norm])
def test_raw_is_what_the_norm_gets_from_other_parametrizations(normalize):
    module = parametrizations.weight_norm(nn.Linear(4, 3), dim=None)
    with torch.no_grad():
        module.parametrizations.weight.original0.fill_(5.0)
    weight = module.weight
    if normalize is not None:
        normalize(module)
    assert_close(singular_values(module)["weight"], svd(weight, 0, 1), rtol=1e-5)


def test_there_are_as_many_values_as_the_weight_has():
    found = singular_values(nn.Sequential(nn.Linear(6, 1), nn.Embedding(5, 3)), 4)
    assert {name: len(values) for name, values in found.items()} == {"0.weight": 1, "1.weight": 3}


def test_names_select_weights():
    net = make(OURS["u_first"])
    names = ["body.0.bias", "head.weight"]
    assert list(singular_values(net, names=names)) == names


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtype_is_the_one_of_the_computation(dtype):
    found = singular_values(nn.Linear(3, 2).to(dtype))["weight"]
    assert found.dtype == torch.promote_types(dtype, torch.float32)


BAD = {
    "no module": ({"model": "net"}, TypeError, "model must be"),
    "k": ({"k": 0}, ValueError, "k must be positive"),
    "tol": ({"tol": -1.0}, ValueError, "tol must be positive"),
    "max_iterations": ({"max_iterations": 0}, ValueError, "max_iterations must be positive"),
    "names text": ({"names": "weight"}, TypeError, "names must be a collection"),
    "unknown name": ({"names": ["weight", "gain"]}, ValueError, r"names: .*\['gain'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        singular_values(**{"model": nn.Linear(3, 2), **arguments})
