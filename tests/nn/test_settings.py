"""What a layer may have beyond stock, alone and in a group: targets, gains, tolerances, vectors, blocks."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import spectral_ext
from spectral_ext import fuse, spectral_norm

# Settings of spectral_norm, and by what a weight of norm σ is then divided.
SETTINGS = {
    "plain": ({}, lambda sigma: sigma),
    "scale": ({"scale": 3.0}, lambda sigma: sigma / 3),
    "bound above": ({"bound": 100.0}, lambda sigma: 1),
    "bound below": ({"bound": 0.25}, lambda sigma: sigma / 0.25),
    "detach_sigma": ({"detach_sigma": True}, lambda sigma: sigma.detach()),
    "gain of one": ({"gain": "one"}, lambda sigma: sigma),
    "gain of sigma": ({"gain": "sigma"}, lambda sigma: sigma / sigma.detach()),
    "gains": ({"gain": "sigma_per_channel"}, lambda sigma: sigma / sigma.detach()),
    "vector": ({"name": "bias", "scale": 2.0}, lambda sigma: sigma / 2),
    "tol": ({"tol": 1e-7, "max_power_iterations": 60}, lambda sigma: sigma),
    "v_first": ({"order": "v_first", "bound": 0.25}, lambda sigma: sigma / 0.25),
}


def net_of(names=SETTINGS, dtype=torch.float64):
    """Return linear layers one after the other, one for each of the settings, whose u and v are exact."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name in names:
        settings, _ = SETTINGS[name]
        layer = nn.Linear(6, 6, dtype=dtype)
        start = {} if "name" in settings else {"init": "svd"}
        net.add_module(name, spectral_norm(layer, **{**start, **settings}))
    return net


def original_of(layer):
    (name,) = layer.parametrizations
    return name, layer.parametrizations[name].original


def check_weights_and_gradients(net, backend):
    """Compare with torch: σ by SVD, divided as the settings say."""
    for module in net.modules():
        if isinstance(module, spectral_ext.nn.SpectralNorm):
            module.backend = backend
    x = torch.randn(4, 6, dtype=torch.float64)
    net(x).square().sum().backward()
    expected, y = [], x
    for name, layer in net.named_children():
        tensor_name, original = original_of(layer)
        weight = original.detach().requires_grad_()
        matrix = weight[:, None] if weight.ndim == 1 else weight
        new = weight / SETTINGS[name][1](torch.linalg.matrix_norm(matrix, 2))
        expected.append(weight)
        both = {"weight": layer.weight.detach(), "bias": layer.bias.detach(), tensor_name: new}
        y = nn.functional.linear(y, both["weight"], both["bias"])
    y.square().sum().backward()
    for layer, weight in zip(net, expected, strict=True):
        torch.testing.assert_close(original_of(layer)[1].grad, weight.grad, rtol=1e-6, atol=1e-12)


def test_layers_alone(backend):
    check_weights_and_gradients(net_of(), backend)


def test_layers_in_a_group(backend):
    net = net_of()
    fuse(net, backend=backend)
    check_weights_and_gradients(net, backend)


def test_a_group_without_vectors_takes_the_prepared_call(backend):
    net = net_of([name for name in SETTINGS if name != "vector"])
    fuse(net, backend=backend)
    check_weights_and_gradients(net, backend)


def test_gains_are_trained(backend):
    net = net_of(["gain of one", "gains"])
    group = fuse(net, backend=backend)
    gains = {name: p for name, p in net.named_parameters() if name.endswith("gain")}
    assert [tuple(gain.shape) for gain in gains.values()] == [(), (6,)]
    sigma = torch.linalg.matrix_norm(original_of(net[1])[1], 2)
    torch.testing.assert_close(gains["gains.parametrizations.weight.0.gain"], sigma.expand(6))
    net(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    assert all(gain.grad.abs().min() > 0 for gain in gains.values())
    with torch.no_grad():
        gains["gain of one.parametrizations.weight.0.gain"].zero_()
    net.zero_grad()
    with group.normalized():
        assert not net[0].weight.any()
        net[0].weight.sum().backward()  # a gain of zero has a gradient, too
    normalized = original_of(net[0])[1] / torch.linalg.matrix_norm(original_of(net[0])[1], 2)
    torch.testing.assert_close(net[0].parametrizations.weight[0].gain.grad, normalized.sum())


def test_gain_of_a_forward_without_gradients():
    """The weight is attached to the graph when it is asked for, with its gain."""
    net = net_of(["gains", "plain"])
    group = fuse(net)
    with torch.no_grad():
        entry = group.normalized()
        entry.__enter__()
    net[0].weight.sum().backward()
    entry.__exit__(None, None, None)
    assert net[0].parametrizations.weight[0].gain.grad is not None
    assert original_of(net[0])[1].grad is not None


def test_settings_survive_copies_and_checkpoints(tmp_path):
    net = net_of()
    fuse(net)
    x = torch.randn(2, 6, dtype=torch.float64)
    other = net_of()
    fuse(other)
    for _ in range(3):
        other(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(net.state_dict())
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    expected = net.eval()(x)
    for found in (copy.deepcopy(net), other.eval(), loaded.eval(), spectral_ext.unfuse(net)):
        torch.testing.assert_close(found(x), expected, rtol=1e-9, atol=0)


def test_a_group_reads_settings_that_are_changed(backend):
    net = net_of(["plain"])
    group = fuse(net, backend=backend)
    net[0].parametrizations.weight[0].scale = 5.0
    with group.normalized():
        norm = torch.linalg.matrix_norm(net[0].weight, 2)
    torch.testing.assert_close(norm, torch.tensor(5.0, dtype=torch.float64))


def test_iterations_and_residuals(backend):
    net = net_of(["tol", "plain", "vector"])
    with torch.no_grad():
        set_singular_values(original_of(net[0])[1])
    group = fuse(net, backend=backend)
    assert group.iterations.isnan().all()
    x = torch.randn(2, 6, dtype=torch.float64)
    net(x)
    first = group.iterations.tolist()
    assert 2 < first[0] < 60 and first[1:] == [1, 0]
    assert 0 < group.residuals[0] <= 1e-7 and group.residuals[1].isnan()
    net(x)
    assert group.iterations.tolist() == [1, 1, 0]
    net.eval()(x)
    assert group.iterations.tolist() == [0, 0, 0] and group.residuals.isnan().all()


def test_svd_start_is_exact():
    layer = spectral_norm(nn.Conv2d(3, 8, 3), init="svd")
    norm, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    u, _, v = torch.linalg.svd(original.detach().flatten(1), full_matrices=False)
    torch.testing.assert_close(norm._u.outer(norm._v), u[:, 0].outer(v[0]), rtol=1e-4, atol=1e-5)


def set_singular_values(weight):
    """Make a random weight whose singular values leave gaps."""
    nn.init.orthogonal_(weight)
    weight.mul_(torch.linspace(1, 0.1, 6)[:, None])


def sigma_error(net):
    """Return how far the norms of the weights in evaluation are from one."""
    net.eval()
    return max(abs(torch.linalg.matrix_norm(layer.weight.detach(), 2).item() - 1) for layer in net)


def test_a_checkpoint_without_vectors_gets_new_ones():
    net = net_of(["plain", "v_first"])
    net[1].parametrizations.weight[0].bound = None
    other = (
        net_of(["plain", "plain"][:1]) and nn.Sequential(*(nn.Linear(6, 6) for _ in "12")).double()
    )
    with torch.no_grad():
        for layer in other:
            set_singular_values(layer.weight)
    state = {
        f"{name}.parametrizations.weight.original": layer.weight
        for name, layer in zip(("plain", "v_first"), other, strict=True)
    }
    missing = net.load_state_dict(state, strict=False).missing_keys
    assert missing == ["plain.bias", "v_first.bias"]
    assert sigma_error(net) < 1e-3


def test_warm_start_follows_a_jump_of_the_weights(backend):
    net = net_of(["plain", "v_first"])
    net[1].parametrizations.weight[0].bound = None
    group = fuse(net, backend=backend)
    with torch.no_grad():
        for layer in net:
            set_singular_values(layer.parametrizations.weight.original)
    assert sigma_error(net) > 0.1
    group.warm_start(40)
    assert sigma_error(net) < 1e-6
    with pytest.raises(ValueError, match="n_power_iterations must be positive"):
        group.warm_start(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_of_half_precision_weights_are_float32_and_do_not_drift(dtype, backend):
    layer = spectral_norm(nn.Linear(40, 30, dtype=dtype), backend=backend)
    norm = layer.parametrizations.weight[0]
    assert norm._u.dtype == norm._v.dtype == torch.float32
    for _ in range(60):
        layer.weight  # noqa: B018
    sigma = torch.linalg.matrix_norm(layer.parametrizations.weight.original.float(), 2)
    found = norm._u @ layer.parametrizations.weight.original.float() @ norm._v
    assert abs(found / sigma - 1) < 1e-5 and abs(norm._u.norm() - 1) < 1e-5


def test_vectors_follow_conversions_of_the_model():
    layer = spectral_norm(nn.Linear(4, 3)).eval()
    norm = layer.parametrizations.weight[0]
    before = norm._u.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(norm._u, before)
    layer.double()
    assert norm._u.dtype == torch.float64 and torch.equal(norm._u, before.double())


def test_stock_vectors_of_half_precision_load_and_go_back():
    stock = parametrizations.spectral_norm(nn.Linear(4, 3)).to(torch.bfloat16)
    net = nn.Sequential(copy.deepcopy(stock), nn.utils.spectral_norm(nn.Linear(3, 2)).bfloat16())
    fuse(net)
    net(torch.randn(2, 4, dtype=torch.bfloat16))
    assert net[0].parametrizations.weight[0]._u.dtype == torch.float32
    assert net[1].parametrizations.weight[0]._v.dtype == torch.float32
    ours = spectral_norm(nn.Linear(4, 3, dtype=torch.bfloat16))
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(
        ours.parametrizations.weight[0]._u.bfloat16(), stock.parametrizations.weight[0]._u
    )
    spectral_ext.unfuse(net)(torch.randn(2, 4, dtype=torch.bfloat16))
    assert net[0].parametrizations.weight[0]._u.dtype == net[1].weight_u.dtype == torch.bfloat16


def test_an_averaged_model_is_right(backend):
    """Stock's is not: an average of unit vectors is too short, and σ with it too small."""
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Linear(8, 8)))
    fuse(net, backend=backend)
    averaged = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    for _ in range(4):
        with torch.no_grad():
            net[0].parametrizations.weight.original.normal_()
        net(torch.randn(2, 8))
        averaged.update_parameters(net)
    norm = averaged.module[0].parametrizations.weight[0]
    assert norm._u.norm() < 0.95
    averaged.eval()(torch.randn(2, 8))
    original = averaged.module[0].parametrizations.weight.original.detach()
    u, v = (nn.functional.normalize(x, dim=0) for x in (norm._u, norm._v))
    expected = original / (u @ original @ v)
    torch.testing.assert_close(averaged.module[0].weight, expected)


def test_blocks_of_multihead_attention(backend):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, bias=False)
    spectral_norm(attention, "in_proj_weight", blocks=3, init="svd")
    net = nn.Sequential(spectral_norm(nn.Linear(6, 6), init="svd"))
    net.attention = attention
    fuse(net, include="weight", backend=backend)
    original = attention.parametrizations.in_proj_weight.original
    with net.__dict__["_spectral_group"].normalized() as group:
        for block, old in zip(attention.in_proj_weight.chunk(3), original.chunk(3), strict=True):
            expected = old / torch.linalg.matrix_norm(old, 2)
            torch.testing.assert_close(block, expected)
        norms = [torch.linalg.matrix_norm(old, 2) for old in original.detach().chunk(3)]
        assert torch.isclose(group.sigma_of("attention"), max(norms))
        attention.in_proj_weight.square().sum().backward()
    assert original.grad.abs().sum() > 0
    x = torch.randn(5, 1, 6)
    assert attention(x, x, x)[0].isfinite().all()


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_group_of_a_convolution(conv, backend):
    torch.manual_seed(0)
    layer = spectral_norm(conv(4, 6, 3, groups=2), per_group=True, init="svd", backend=backend)
    transposed = conv is nn.ConvTranspose2d
    original = layer.parametrizations.weight.original
    for part, old in zip(layer.weight.chunk(2), original.chunk(2), strict=True):
        matrix = old.transpose(0, 1) if transposed else old
        expected = old / torch.linalg.matrix_norm(matrix.flatten(1), 2)
        torch.testing.assert_close(part, expected)
    assert layer(torch.randn(1, 4, 5, 5)).isfinite().all()
    other = spectral_norm(conv(4, 6, 3, groups=2), per_group=True, backend=backend)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.eval().weight, layer.eval().weight)


def test_weights_of_an_rnn_by_name(backend):
    torch.manual_seed(0)
    rnn = nn.GRU(3, 5)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        spectral_norm(rnn, name, blocks=3, init="svd", backend=backend)
    x = torch.randn(4, 2, 3)
    output, _ = rnn(x)
    plain = nn.GRU(3, 5)
    with torch.no_grad():
        for name in ("weight_hh_l0", "weight_ih_l0"):
            blocks = rnn.parametrizations[name].original.chunk(3)
            normalized = [block / torch.linalg.matrix_norm(block, 2) for block in blocks]
            getattr(plain, name).copy_(torch.cat(normalized))
        plain.bias_hh_l0.copy_(rnn.bias_hh_l0)
        plain.bias_ih_l0.copy_(rnn.bias_ih_l0)
    torch.testing.assert_close(output, plain(x)[0])


def test_tied_weights_and_an_embedding(backend):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
    net[1].weight = net[0].weight
    spectral_ext.apply_spectral_norm(net, init="svd", bound=0.5)
    group = fuse(net, backend=backend)
    with group.normalized():
        assert net[0].weight is net[1].weight
        norm = torch.linalg.matrix_norm(net[0].weight, 2)
    torch.testing.assert_close(norm, torch.tensor(0.5))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_are_normalized_in_their_first_forward(backend):
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
    spectral_norm(net[0], init="svd", backend=backend)
    spectral_ext.apply_spectral_norm(net, include="2", init="svd", backend=backend)
    assert not parametrize.is_parametrized(net[0])
    net(torch.randn(1, 3, 5, 5))
    assert type(net[0]).__mro__[1] is nn.Conv2d and parametrize.is_parametrized(net[2])
    for layer in (net[0], net[2]):
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        torch.testing.assert_close(norm, torch.tensor(1.0))
    assert not net[0]._forward_pre_hooks
    fuse(net)


def test_operator_norm_by_spectral_norm():
    layer = spectral_norm(
        nn.Conv2d(2, 3, 3, padding=1), norm="operator", input_size=(5, 6), bound=0.5
    )
    assert "OperatorNorm" in repr(layer)


BAD = {
    "bound": ({"bound": 0.0}, "bound must be positive"),
    "scale": ({"scale": -1.0}, "scale must be positive"),
    "both": ({"scale": 2.0, "bound": 1.0}, "exclude each other"),
    "tol": ({"tol": -0.1}, "tol must be not negative"),
    "max without tol": ({"max_power_iterations": 3}, "max_power_iterations is for tol"),
    "max": ({"tol": 0.1, "max_power_iterations": 0}, "max_power_iterations must be positive"),
    "gain": ({"gain": "two"}, "gain must be one of"),
    "gain and bound": ({"gain": "one", "bound": 1.0}, "exclude each other"),
    "init": ({"init": "zeros"}, "init must be one of"),
    "blocks": ({"blocks": 4}, "blocks=4 does not divide"),
    "no blocks": ({"blocks": 0}, "blocks must be at least 1"),
    "per_group": ({"per_group": True}, "it has no groups"),
    "norm": ({"norm": "nuclear"}, "norm must be"),
    "operator": ({"norm": "operator"}, "needs the input_size"),
    "operator and tol": ({"norm": "operator", "input_size": 3, "tol": 0.1}, "excludes the other"),
    "input_size": ({"input_size": 3}, "input_size is for"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_name_the_layer_and_change_nothing(case):
    settings, message = BAD[case]
    layer = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=message) as raised:
        spectral_norm(layer, **settings)
    assert "Linear.weight" in str(raised.value)
    assert type(layer) is nn.Linear and not parametrize.is_parametrized(layer)


def test_not_finite_layers_are_named_when_asked(backend):
    net = net_of(["plain", "bound below", "vector"])
    group = fuse(net, check_finite=True, backend=backend)
    x = torch.randn(2, 6, dtype=torch.float64)
    net(x)
    group.check()
    with torch.no_grad():
        original_of(net[1])[1][2, 3] = math.nan
    net(x)
    with torch.no_grad():
        original_of(net[1])[1][2, 3] = 0
        original_of(net[2])[1].fill_(math.inf)
        net[1].parametrizations.weight[0]._u.fill_(6**-0.5)
        net[1].parametrizations.weight[0]._v.fill_(6**-0.5)
    net.eval()(x)
    with pytest.raises(FloatingPointError, match=r"last check: bound below.weight, vector.bias$"):
        group.check()
    group.check()  # says it once
    with pytest.raises(ValueError, match="check_finite=True"):
        fuse(net).check()


def test_log_dict_names_every_layer(backend):
    net = net_of(["plain", "vector"])
    group = fuse(net, backend=backend)
    net(torch.randn(2, 6, dtype=torch.float64))
    found = group.log_dict("sn/")
    assert found["sn/sigma/plain.weight"] == pytest.approx(group.sigmas[0].item())
    assert found["sn/sigma/vector.bias"] == pytest.approx(group.sigmas[1].item())
