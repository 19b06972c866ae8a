"""torch.compile of fused models: one graph, the numbers of the uncompiled model."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from nets import OURS, STOCK, assert_close, assert_same_state, inputs, make
from torch import nn

import spectral_ext
from spectral_ext import backends
from spectral_ext.nn.active import active


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("what", "kind"), [("model", "stock"), ("forward", "ours")])
def test_compiled_model_trains_like_the_uncompiled(kind, what, backend):
    kinds = [STOCK, OURS][kind == "ours"]
    eager, net = (make(kinds["u_first"], kinds["v_first"]) for _ in range(2))
    for model in (eager, net):
        spectral_ext.fuse(model, backend=backend)
    compiled = torch.compile(
        net if what == "model" else net.forward, fullgraph=True, backend="aot_eager"
    )
    for training in (True, False):
        for model in (eager, net):
            model.train(training)
        for step in range(3):
            losses = []
            for model, call in ((eager, eager), (net, compiled)):
                model.zero_grad()
                losses.append(call(inputs(step)).square().sum())
                losses[-1].backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.02 * parameter.grad
            assert_close(losses[1], losses[0])
            assert_same_state(net, eager)
            assert_close(spectral_ext.group_of(net).sigmas, spectral_ext.group_of(eager).sigmas)
        with torch.no_grad():
            assert_close(compiled(inputs()), eager(inputs()))
    assert active.record is None
    # Nothing stays in force.
    assert spectral_ext.group_of(net).visible.record is None
    assert_close(net(inputs()), eager(inputs()))


def test_one_graph_for_each_mode(backend):
    net = make(OURS["u_first"])
    spectral_ext.fuse(net, backend=backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for training in (True, False, True, False):
        net.train(training)
        for step in range(4):
            compiled(inputs(step)).sum().backward()
    assert counter.frame_count == 2


class Body(nn.Sequential):
    """Torch compiles no forward of its own package as one graph."""

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_part_of_a_fused_model(training, backend):
    stock, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    spectral_ext.fuse(net, backend=backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    net.body.__class__ = Body
    net.body.compile(fullgraph=True, backend=counter)
    for model in (stock, net):
        model.train(training)
    for step in range(3):
        for model in (stock, net):
            model.zero_grad()
            model(inputs(step)).sum().backward()
        assert_same_state(net, stock)
    assert counter.frame_count == 1
    x = torch.ones(2, 48, dtype=torch.float64)
    assert_close(net.body(x), stock.body(x))  # outside of a forward each layer computes alone
    assert_same_state(net, stock)


def test_a_compiled_part_with_an_exchanged_weight(backend):
    net = make(STOCK["u_first"]).eval()
    group = spectral_ext.fuse(net, backend=backend)
    net.body.__class__ = Body
    x = torch.ones(2, 48, dtype=torch.float64)
    other = nn.Parameter(torch.full((7, 48), 0.5, dtype=torch.float64))
    compiled = torch.compile(net.body, fullgraph=True, backend="aot_eager")
    with group.normalized():
        assert_close(compiled(x), net.body(x))
        net.body[0].parametrizations.weight.original = other
        assert_close(compiled(x), net.body(x))


def test_a_compiled_part_that_wants_gradients_after_an_entry_without(backend):
    net = make(STOCK["u_first"]).eval()
    group = spectral_ext.fuse(net, backend=backend)
    net.body.__class__ = Body
    compiled = torch.compile(net.body, fullgraph=True, backend="aot_eager")
    x = torch.ones(2, 48, dtype=torch.float64)
    grads = []
    for call in (net.body, compiled):
        net.zero_grad()
        with torch.no_grad():
            entry = group.normalized()
            entry.__enter__()
        call(x).sum().backward()
        entry.__exit__(None, None, None)
        grads.append(net.body[0].parametrizations.weight.original.grad)
    assert_close(grads[1], grads[0])


def test_tied_weights(backend):
    def tied():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
        net[1].weight = net[0].weight
        for layer in net:
            STOCK["u_first"](layer, "weight")
        spectral_ext.fuse(net, backend=backend)
        return net

    eager, net = tied(), tied()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.ones(2, 4, dtype=torch.float64)
    for _ in range(2):
        assert_close(compiled(x), eager(x))
    for a, b in zip(net.state_dict().values(), eager.state_dict().values(), strict=True):
        assert_close(a, b)


def test_an_unpickled_layer_is_compiled_at_once(backend, monkeypatch):
    """In a process that has chosen no backend yet: the choice imports, which cannot be traced."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, x):
            return x @ self.linear.weight.T

    net = Layer()
    spectral_ext.spectral_norm(net.linear, backend=backend)
    expected = copy.deepcopy(net)
    saved = pickle.dumps(net.linear)
    monkeypatch.setattr(backends, "_chosen", {})
    net.linear = pickle.loads(saved)
    x = torch.ones(2, 3, dtype=torch.float64)
    assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected(x))


@pytest.mark.parametrize("settings", [{}, {"check_finite": True, "update": "manual"}], ids=str)
def test_settings_beyond_stock(backend, settings):
    """All of them in one graph, with the numbers of the uncompiled model."""
    options = [
        {"bound": 0.3},
        {"scale": 2.0, "detach_sigma": True},
        {"gain": "sigma_per_channel"},
        {"tol": 0.05, "max_power_iterations": 4},
        {"blocks": 3},
    ]
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6, dtype=torch.float64) for _ in options]
        layers = [spectral_ext.spectral_norm(x, **o) for x, o in zip(layers, options, strict=True)]
        nets.append(nn.Sequential(*layers))
        spectral_ext.fuse(nets[-1], backend=backend, **settings)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(nets[1], fullgraph=True, backend=counter)
    for step in range(3):
        x = torch.randn(2, 6, dtype=torch.float64)
        for net, call in ((nets[0], nets[0]), (nets[1], compiled)):
            net.zero_grad()
            call(x).square().sum().backward()
        for (name, found), expected in zip(
            nets[1].named_parameters(), nets[0].parameters(), strict=True
        ):
            assert_close(found.grad, expected.grad, f"{name} in step {step}", rtol=1e-10)
        for found, expected in zip(nets[1].buffers(), nets[0].buffers(), strict=True):
            assert_close(found, expected)
    assert counter.frame_count <= 2
    if settings:
        with torch.no_grad():
            nets[1][2].parametrizations.weight.original[0, 0] = float("nan")
        compiled(x)
        with pytest.raises(FloatingPointError, match=r"2\.weight"):
            spectral_ext.group_of(nets[1]).check()


@pytest.mark.filterwarnings("error:.*its forward was never called")
def test_compiled_forwards_count():
    net = make(STOCK["u_first"], STOCK["v_first"])
    group = spectral_ext.fuse(net)
    compiled = torch.compile(net, backend="eager")
    compiled(inputs())
    assert "compiled forwards" in repr(group)
    layer = group.layers[0]
    for _ in range(20 * len(group.layers) + 60):
        getattr(layer.module, layer.tensor_name)
