"""State dicts of both stock layouts, in and out, strictly."""

import pytest
import torch
from nets import OURS, STOCK, assert_close, inputs, make
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import spectral_ext

SOURCES = {
    "stock parametrization": (STOCK["u_first"],),
    "stock hook": (STOCK["v_first"],),
    "stock both": (STOCK["u_first"], STOCK["v_first"]),
    "ours u_first": (OURS["u_first"],),
    "ours v_first": (OURS["v_first"],),
}
LAYOUTS = {"parametrization": STOCK["u_first"], "hook": STOCK["v_first"]}


def outputs(net):
    with torch.no_grad():
        return net.eval()(inputs())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_stock_loads_what_is_written_for_it(source, layout, fused):
    net = make(*SOURCES[source])
    net(inputs())
    if fused:
        spectral_ext.fuse(net)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    written = spectral_ext.stock_state_dict(net, layout)
    stock = make(LAYOUTS[layout], seed=1)
    assert written.keys() == stock.state_dict().keys()
    assert dict(written._metadata) == dict(stock.state_dict()._metadata)
    stock.load_state_dict(written)
    assert_close(outputs(stock), outputs(net))
    after = net.state_dict()  # writing has not changed the model
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict_shares_memory_as_that_of_torch_does(layout):
    net = make(OURS["u_first"])
    written = spectral_ext.stock_state_dict(net, layout)
    key = {"parametrization": "conv.parametrizations.weight.original", "hook": "conv.weight_orig"}
    weight = net.conv.parametrizations.weight.original
    assert written[key[layout]].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("target", ["ours u_first", "ours v_first", "stock both"])
@pytest.mark.parametrize("source", SOURCES)
def test_ours_load_either_layout(source, target, fused):
    if target.startswith("stock") and not fused:
        pytest.skip("stock loads its own layout only")
    saved = make(*SOURCES[source])
    saved(inputs())
    net = make(*SOURCES[target], seed=1)
    if fused:
        spectral_ext.fuse(net)
    checkpoint = saved.state_dict()
    keys = list(checkpoint)
    net.load_state_dict(checkpoint)
    assert list(checkpoint) == keys
    assert_close(outputs(net), outputs(saved))
    prefixed = {f"module.{key}": value for key, value in checkpoint.items()}
    net = make(*SOURCES[target], seed=2)
    spectral_ext.fuse(net)
    nn.ModuleDict({"module": net}).load_state_dict(prefixed)  # without metadata
    assert_close(outputs(net), outputs(saved))


def test_checkpoints_without_v():
    """Those of torch before 1.1: the hook kept the normalized weight and u."""
    stock = make(STOCK["v_first"])
    for _ in range(100):
        stock(inputs())
    old = stock.state_dict()
    for key in [key for key in old if key.endswith("_v")]:
        del old[key]
        weight = key.removesuffix("_v")
        module, name = stock.get_submodule(weight.rpartition(".")[0]), weight.rpartition(".")[2]
        old[weight] = getattr(module, name).detach()
    for metadata in old._metadata.values():
        metadata.pop("spectral_norm", None)
    net = make(OURS["v_first"], seed=1)
    spectral_ext.fuse(net)
    net.load_state_dict(old)
    assert_close(outputs(net), outputs(stock), rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_missing_or_unknown_is_reported(layout):
    net = make(OURS["u_first"])
    spectral_ext.fuse(net)
    state = spectral_ext.stock_state_dict(net, layout)
    missing = {"parametrization": "up.parametrizations.weight.0._v", "hook": "up.weight_v"}[layout]
    del state[missing]
    state["up.weight_w"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"up\.parametrizations\.weight\.0\._v") as raised:
        net.load_state_dict(state)
    assert "up.weight_w" in str(raised.value)
    result = net.load_state_dict(state, strict=False)
    assert result.missing_keys == ["up.parametrizations.weight.0._v"]
    assert result.unexpected_keys == ["up.weight_w"]


def test_what_the_hook_has_no_place_for():
    net = nn.Sequential(spectral_ext.spectral_norm(nn.Linear(3, 2)))
    parametrize.register_parametrization(net[0], "weight", nn.Identity())
    spectral_ext.stock_state_dict(net)
    with pytest.raises(ValueError, match=r"^0: 2 parametrizations"):
        spectral_ext.stock_state_dict(net, "hook")
    with pytest.raises(ValueError, match="layout"):
        spectral_ext.stock_state_dict(net, "keras")


def test_modules_under_several_names():
    layer = parametrizations.spectral_norm(nn.Linear(3, 3))
    net = nn.Sequential(layer, layer)
    spectral_ext.fuse(net)
    written = spectral_ext.stock_state_dict(net, "hook")
    assert {key.partition(".")[0] for key in written if key.endswith("_orig")} == {"0", "1"}
    net.load_state_dict(written)
