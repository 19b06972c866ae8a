"""Modules have good u and v, whatever their weights were, and find them again where they were lost."""

import copy
import math

import pytest
import torch
from nets import OURS, STOCK
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_ext
from spectral_ext.nn.parametrization import SpectralNorm, StockSpectralNorm
from spectral_ext.reference import start_vector

BAD = [0.0, 1e-15, 1e-13, 1e-30, 1e25, 1e30, math.nan, math.inf]
KINDS = {"u_first": {}, "v_first": {"order": "v_first"}, "blocks": {"blocks": 2}}


def layer_of(scale=1.0, **options):
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight.mul_(scale)
    return spectral_ext.spectral_norm(layer, **options)


def norm_of(layer):
    return layer.parametrizations.weight[0]


def set_weight(layer):
    """A large weight whose blocks, too, have a singular value far from the others."""
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.copy_(torch.randn(4, 5)).clamp_(-1, 1)
        original[0] *= 30
        original[2] *= 20


def assert_unit_vectors(*layers):
    for layer in layers:
        norm = norm_of(layer)
        for vector in (norm._u, norm._v):
            for part in vector.chunk(norm.blocks):
                assert abs(part.norm() - 1) < 1e-5


def assert_normalized(layer, tolerance=1e-3):
    for part in layer.weight.detach().chunk(norm_of(layer).blocks):
        assert abs(torch.linalg.matrix_norm(part, 2) - 1) < tolerance


@pytest.mark.parametrize("scale", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_begins_with_unit_vectors_whatever_its_weight(kind, scale, backend):
    layer = layer_of(scale, **KINDS[kind], backend=backend)
    assert_unit_vectors(layer)
    set_weight(layer)
    for _ in range(20):
        layer.weight  # noqa: B018
    assert_unit_vectors(layer)
    assert_normalized(layer.eval())


@pytest.mark.parametrize("scale", BAD)
@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_construction_draws_the_numbers_of_pytorch(order, scale):
    states, vectors = [], []
    for make in (STOCK[order], OURS[order]):
        torch.manual_seed(3)
        layer = nn.Linear(5, 4)
        layer.weight.data.mul_(scale)
        make(layer, "weight")
        states.append(torch.get_rng_state())
        vectors.append([b for b in layer.buffers() if b.ndim])
    assert torch.equal(*states)
    if order == "v_first":
        assert all(torch.equal(a, b) for a, b in zip(*vectors, strict=True))


def test_vectors_of_good_weights_are_those_of_pytorch():
    weight, vectors = torch.randn(50, 40), []
    for cls in (StockSpectralNorm, SpectralNorm):
        torch.manual_seed(3)
        norm = cls(weight)
        vectors.append([norm._u, norm._v])
    assert all(torch.equal(a, b) for a, b in zip(*vectors, strict=True))


@pytest.mark.parametrize("scale", [0.0, 1e-15, math.nan])
@pytest.mark.parametrize("later", ["train", "eval"])
def test_fused_layers_of_pytorch_that_began_with_a_bad_weight(scale, later):
    layer = nn.Linear(5, 4)
    layer.weight.data.mul_(scale)
    STOCK["u_first"](layer)
    set_weight(layer)
    net = nn.Sequential(layer)
    spectral_ext.fuse(net)
    net.train(later == "train")
    for _ in range(5):
        y = net(torch.eye(5))
    assert_normalized(layer.eval())
    assert y.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_a_model_goes_on_once_a_bad_weight_was_put_back(fused, value, backend):
    layer = layer_of(backend=backend)
    set_weight(layer)
    net = nn.Sequential(layer)
    if fused:
        spectral_ext.fuse(net, backend=backend)
    net(torch.eye(5))
    original = layer.parametrizations.weight.original
    kept, vectors = original.detach().clone(), [b.clone() for b in net.buffers()]
    with torch.no_grad():
        original[1, 2] = value
    assert net(torch.eye(5)).isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), vectors, strict=True))
    with torch.no_grad():
        original.copy_(kept)
    for _ in range(10):
        net(torch.eye(5))
    assert_normalized(layer.eval())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("way", ["warm_start", "warm_start of the group", "fuse", "load", "apply"])
@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_find_lost_vectors(kind, way, value):
    """They give vectors that an evaluation can use at once."""
    layer = layer_of(**KINDS[kind])
    set_weight(layer)
    net, norm = nn.Sequential(layer), norm_of(layer)
    group = spectral_ext.fuse(net)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for vector in (norm._u, norm._v):
        vector[: 4 // 2] = value
        if kind != "blocks":
            vector.fill_(value)
    if way == "warm_start":
        norm.warm_start(layer.parametrizations.weight.original)
    elif way == "warm_start of the group":
        group.warm_start()
    elif way == "fuse":
        spectral_ext.fuse(net)
    elif way == "load":
        broken = {
            **state,
            **{f"0.parametrizations.weight.0.{n}": getattr(norm, n) for n in ("_u", "_v")},
        }
        net.load_state_dict(copy.deepcopy(broken))
    else:
        spectral_ext.unfuse(net)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        spectral_ext.spectral_norm(layer, **KINDS[kind])
        set_weight(layer)
        norm_of(layer).warm_start(layer.parametrizations.weight.original)
    assert_unit_vectors(layer)
    assert_normalized(layer.eval(), 1e-2)


def test_loading_leaves_averaged_vectors_as_they_are():
    layer = layer_of()
    state = {k: v.clone() * (0.3 if k.endswith("_v") else 1) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


def plain_state():
    layer = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    layer[0].weight.data[0] *= 30
    layer[1].weight.data[0] *= 30
    return layer.state_dict()


def model():
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    spectral_ext.spectral_norm(net[0])
    return net


@pytest.mark.parametrize(
    "layout", ["plain", "weights of the parametrization", "weights of the hook"]
)
@pytest.mark.parametrize("how", ["real", "to_empty", "assign", "assign from meta"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_of_weights_alone_loads_strictly(fused, how, layout):
    names = {"plain": "weight", "weights of the hook": "weight_orig"}
    name = names.get(layout, "parametrizations.weight.original")
    state = {k.replace("0.weight", f"0.{name}"): v for k, v in plain_state().items()}
    with torch.device("meta" if how in ("to_empty", "assign from meta") else "cpu"):
        net = model()
        if fused:
            spectral_ext.fuse(net)
    if how == "to_empty":
        net.to_empty(device="cpu")
    before = dict(state)
    assert (
        str(net.load_state_dict(state, assign="assign" in how)) == "<All keys matched successfully>"
    )
    assert state == before
    original = net[0].parametrizations.weight.original
    assert torch.equal(original, state[f"0.{name}"])
    assert_unit_vectors(net[0])
    assert_normalized(net[0].eval())
    assert not any(t.is_meta for t in (*net.parameters(), *net.buffers()))


def test_a_missing_weight_is_reported():
    net, state = model(), plain_state()
    del state["0.weight"]
    with pytest.raises(RuntimeError, match=r"0\.parametrizations\.weight\.original"):
        net.load_state_dict(state)
    state["0.parametrizations.weight.0._u"] = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"0\.parametrizations\.weight\.original"):
        net.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_without_values_becomes_unit_vectors(kind):
    """Of to_empty from the meta device, after which someone initialises the weights."""
    with torch.device("meta"):
        layer = layer_of(**KINDS[kind])
    layer.to_empty(device="cpu")
    assert_unit_vectors(layer)
    assert (
        torch.equal(norm_of(layer)._v, start_vector(torch.empty(5)).repeat(1)) or kind == "blocks"
    )
    set_weight(layer)
    for _ in range(20):
        layer.weight  # noqa: B018
    assert_normalized(layer.eval())


def test_report_and_check_name_a_layer_that_is_not_normalized():
    net = nn.Sequential(layer_of(), nn.Tanh())
    group = spectral_ext.fuse(net, check_finite=True)
    norm, original = norm_of(net[0]), net[0].parametrizations.weight.original
    net(torch.eye(5))
    group.check()
    assert all(row.normalized for row in spectral_ext.report(net).rows)
    with torch.no_grad():
        original.zero_()
        original[1, 1] = 3
        norm._v.copy_(torch.eye(5)[0])
        norm._u.copy_(torch.eye(4)[0])
    net.eval()(torch.eye(5))
    with pytest.raises(FloatingPointError, match=r"is 0 and the weight is not.*0\.weight"):
        group.check()
    (row,) = spectral_ext.report(net).rows
    assert not row.normalized and row.lipschitz == 3
    assert "0.weight: not normalized, σ is 0" in str(spectral_ext.report(net))
    net.train()
    for _ in range(3):
        net(torch.eye(5))
    group.check()
    assert spectral_ext.report(net).rows[0].normalized
    with torch.no_grad():
        original.zero_()
    net(torch.eye(5))
    group.check()
    assert spectral_ext.report(net).rows[0].normalized


class NoFloat64(TorchDispatchMode):
    """A device without float64, where the only one is: nothing but the measures of a report, on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{func} makes float64")
        return out


@pytest.mark.parametrize(
    "options", [{}, {"tol": 1e-2}, {"bound": 1.0}, {"order": "v_first"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_makes_float64(dtype, options):
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    plain = copy.deepcopy(net)
    x = torch.randn(2, 8, dtype=dtype)
    with NoFloat64():
        spectral_ext.apply_spectral_norm(net, backend="reference", **options)
        net(x).sum().backward()
        net.eval()(x)
        spectral_ext.fuse(net, backend="reference")
        net.train()(x).sum().backward()
        net.eval()(x)
        spectral_ext.bake(net)
        spectral_ext.SpectralProjection(plain, backend="reference", init="randn").project()
