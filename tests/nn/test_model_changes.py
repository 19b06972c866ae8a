"""A fused model whose modules are replaced, taken out, put back, added, offloaded or never entered."""

import gc
import io
import warnings
import weakref

import pytest
import torch
from nets import assert_close
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext


def layer(scale=1.0, norm=parametrizations.spectral_norm):
    module = nn.Linear(4, 4, dtype=torch.float64)
    with torch.no_grad():
        module.weight.mul_(scale)
    return norm(module)


def x(seed=0):
    return torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def names(group):
    return [layer.qualified_name for layer in group.layers]


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(layer(), nn.Tanh())
        self.b, self.c = layer(10), layer(100)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def vectors(module):
    norm = module.parametrizations.weight[0]
    return [norm._u.clone(), norm._v.clone()]


@pytest.fixture
def pair(backend):
    nets = []
    for (
        _
    ) in "12":  # the class that torch gives a layer is shared by its copies, and holds the layer
        torch.manual_seed(0)
        nets.append(Parts())
    net, stock = nets
    return net, spectral_ext.fuse(net, backend=backend, check_finite=True), stock


LEAVES = {
    "replaced": lambda net: setattr(net, "b", nn.Linear(4, 4, dtype=torch.float64)),
    "by another with a norm": lambda net: setattr(net, "b", layer()),
    "identity": lambda net: setattr(net, "b", nn.Identity()),
    "norm removed": lambda net: parametrize.remove_parametrizations(net.b, "weight"),
    "fused elsewhere": lambda net: spectral_ext.fuse(net.b),
}


@pytest.mark.parametrize("forwards", [0, 1])
@pytest.mark.parametrize("how", LEAVES)
def test_what_a_group_tells_belongs_to_the_layers_that_it_names(pair, how, forwards):
    net, group, _ = pair
    net(x())
    sigmas = dict(zip(names(group), group.sigmas.tolist(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a layer that is in no group
        LEAVES[how](net)
        for _ in range(forwards):
            net(x())
        assert names(group) == ["a.0.weight", "c.weight"]
        for name, sigma in zip(names(group), group.sigmas.tolist(), strict=True):
            assert sigma == pytest.approx(sigmas[name], rel=0.05), name
            assert group.sigma_of(name) == pytest.approx(sigma)
            assert group.log_dict()[f"spectral_norm/sigma/{name}"] == pytest.approx(sigma)
        assert group.iterations.tolist() == [1, 1]
        assert group.residuals.shape == (2,)
        assert "b.weight" not in repr(group)
        net(x())
    group.check()


def test_a_bad_sigma_is_told_of_the_layer_that_had_it(pair):
    net, group, _ = pair
    net(x())
    with torch.no_grad():
        net.b.parametrizations.weight.original.fill_(torch.nan)
        net(x())
    net.b = nn.Identity()
    net(x())
    with pytest.raises(FloatingPointError, match=r"check: b\.weight$"):
        group.check()
    group.check()


@pytest.mark.parametrize("how", ["replaced", "identity", "deleted"])
def test_a_layer_that_left_is_neither_computed_nor_kept_alive(pair, how):
    net, *_ = pair
    if how == "deleted":
        del net.c
        net.c = nn.Identity()
    else:
        net.c = nn.Identity() if how == "identity" else nn.Linear(4, 4, dtype=torch.float64)
    net(x())
    old = net.b
    net.b = nn.Identity()
    before = vectors(old)
    net(x())
    assert all(torch.equal(a, b) for a, b in zip(vectors(old), before, strict=True))
    gone = weakref.ref(old)
    del old
    net(x())
    gc.collect()
    assert gone() is None
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert names(spectral_ext.group_of(loaded)) == ["a.0.weight"]


def test_a_layer_that_is_put_back_belongs_to_the_group_again(pair):
    net, group, stock = pair
    for model in (net, stock):
        model(x())
        head, model.c = model.c, nn.Identity()
        model(x(1))
        assert model is stock or names(group) == ["a.0.weight", "b.weight"]
        model.c = head
        y = model(x(2))
        y.square().sum().backward()
        if model is net:
            assert names(group) == ["a.0.weight", "b.weight", "c.weight"]
            expected = y
        else:
            assert_close(expected, y, "output")
    assert_close(
        net.c.parametrizations.weight.original.grad,
        stock.c.parametrizations.weight.original.grad,
        "gradient",
    )


def test_moved_layers_are_named_after_their_new_place(pair):
    net, group, _ = pair
    net(x())
    net.b, net.c = net.c, net.b
    net(x())
    assert sorted(names(group)) == ["a.0.weight", "b.weight", "c.weight"]
    assert group.sigma_of("b") > 50 > group.sigma_of("c")


NORMS = {
    "torch's": parametrizations.spectral_norm,
    "torch's hook": hook_spectral_norm,
    "ours": spectral_ext.spectral_norm,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("how", ["in the place of another", "one more"])
def test_a_norm_that_came_later_and_is_in_no_group_is_told_once(norm, how, backend):
    net = nn.Sequential(layer(), nn.Tanh(), layer())
    spectral_ext.fuse(net, backend=backend)
    net(x())
    new = layer(norm=NORMS[norm])
    name = "2" if how == "in the place of another" else "3"
    net.add_module(name, new)
    with pytest.warns(UserWarning, match=rf"{name}\.weight has a spectral norm but is in no group"):
        net(x())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x())
        spectral_ext.fuse(net, backend=backend)
        net(x())
    assert f"{name}.weight" in names(spectral_ext.group_of(net))


def test_what_was_left_out_on_purpose_is_not_told(backend):
    net = nn.Sequential(layer(), nn.Tanh(), layer(), nn.Tanh())
    spectral_ext.fuse(net, exclude="2", backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x())
        net[3] = nn.Identity()
        net.append(nn.Identity())
        net(x())


def test_a_weight_on_the_meta_device_is_computed_when_it_is_loaded(backend):
    """As offloading does it: a hook of the list of parametrizations loads the weight for its call."""
    net = Parts().eval()
    group = spectral_ext.fuse(net, backend=backend)
    expected = net(x())
    list_ = net.b.parametrizations.weight
    tensors = {"original": (list_._parameters, list_.original)}
    tensors |= {name: (list_[0]._buffers, list_[0]._buffers[name]) for name in ("_u", "_v")}

    def offload(*_):
        for name, (home, tensor) in tensors.items():
            key = name if name in home else "original"
            home[key] = nn.Parameter(tensor.to("meta")) if key == "original" else tensor.to("meta")

    def load(*_):
        for name, (home, tensor) in tensors.items():
            home[name if name in home else "original"] = tensor

    forward = list_.forward

    def loaded_for_a_call(*args):
        load()
        try:
            return forward(*args)
        finally:
            offload()

    offload()
    list_.forward = loaded_for_a_call
    for _ in range(2):
        assert_close(net(x()), expected, "output")
    assert names(group) == ["a.0.weight", "c.weight"]
    del list_.forward
    load()
    assert_close(net(x()), expected, "output")
    assert names(group) == ["a.0.weight", "b.weight", "c.weight"]


def test_a_group_without_layers(backend):
    for autocast in (False, True):
        net = nn.Sequential(layer())
        group = spectral_ext.fuse(net, backend=backend, autocast=autocast)
        parametrize.remove_parametrizations(net[0], "weight")
        with torch.autocast("cpu", enabled=autocast):
            net(x())
        assert group.sigmas.shape == group.iterations.shape == group.residuals.shape == (0,)
        assert "0 layers" in repr(group)
        group.log_dict()


def test_a_group_that_is_never_entered_is_told_once(backend):
    class Scores(Parts):
        def score(self, x):
            return Parts.forward(self, x)

    net = Scores()
    group = spectral_ext.fuse(net, backend=backend)
    assert "0 forwards" in repr(group)
    with pytest.warns(
        UserWarning, match="Scores is fused, but its forward was never called"
    ) as told:
        for _ in range(60):
            net.score(x())
    assert len(told) == 1
    net(x())
    assert "1 forwards" in repr(group)


def test_a_group_that_is_entered_by_hand_is_not_told_of(backend):
    net = Parts()
    group = spectral_ext.fuse(net, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            with group.normalized():
                Parts.forward(net, x())


def test_a_group_is_not_called_in_the_place_of_its_model():
    net = Parts()
    with pytest.raises(TypeError, match=r"changes \w*Parts in place"):
        spectral_ext.fuse(net)(x())
    with pytest.raises(TypeError, match="name must be that of a layer, got 0"):
        spectral_ext.group_of(net).sigma_of(0)


def count_plans(monkeypatch):
    """Return a list that grows by the number of layers of every plan that is made."""
    import sys

    made = []
    module = sys.modules[spectral_ext.SpectralGroup.__module__]

    class Counted(module.Plan):
        def __init__(self, layers, *rest):
            made.append(len(layers))
            super().__init__(layers, *rest)

    monkeypatch.setattr(module, "Plan", Counted)
    return made


@pytest.mark.parametrize("norm", NORMS)
def test_work_grows_with_the_number_of_layers(norm, monkeypatch):
    made = count_plans(monkeypatch)
    works = []
    for count in (10, 20):
        net = nn.Sequential(*(layer(norm=NORMS[norm]) for _ in range(count)))
        work = []
        for change in (spectral_ext.fuse, spectral_ext.fuse, settings_of_all, spectral_ext.unfuse):
            made.clear()
            change(net)
            work.append(sum(made))
        works.append(work)
    assert all(more <= 2 * few for few, more in zip(*works, strict=True)), works


def settings_of_all(net):
    for module in net:
        module.parametrizations.weight[0].n_power_iterations = 2
    net(x())
    module = net[-1].parametrizations.weight[0]
    assert spectral_ext.group_of(net).iterations.tolist() == [2] * len(net)
    module.n_power_iterations = 3
    net(x())
    assert spectral_ext.group_of(net).iterations.tolist()[-1] == 3
