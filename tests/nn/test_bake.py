"""bake: a plain model that computes what the normalized one does in evaluation."""

import pickle

import pytest
import torch
from nets import NORMS, OURS, STOCK, Net, assert_close, assert_same_state, inputs, make, state
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as hook

import spectral_ext

KINDS = {
    "stock": ("u_first",),
    "hook": ("v_first",),
    "both": ("u_first", "v_first"),
}


def normalized(kind, makers=STOCK):
    return make(*(makers[order] for order in KINDS[kind]))


def assert_plain(net: nn.Module, plain: nn.Module) -> None:
    """Nothing of a spectral norm is left: classes, keys, hooks."""
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    assert net.state_dict().keys() == plain.state_dict().keys()
    parameters = dict(net.named_parameters())
    assert parameters.keys() == dict(plain.named_parameters()).keys()
    for module in net.modules():
        assert not module._forward_pre_hooks
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks
        assert not [name for name in module.__dict__ if "spectral" in name]
    # It loads what a plain model has saved, and pickle finds all of its classes.
    net.load_state_dict(net.state_dict())
    assert b"spectral_ext" not in pickle.dumps(net)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["stock", "ours", "fused"])
def test_outputs_are_those_of_evaluation(how, kind, training, backend):
    """The stock model has run before, so that a hook's weight is in a graph."""
    net = normalized(kind, OURS if how == "ours" else STOCK)
    net.conv.bias.requires_grad_(False)
    weight = net.head.weight if how == "ours" or kind == "stock" else net.head.weight_orig
    if how != "stock":
        spectral_ext.fuse(net, backend=backend)
        if how == "ours":
            spectral_ext.unfuse(net)
    net(inputs())
    net.train(training)
    before = state(net)
    baked = spectral_ext.bake(net)
    assert all(torch.equal(value, before[key]) for key, value in state(net).items())
    assert [m.training for m in net.modules()] == [training] * len(list(net.modules()))
    assert type(baked) is Net
    assert baked.training is training
    assert_plain(baked, Net())
    assert not baked.conv.bias.requires_grad
    assert all(p.requires_grad for name, p in baked.named_parameters() if name != "conv.bias")
    assert all(p.is_leaf and p.grad is None for p in baked.parameters())
    expected = net.eval()(inputs(1))
    assert_close(baked(inputs(1)), expected)
    assert weight is not baked.head.weight
    with torch.no_grad():
        for parameter in baked.parameters():
            parameter.zero_()
    assert_close(net(inputs(1)), expected)  # no memory is shared


def test_in_place(backend):
    net, stock = normalized("both"), normalized("both")
    for model in (net, stock):
        model(inputs())
    stock.eval()
    spectral_ext.fuse(net, backend=backend)
    assert spectral_ext.bake(net, inplace=True) is net
    assert_plain(net, Net())
    assert_close(net(inputs()), stock(inputs()))


def test_a_fused_model_is_computed_in_one_call(monkeypatch):
    net = normalized("both")
    net(inputs())
    group = spectral_ext.fuse(net, backend="reference")
    calls = []
    forward_ = spectral_ext.backends.reference.forward_

    def counted(weights, *arguments):
        calls.append(len(weights))
        forward_(weights, *arguments)

    monkeypatch.setattr(spectral_ext.backends.reference, "forward_", counted)
    spectral_ext.bake(net)
    matrices = [layer for layer in group.layers if not layer.parametrization.is_vector]
    assert calls == [len(matrices)]


@pytest.mark.parametrize("update", ["step", "manual"])
def test_a_group_that_keeps_its_weights(update):
    net = normalized("stock")
    spectral_ext.fuse(net, update=update)
    net(inputs())
    with torch.inference_mode():
        baked = spectral_ext.bake(net)
    assert not any(p.is_inference() for p in baked.parameters())
    assert_close(baked(inputs()), net.eval()(inputs()))


SETTINGS = [
    {"bound": 0.3},
    {"scale": 2.0, "detach_sigma": True},
    {"gain": "sigma_per_channel"},
    {"gain": "one"},
    {"tol": 0.05},
    {"blocks": 3},
    {"norm": "operator", "input_size": 6},
]


@pytest.mark.parametrize("is_fused", [True, False])
def test_settings_beyond_stock(is_fused):
    net = nn.Sequential(*(nn.Conv1d(6, 6, 3, padding=1) for _ in SETTINGS)).double()
    for layer, settings in zip(net, SETTINGS, strict=True):
        spectral_ext.spectral_norm(layer, **settings)
    if is_fused:
        spectral_ext.fuse(net)
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    for _ in range(2):
        net(x)
    baked = spectral_ext.bake(net)
    assert_plain(baked, nn.Sequential(*(nn.Conv1d(6, 6, 3, padding=1) for _ in SETTINGS)))
    assert_close(baked(x), net.eval()(x))


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, spectral_ext.spectral_norm])
def test_one_layer(norm):
    layer = norm(nn.Linear(4, 3, dtype=torch.float64))
    baked = spectral_ext.bake(layer)
    assert type(baked) is nn.Linear
    assert_close(baked.weight, layer.eval().weight)
    assert parametrize.is_parametrized(layer)


def test_half_precision_keeps_its_dtype():
    net = make(STOCK["u_first"], dtype=torch.bfloat16).eval()
    spectral_ext.fuse(net)
    baked = spectral_ext.bake(net)
    assert {p.dtype for p in baked.parameters()} == {torch.bfloat16}
    x = inputs(dtype=torch.bfloat16)
    assert torch.equal(baked(x), net(x))


def test_autocast_is_of_no_account():
    """What is folded has the precision of the weights, in a group that heeds autocast, too."""
    net = make(STOCK["u_first"], dtype=torch.float32)
    spectral_ext.fuse(net, autocast=True)
    expected = spectral_ext.bake(net)
    with torch.autocast("cpu"):
        baked = spectral_ext.bake(net)
    assert all(map(torch.equal, baked.parameters(), expected.parameters()))


def test_a_pruned_weight():
    net = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64))
    parametrizations.spectral_norm(net[0])
    prune.l1_unstructured(net[0].parametrizations.weight, "original", amount=0.5)
    spectral_ext.fuse(net)
    baked = spectral_ext.bake(net)
    assert type(baked[0]) is nn.Linear
    assert baked.state_dict().keys() == nn.Sequential(nn.Linear(4, 3)).state_dict().keys()
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(baked(x), net.eval()(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_stacked_parametrizations(first, is_fused):
    """What is stacked on a normalized tensor is folded, what another tensor has stays."""
    layer = nn.Linear(4, 3, dtype=torch.float64)
    net = nn.Sequential(layer, nn.Linear(3, 2, dtype=torch.float64))
    steps = [lambda: parametrizations.spectral_norm(layer), lambda: add(layer, "weight")]
    for step in steps if first else steps[::-1]:
        step()
    add(layer, "bias")
    spectral_ext.spectral_norm(net[1])
    if is_fused:
        spectral_ext.fuse(net)
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = net.eval()(x)
    baked = spectral_ext.bake(net)
    assert_close(baked(x), expected)
    assert not parametrize.is_parametrized(baked[0], "weight")
    assert isinstance(baked[0].parametrizations.bias[0], Doubled)
    assert "spectral_ext" not in type(baked[0]).__module__
    assert type(baked[1]) is nn.Linear
    assert_close(net(x), expected)


def add(layer, name):
    parametrize.register_parametrization(layer, name, Doubled())


def test_several_originals():
    layer = parametrizations.weight_norm(nn.Linear(4, 3, dtype=torch.float64))
    parametrizations.spectral_norm(layer)
    baked = spectral_ext.bake(layer)
    assert type(baked) is nn.Linear
    assert isinstance(baked.weight, nn.Parameter)
    assert_close(baked.weight, layer.eval().weight)


def test_tied_weights_stay_tied():
    net = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)))
    net[1].weight = net[2].weight = net[0].weight
    for layer in net[:2]:
        parametrizations.spectral_norm(layer)
    parametrizations.spectral_norm(net[2], n_power_iterations=2)
    spectral_ext.fuse(net)
    for _ in range(2):
        net(torch.ones(1, 4, dtype=torch.float64))
    baked = spectral_ext.bake(net)
    assert baked[1].weight is baked[0].weight
    assert baked[2].weight is not baked[0].weight  # another σ
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(baked(x), net.eval()(x))


def test_a_buffer_stays_a_buffer():
    layer = nn.Module()
    layer.register_buffer("table", torch.randn(3, 4))
    spectral_ext.spectral_norm(layer, "table")
    baked = spectral_ext.bake(layer)
    assert dict(baked.named_buffers()).keys() == {"table"}
    assert not list(baked.parameters())
    assert torch.equal(baked.table, layer.eval().table)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_rnns(cell):
    net = cell(3, 4, num_layers=2, batch_first=True).double()
    for name in ("weight_hh_l0", "weight_ih_l1"):
        spectral_ext.spectral_norm(net, name)
    spectral_ext.fuse(net)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    net(x)
    baked = spectral_ext.bake(net)
    assert type(baked) is cell
    assert any(w is baked.weight_hh_l0 for w in baked._flat_weights)
    assert_close(baked(x)[0], net.eval()(x)[0])
    with torch.no_grad():
        baked.weight_hh_l0.mul_(2)
    assert not torch.allclose(baked(x)[0], net(x)[0])


def test_fused_models_inside_of_another():
    net = normalized("stock")
    spectral_ext.fuse(net.body)
    spectral_ext.fuse(net, exclude="body")
    expected = spectral_ext.bake(normalized("stock"))
    baked = spectral_ext.bake(net)
    assert_plain(baked, Net())
    assert_same_state(baked, expected)


def test_what_it_cannot_take():
    lazy = nn.Sequential(spectral_ext.spectral_norm(nn.LazyLinear(3)))
    scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    compiled = torch.compile(spectral_ext.spectral_norm(nn.Linear(2, 2)))
    cases = [
        (3, TypeError, r"must be a torch\.nn\.Module, got int"),
        (nn.Linear(2, 2), ValueError, "Linear has no spectral norm to bake"),
        (lazy, ValueError, "0 is lazy"),
        (scripted, TypeError, "0 is a ScriptModule"),
        (compiled, TypeError, r"made by torch\.compile"),
    ]
    for model, error, message in cases:
        with pytest.raises(error, match=message):
            spectral_ext.bake(model)


def test_an_error_leaves_the_model_as_it_was():
    net = normalized("both")
    net(inputs())
    spectral_ext.fuse(net)
    net.head.parametrizations.weight[0]._u = torch.ones(3, dtype=torch.float64)
    before, modes = net.state_dict(), [m.training for m in net.modules()]
    with pytest.raises(ValueError, match=r"head\.weight"):
        spectral_ext.bake(net, inplace=True)
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [m.training for m in net.modules()] == modes
    assert len(spectral_ext.group_of(net).layers) == len(NORMS)


class Heads(nn.Module):
    """Each forward calls one of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = (hook(linear(16, n)) for n in (16, 4, 1))

    def forward(self, x: torch.Tensor, head: str = "a") -> torch.Tensor:
        return self.get_submodule(head)(self.body(x).tanh())


def linear(*size: int) -> nn.Linear:
    """Return a layer that W/σ differs from by far."""
    layer = nn.Linear(*size, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(5)
    return layer


def iterate(net: nn.Module, heads: str, steps: int = 20) -> nn.Module:
    for head in heads * steps:
        net(torch.ones(2, 16, dtype=torch.float64), head)
    return net


def heads(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Heads()


def assert_evaluates_as(baked: nn.Module, net: nn.Module) -> None:
    """As a model of PyTorch's that has loaded the same checkpoint."""
    stock = heads(9)
    stock.load_state_dict(spectral_ext.stock_state_dict(net, layout="hook"))
    x = torch.randn(3, 16, dtype=torch.float64)
    for head in "ab":
        assert_close(baked(x, head), stock.eval()(x, head))


how = pytest.mark.parametrize("is_fused", [False, True], ids=["stock", "fused"])


@how
def test_a_trained_head_that_did_not_run_before_bake_is_folded(is_fused):
    net = heads(1)
    net.load_state_dict(iterate(heads(), "ab").state_dict())
    if is_fused:
        spectral_ext.fuse(net)
    iterate(net.eval(), "a", 1)
    assert_evaluates_as(spectral_ext.bake(net), net)


def test_a_head_that_ran_before_the_model_was_fused_is_folded():
    net = iterate(heads(), "ab")
    spectral_ext.fuse(net)
    iterate(net, "a")
    reason = spectral_ext.report(net).skipped["b.weight"]
    assert reason.startswith("no forward of the fused model has called its module yet")
    assert_evaluates_as(spectral_ext.bake(net), net)


@how
def test_a_frozen_layer_that_has_loaded_other_vectors_is_folded(is_fused):
    net = heads(1)
    net.body.weight_orig.requires_grad_(False)
    iterate(net, "ab")
    net.load_state_dict(iterate(heads(), "ab").state_dict())
    if is_fused:
        spectral_ext.fuse(net)
    assert_evaluates_as(spectral_ext.bake(net), net)


class BesideOneThatRan(nn.Sequential):
    """Another layer of the model has run, so that the model is not new."""

    def __init__(self, layer):
        super().__init__(layer, hook(linear(32, 32)))
        self[1](torch.zeros(1, 32, dtype=torch.float64))

    def forward(self, x):
        return self[0](x)


@how
@pytest.mark.parametrize("size", [(64, 1), (1, 64), (64, 8)], ids=str)
def test_vectors_that_were_never_iterated_are_told_in_every_shape(size, is_fused):
    """Where a vector has one element, it is ±1 and always fits."""
    for seed in range(8):
        torch.manual_seed(seed)
        net = BesideOneThatRan(hook(linear(*size)))
        weight = net[0].weight_orig
        if is_fused:
            spectral_ext.fuse(net)
        message = r"^0\.weight: the layer was never called .* leaves its weight as it is"
        with pytest.warns(UserWarning, match=message) as caught:
            baked = spectral_ext.bake(net)
        assert len(caught) == 1
        assert torch.equal(baked[0].weight, weight)
        x = torch.randn(2, size[0], dtype=torch.float64)
        expected = net.eval()(x)
        with pytest.warns(UserWarning, match=r"^0\.weight: .* a wrong σ, as in eval") as caught:
            baked = spectral_ext.bake(net)
        assert len(caught) == 1
        assert_close(baked(x), expected)
        net.train()(x)
        assert_close(spectral_ext.bake(net)(x), net.eval()(x))  # without a warning


@how
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_iterations_show_in_weights_of_any_size(factor, is_fused):
    torch.manual_seed(0)
    net = BesideOneThatRan(nn.Linear(8, 6))
    with torch.no_grad():
        net[0].weight.mul_(factor)
    hook(net[0], eps=0)
    if is_fused:
        spectral_ext.fuse(net)
    with pytest.warns(UserWarning, match="never called"):
        spectral_ext.bake(net)
    with torch.no_grad():
        net[0].weight_u.copy_(torch.linalg.svd(net[0].weight_orig / factor)[0][:, 0])
        net[0].weight_v.copy_(torch.linalg.svd(net[0].weight_orig / factor)[2][0])
    with torch.autocast("cpu"):
        baked = spectral_ext.bake(net)  # without a warning
    assert torch.linalg.matrix_norm(baked[0].weight, 2).allclose(torch.ones(()))


@how
def test_a_weight_of_zero_that_was_not_called_stays_zero(is_fused):
    """PyTorch's hook divides it by zero."""
    net = BesideOneThatRan(nn.Linear(3, 3))
    nn.init.zeros_(net[0].weight)
    hook(net[0])
    if is_fused:
        spectral_ext.fuse(net)
    with pytest.warns(UserWarning, match="never called"):
        baked = spectral_ext.bake(net)
    assert not baked[0].weight.any()


def test_a_pruned_weight_that_stays_raw():
    torch.manual_seed(0)
    net = BesideOneThatRan(hook(linear(16, 8)))
    spectral_ext.fuse(net)
    prune.l1_unstructured(net[0].parametrizations.weight, "original", amount=0.5)
    with pytest.warns(UserWarning, match="never called"):
        baked = spectral_ext.bake(net)
    assert torch.equal(baked[0].weight, net[0].parametrizations.weight.original)


@how
def test_a_model_that_never_ran_is_as_in_evaluation(is_fused):
    torch.manual_seed(0)
    net = nn.Sequential(hook(linear(32, 32)), nn.Tanh(), hook(linear(32, 32))).eval()
    if is_fused:
        spectral_ext.fuse(net)
    with pytest.warns(UserWarning, match="a wrong σ, as in evaluation") as caught:
        baked = spectral_ext.bake(net)
    assert len(caught) == 2
    x = torch.randn(3, 32, dtype=torch.float64)
    assert_close(baked(x), net(x))
