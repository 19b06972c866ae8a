"""fuse and unfuse: what is taken over, what comes back, and what is refused."""

import copy
import re

import pytest
import torch
from nets import (
    NORMS,
    OURS,
    STOCK,
    Net,
    assert_close,
    assert_same_state,
    inputs,
    make,
    remove,
    state,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext
from spectral_ext.nn import SpectralNorm

KINDS = {
    "parametrization": (STOCK["u_first"],),
    "hook": (STOCK["v_first"],),
    "both": (STOCK["u_first"], STOCK["v_first"]),
    "ours": (OURS["u_first"], OURS["v_first"]),
    "mixed": (STOCK["v_first"], OURS["u_first"], STOCK["u_first"], OURS["v_first"]),
}


def anatomy(net: nn.Module) -> list[object]:
    """All that makes a model: classes, hooks, and names in their order."""
    found: list[object] = [list(net.state_dict()), [n for n, _ in net.named_parameters()]]
    for name, module in net.named_modules():
        hooks = [
            [type(getattr(hook, "hook", hook)) for hook in hooks.values()]
            for hooks in (
                module._forward_pre_hooks,
                module._state_dict_hooks,
                module._load_state_dict_pre_hooks,
            )
        ]
        ours = "_spectral_class" in type(module).__dict__
        attributes = sorted(set(module.__dict__) - {"weight", "bias"})
        found.append((name, type(module).__name__, ours, module.training, hooks, attributes))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_fuse_takes_over_and_unfuse_gives_back(kind, backend):
    net = make(*KINDS[kind])
    net(inputs()).sum().backward()
    before, shape = state(net), anatomy(net)
    parameters = {id(p) for p in net.parameters()}
    random = torch.get_rng_state()
    group = spectral_ext.fuse(net, backend=backend)
    assert torch.equal(random, torch.get_rng_state())
    after = state(net)
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {id(p) for p in net.parameters()} == parameters
    assert isinstance(net, Net)
    layers = {(layer.name, layer.tensor_name): layer for layer in group.layers}
    assert layers.keys() == {norm[:2] for norm in NORMS}
    for name, tensor_name, settings in NORMS:
        layer = layers[name, tensor_name]
        assert layer.n_power_iterations == settings.get("n_power_iterations", 1)
        assert layer.eps == settings.get("eps", 1e-12)
        assert layer.dim == settings.get("dim", int(layer.name == "up"))

    assert spectral_ext.unfuse(net) is net
    assert anatomy(net) == shape
    assert {id(p) for p in net.parameters()} == parameters
    restored = state(net)
    assert all(torch.equal(restored[key], before[key]) for key in before)
    with pytest.raises(ValueError, match="not fused"):
        spectral_ext.group_of(net)


def test_unfuse_keeps_the_order_of_parameters_and_buffers():
    """Optimizers save their state by it."""
    net = hook_spectral_norm(nn.Linear(3, 2))
    net.gain = nn.Parameter(torch.ones(2))
    net.register_buffer("count", torch.ones(2))
    hook_spectral_norm(net, "bias")
    shape = anatomy(net)
    with pytest.warns(
        UserWarning, match=r"weight of Linear, bias of Linear: fuse changes the order"
    ):
        spectral_ext.fuse(net)
    spectral_ext.unfuse(net)
    assert anatomy(net) == shape


@pytest.mark.parametrize("kind", KINDS)
def test_fusing_after_training_goes_on_as_stock(kind, backend):
    order = {"parametrization": ["u_first"], "hook": ["v_first"]}.get(kind)
    if order is None:
        order = {"both": ["u_first", "v_first"], "ours": ["u_first", "v_first"]}.get(
            kind, ["v_first", "u_first", "u_first", "v_first"]
        )
    stock, net = make(*(STOCK[o] for o in order)), make(*KINDS[kind])
    for step in range(6):
        if step in (2, 5):
            spectral_ext.fuse(net, backend=backend)
        if step == 4:
            spectral_ext.unfuse(net)
        for model in (stock, net):
            model.zero_grad()
            model(inputs(step)).square().sum().backward()
        assert_same_state(net, stock)


def test_inside_a_forward_every_access_gives_the_same_tensor():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = parametrizations.spectral_norm(nn.Linear(4, 4))

        def forward(self, x):
            self.seen = [self.layer.weight, self.layer.weight]
            return self.layer(self.layer(x))

    net = Twice()
    spectral_ext.fuse(net)
    norm = net.layer.parametrizations.weight[0]
    stock = parametrizations._SpectralNorm(net.layer.parametrizations.weight.original)
    stock._u, stock._v = norm._u.clone(), norm._v.clone()
    net(torch.randn(2, 4))
    assert net.seen[0] is net.seen[1]
    stock(net.layer.parametrizations.weight.original)  # once
    assert_close(norm._u, stock._u, rtol=1e-5)
    assert net.layer.weight is not net.layer.weight  # outside


def test_fusing_twice_changes_nothing(backend):
    net = make(STOCK["u_first"], STOCK["v_first"])
    first = spectral_ext.fuse(net, backend=backend)
    before, shape = state(net), anatomy(net)
    second = spectral_ext.fuse(net, backend=backend)
    assert anatomy(net) == shape
    assert all(torch.equal(a, before[key]) for key, a in state(net).items())
    assert spectral_ext.group_of(net) is second
    assert first.layers == ()
    assert len(second.layers) == len(NORMS)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"include": "^body"}, {"body.0", "body.2"}),
        ({"include": re.compile("conv|up")}, {"conv", "up"}),
        ({"exclude": r"\.bias$"}, {"conv", "up", "body.0", "body.2", "head"}),
        ({"include": "body", "exclude": "2$"}, {"body.0"}),
        ({"include": lambda name, module: isinstance(module, nn.Conv2d)}, {"conv"}),
        ({"exclude": lambda name, module: "body" in name}, {"conv", "up", "head"}),
    ],
)
def test_include_and_exclude(arguments, names):
    net = make(STOCK["u_first"])
    group = spectral_ext.fuse(net, **arguments)
    assert {layer.name for layer in group.layers} == names
    ours = {n for n, m in net.named_modules() if isinstance(m, SpectralNorm)}
    assert {n.split(".parametrizations")[0] for n in ours} == names


def test_one_tensor_of_a_module_may_be_left_out():
    group = spectral_ext.fuse(make(STOCK["u_first"]), exclude=r"\.bias$")
    names = {layer.qualified_name for layer in group.layers}
    assert names == {f"{layer}.{name}" for layer, name, _ in NORMS} - {"body.0.bias"}


def test_fusing_again_with_less_gives_the_rest_back():
    net = make(STOCK["v_first"])
    spectral_ext.fuse(net)
    group = spectral_ext.fuse(net, exclude="^body")
    assert {layer.name for layer in group.layers} == {"conv", "up", "head"}
    assert net.body[0]._forward_pre_hooks
    assert not parametrize.is_parametrized(net.body[0])


def test_fused_parts_merge_into_the_whole():
    net = nn.Sequential(make(STOCK["u_first"]), nn.Linear(1, 1), make(STOCK["v_first"]))
    for part in (net[0], net[2]):
        spectral_ext.fuse(part)
    group = spectral_ext.fuse(net)
    assert len(group.layers) == 2 * len(NORMS)
    assert type(net[0]) is type(net[2]) is Net
    with pytest.raises(ValueError, match="not fused"):
        spectral_ext.group_of(net[0])


def test_a_part_that_is_fused_later_leaves_the_whole(backend):
    """Each layer advances once in a forward, whichever group it is in."""
    stock, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    whole = spectral_ext.fuse(net, backend=backend)
    part = spectral_ext.fuse(net.body, backend=backend)
    assert {layer.name for layer in whole.layers} == {"conv", "up", "head"}
    assert [layer.name for layer in part.layers] == ["0", "0", "2"]
    for model in (stock, net):
        model(inputs()).sum().backward()
    assert_same_state(net, stock)
    spectral_ext.unfuse(net)
    assert anatomy(net) == anatomy(stock)


def test_a_fused_part_that_is_left_out_stays_a_group():
    net = nn.Sequential(make(STOCK["u_first"]), spectral_ext.spectral_norm(nn.Linear(1, 1)))
    part = spectral_ext.fuse(net[0])
    whole = spectral_ext.fuse(net, exclude="^0")
    assert [layer.name for layer in whole.layers] == ["1"]
    assert spectral_ext.group_of(net[0]) is part
    assert len(part.layers) == len(NORMS)


def test_the_root_may_be_a_layer_itself(backend):
    torch.manual_seed(0)
    stock = parametrizations.spectral_norm(nn.Linear(4, 4).double())
    net = copy.deepcopy(stock)
    spectral_ext.fuse(net, backend=backend)
    x = torch.randn(2, 4, dtype=torch.float64)
    for _ in range(2):
        assert_close(net(x), stock(x))
        net = copy.deepcopy(net)
    parametrize.remove_parametrizations(net.eval(), "weight")
    assert "weight" in net._parameters
    assert_close(net(x), stock.eval()(x))
    spectral_ext.unfuse(net)
    assert type(net) is nn.Linear


def test_foreign_parametrization_of_a_fused_root():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = parametrizations.spectral_norm(nn.Linear(3, 3))
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.layer(x) * self.gain

    net = Gain()
    spectral_ext.fuse(net)
    parametrizations.weight_norm(net, "gain", dim=None)
    net(torch.randn(2, 3)).sum().backward()
    spectral_ext.unfuse(net)
    assert type(net).__bases__ == (Gain,)
    parametrize.remove_parametrizations(net, "gain")
    assert type(net) is Gain


def test_stacked_norms_stay_as_they_are(backend):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    def stacked():
        torch.manual_seed(0)
        first, last = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        parametrizations.spectral_norm(first)
        parametrize.register_parametrization(first, "weight", Double())
        parametrize.register_parametrization(last, "weight", Double())
        parametrizations.spectral_norm(last)
        return nn.Sequential(first, last)

    stock, net = stacked(), stacked()
    group = spectral_ext.fuse(net, backend=backend)
    assert [layer.name for layer in group.layers] == ["0"]
    assert type(net[1].parametrizations.weight[1]) is parametrizations._SpectralNorm
    x = torch.randn(2, 3, dtype=torch.float64)
    for _ in range(2):
        assert_close(net(x), stock(x))
    for a, b in zip(net.state_dict().values(), stock.state_dict().values(), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_removal_inside_a_fused_model(order, backend):
    stock, net = make(STOCK[order]).eval(), make(STOCK[order]).eval()
    group = spectral_ext.fuse(net, backend=backend)
    for i, (layer, name, _) in enumerate(NORMS):
        for model in (stock, net):
            remove(model.get_submodule(layer), name)
        assert len(group.layers) == len(NORMS) - i - 1
        assert_close(net(inputs()), stock(inputs()))
    assert group.sigmas.numel() == 0
    spectral_ext.unfuse(net)
    assert type(net) is Net


def test_tied_weights_are_computed_once(backend):
    def tied():
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)))
        net[2].weight = net[0].weight
        for layer in net:
            parametrizations.spectral_norm(layer)
        return net

    net = tied()
    group = spectral_ext.fuse(net, backend=backend)
    norms = [layer.parametrizations.weight[0] for layer in net]
    with group.normalized():
        assert net[0].weight is net[2].weight
        assert net[0].weight is not net[1].weight
    assert norms[0]._u is norms[2]._u
    assert group.sigmas.shape == (3,)
    assert group.sigmas[0] == group.sigmas[2]
    copied = copy.deepcopy(net)
    assert len({id(layer.parametrizations.weight[0]._u) for layer in copied}) == 2
    # Their gradients add up.
    net(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    assert net[0].parametrizations.weight.original.grad is not None
    # A cast makes new buffers; they are tied again.
    net.float().double()
    net(torch.ones(1, 4, dtype=torch.float64))
    assert norms[0]._u is norms[2]._u
    # They advance where one of them is in training.
    for modes, advances in (((True, False), True), ((False, True), True), ((False, False), False)):
        net[0].train(modes[0])
        net[2].train(modes[1])
        before = norms[0]._u.clone()
        net(torch.ones(1, 4, dtype=torch.float64))
        assert torch.equal(norms[0]._u, before) is not advances
    # A new parameter unties them, and so does unfuse.
    net[2].parametrizations.weight.original = nn.Parameter(torch.eye(4, dtype=torch.float64))
    net(torch.ones(1, 4, dtype=torch.float64))
    assert norms[0]._u is not norms[2]._u

    net = tied()
    spectral_ext.fuse(net)
    spectral_ext.unfuse(net)
    vectors = [layer.parametrizations.weight[0]._u for layer in net]
    assert vectors[0] is not vectors[2]
    assert vectors[0].data_ptr() != vectors[2].data_ptr()


def test_tied_weights_with_other_settings_are_computed_apart():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    parametrizations.spectral_norm(first)
    parametrizations.spectral_norm(second, dim=1)
    net = nn.Sequential(first, second)
    group = spectral_ext.fuse(net)
    with group.normalized():
        assert first.weight is not second.weight


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_layers_of_several_dtypes_and_modes(backend):
    def mixed():
        torch.manual_seed(0)
        layers = [
            nn.Linear(3, 4),
            nn.Linear(4, 5).double(),
            nn.Linear(5, 2).bfloat16(),
            nn.Linear(2, 2).to(torch.complex64),
            nn.Linear(2, 6).double().eval(),
        ]
        for layer in layers:
            parametrizations.spectral_norm(layer)
        net = nn.Sequential(*layers)
        net[4].eval()
        return net

    stock, net = mixed(), mixed()
    group = spectral_ext.fuse(net, backend=backend)
    tolerances = [1e-5, 1e-12, 2e-2, 1e-5, 1e-12]
    for _ in range(3):
        with group.normalized():
            weights = [layer.weight for layer in net]
        for layer, weight, expected, rtol in zip(net, weights, stock, tolerances, strict=True):
            assert_close(weight, expected.weight, rtol=rtol)
            vectors = layer.parametrizations.weight[0], expected.parametrizations.weight[0]
            assert_close(vectors[0]._u, vectors[1]._u, rtol=rtol)
    sigmas = group.sigmas
    assert sigmas.dtype == torch.float64
    for layer, sigma in zip(net, sigmas, strict=True):
        norm, list_ = layer.parametrizations.weight[0], layer.parametrizations.weight
        found = torch.vdot(norm._u, list_.original.to(norm._u.dtype) @ norm._v).real
        assert_close(sigma.to(found.dtype), found, rtol=2e-2)


def test_frozen_weights_stay_out_of_the_graph():
    net = make(STOCK["u_first"])
    net.conv.parametrizations.weight.original.requires_grad_(False)
    group = spectral_ext.fuse(net)
    with group.normalized():
        assert not net.conv.weight.requires_grad
        assert net.up.weight.requires_grad
    net(inputs()).sum().backward()
    assert net.conv.parametrizations.weight.original.grad is None


@pytest.mark.parametrize(("bucket_mb", "nodes"), [(1e-6, 4), (0.001, 3), (100.0, 1)])
def test_buckets_give_the_same_gradients(bucket_mb, nodes, backend):
    one, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    spectral_ext.fuse(one, backend=backend)
    group = spectral_ext.fuse(net, backend=backend, bucket_mb=bucket_mb)
    for model in (one, net):
        model(inputs()).sum().backward()
    assert_same_state(net, one, rtol=0)
    with group.normalized():
        functions = {net.get_submodule(n).weight.grad_fn for n in ("conv", "up", "body.0", "head")}
    assert len(functions) == nodes


def test_rnn_weights(backend):
    def make_rnn():
        torch.manual_seed(0)
        rnn = nn.LSTM(3, 4).double()
        hook_spectral_norm(rnn, "weight_hh_l0")
        hook_spectral_norm(rnn, "weight_ih_l0")
        return nn.Sequential(rnn)

    stock, net = make_rnn(), make_rnn()
    spectral_ext.fuse(net, backend=backend)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for _ in range(3):
        for a, b in zip(net(x)[1], stock(x)[1], strict=True):
            assert_close(a, b)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        old, net = net, copy.deepcopy(net)
        assert all(torch.equal(before[key], value) for key, value in old.state_dict().items())


class InstanceForward(Net):
    def __init__(self):
        super().__init__()
        self.forward = self.body.forward


def spoiled(**changes):
    net = make(STOCK["u_first"])
    for name, value in changes.items():
        setattr(net.body[2].parametrizations.weight[0], name, value)
    return net


def empty():
    net = make(STOCK["u_first"])
    net.body[2].parametrizations.weight.original = nn.Parameter(torch.empty(6, 0))
    return net


BAD = {
    "no module": (lambda: [nn.Linear(2, 2)], {}, TypeError, "model"),
    "nothing to fuse": (Net, {}, ValueError, "no spectral norm"),
    "all left out": (lambda: make(STOCK["u_first"]), {"exclude": "."}, ValueError, "left out"),
    "bad regular expression": (
        lambda: make(STOCK["u_first"]),
        {"include": "("},
        ValueError,
        "incl",
    ),
    "no selector": (lambda: make(STOCK["u_first"]), {"exclude": 3}, TypeError, "exclude"),
    "bucket_mb": (lambda: make(STOCK["u_first"]), {"bucket_mb": 0}, ValueError, "bucket_mb"),
    "bucket_mb, a string": (
        lambda: make(STOCK["u_first"]),
        {"bucket_mb": "25"},
        TypeError,
        "bucket_mb must be a float, got str",
    ),
    "autocast, a string": (
        lambda: make(STOCK["u_first"]),
        {"autocast": "no"},
        TypeError,
        "autocast must be a bool, got str",
    ),
    "check_finite, a number": (
        lambda: make(STOCK["u_first"]),
        {"check_finite": 1},
        TypeError,
        "check_finite must be a bool, got int",
    ),
    "no forward": (
        lambda: nn.ModuleList([make(STOCK["u_first"])]),
        {},
        TypeError,
        "ModuleList has no forward",
    ),
    "backend": (lambda: make(STOCK["u_first"]), {"backend": "gpu"}, ValueError, "gpu"),
    "forward of the instance": (InstanceForward, {}, RuntimeError, "forward"),
    "size of u": (lambda: spoiled(_u=torch.ones(3).double()), {}, ValueError, r"body\.2\.weight"),
    "size of v": (lambda: spoiled(_v=torch.ones(3).double()), {}, ValueError, r"body\.2\.weight"),
    "dtype of u": (lambda: spoiled(_u=torch.ones(7)), {}, TypeError, r"body\.2\.weight"),
    "eps": (lambda: spoiled(eps=-1.0), {}, ValueError, r"body\.2\.weight"),
    "iterations": (lambda: spoiled(n_power_iterations=0), {}, ValueError, r"body\.2\.weight"),
    "no elements": (empty, {}, ValueError, r"body\.2\.weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case):
    make_net, arguments, error, words = BAD[case]
    net = make_net()
    if isinstance(net, nn.Module):
        shape, before = anatomy(net), {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(error, match=words):
        spectral_ext.fuse(net, **arguments)
    if isinstance(net, nn.Module):
        assert anatomy(net) == shape
        after = net.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("_u", torch.ones(3).double(), ValueError),
        ("_v", torch.ones(3).double(), ValueError),
        ("_u", torch.ones(7), TypeError),
        ("eps", -1.0, ValueError),
    ],
)
def test_what_is_spoiled_later_is_named_and_nothing_advances(name, wrong, error, backend):
    net = make(STOCK["u_first"])
    spectral_ext.fuse(net, backend=backend)
    net(inputs())
    setattr(net.body[2].parametrizations.weight[0], name, wrong)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for _ in range(2):
        with pytest.raises(error, match=r"body\.2\.weight"):
            net(inputs())
    after = net.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_settings_changed_on_a_layer_count_at_once(backend):
    stock, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    spectral_ext.fuse(net, backend=backend)
    for model in (stock, net):
        model(inputs())
        model.conv.parametrizations.weight[0].n_power_iterations = 4
        model(inputs())
    assert_same_state(net, stock)


def test_nothing_is_kept_alive():
    import gc
    import weakref

    net = make(STOCK["u_first"], STOCK["v_first"])
    gone = []
    for _ in range(3):
        group = spectral_ext.fuse(net)
        net(inputs()).sum().backward()
        gone.append(weakref.ref(group))
        spectral_ext.unfuse(net)
    fused = copy.deepcopy(net)
    spectral_ext.fuse(fused)
    fused(inputs())
    gone += [weakref.ref(fused), weakref.ref(fused.conv.parametrizations.weight.original)]
    del group, fused
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


@pytest.mark.parametrize("root", ["plain", "parametrized"])
def test_a_model_that_is_fused_again_enters_its_group_once(root, backend):
    torch.manual_seed(0)
    fused, stock = (make(STOCK["u_first"]) for _ in range(2))
    for net in (fused, stock):
        if root == "parametrized":
            net.register_parameter("own", nn.Parameter(torch.ones(3, 3, dtype=torch.float64)))
            STOCK["u_first"](net, "own")
    stock.load_state_dict(fused.state_dict())
    for _ in range(2):
        spectral_ext.fuse(fused, backend=backend)
    for net in (fused, stock):
        net(inputs())
    assert_same_state(fused, stock)
    spectral_ext.unfuse(fused)
    assert "Spectral" not in type(fused).__name__
    assert "_spectral_group" not in fused.__dict__


def test_a_model_of_lazy_layers_is_refused():
    net = nn.Sequential(spectral_ext.spectral_norm(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"no spectral norm to fuse yet: 0\.weight have no weight"):
        spectral_ext.fuse(net)
    assert type(net) is nn.Sequential


def test_lazy_layers_that_are_left_out_are_told():
    net = nn.Sequential(spectral_ext.spectral_norm(nn.Linear(3, 3)))
    net.append(spectral_ext.spectral_norm(nn.LazyLinear(2)))
    with pytest.warns(UserWarning, match=r"fused without 1\.weight, which have no weight"):
        group = spectral_ext.fuse(net)
    assert [layer.qualified_name for layer in group.layers] == ["0.weight"]
    net(torch.randn(1, 3))
    assert len(spectral_ext.fuse(net).layers) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripting_is_refused_with_what_to_do():
    net = nn.Sequential(spectral_ext.spectral_norm(nn.Linear(3, 3)))
    spectral_ext.fuse(net)
    for module in (net, net[0]):
        with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile"):
            torch.jit.script(module)
    torch.jit.script(spectral_ext.bake(net))


@pytest.mark.parametrize("norm", [hook_spectral_norm, parametrizations.spectral_norm])
def test_a_model_of_inference_tensors(norm):
    with torch.inference_mode():
        net = nn.Sequential(norm(nn.Linear(3, 3)), norm(nn.Linear(3, 3))).eval()
        vectors = dict(net.named_buffers())
        next(iter(vectors.values())).zero_()  # is mended when it is fused
        x = torch.randn(2, 3)
    spectral_ext.fuse(net)
    with torch.inference_mode():
        found = net(x)
        assert spectral_ext.group_of(net).sigmas.all()
    spectral_ext.unfuse(net)
    with torch.inference_mode():
        assert_close(net(x), found, rtol=1e-6)
