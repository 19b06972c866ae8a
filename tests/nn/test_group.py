"""What is in force inside of a forward: exceptions, nesting, threads, gradients asked for late."""

import contextlib
import copy
import threading

import pytest
import torch
from nets import (
    NORMS,
    OURS,
    STOCK,
    access,
    assert_close,
    assert_same_state,
    equal_states,
    inputs,
    make,
    matrices_only,
    state,
)
from torch import nn
from torch.nn.utils import parametrize

import spectral_ext
from spectral_ext.nn.active import active


@pytest.fixture(autouse=True, params=["a_vector_too", "matrices_only"])
def norms(request):
    with matrices_only() if request.param == "matrices_only" else contextlib.nullcontext():
        yield


def read(net):
    return [getattr(net.get_submodule(layer), name) for layer, name, _ in NORMS]


def fused(backend, *kinds, **arguments):
    net = make(*(kinds or (STOCK["u_first"],)))
    return net, spectral_ext.fuse(net, backend=backend, **arguments)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_in_force_after_an_exception(error, backend):
    net, group = fused(backend)

    def fail(*_):
        assert active.record is not None
        raise error

    handle = net.body[1].register_forward_hook(fail)
    with pytest.raises(error):
        net(inputs())
    assert active.record is None
    with pytest.raises(error), group.normalized(), group.normalized():
        raise error
    assert active.record is None
    handle.remove()
    stock = make(STOCK["u_first"])
    stock.load_state_dict(net.state_dict())
    assert_close(net(inputs()), stock(inputs()))


def test_an_entry_that_fails_leaves_the_outer_one_in_force(backend):
    net, group = fused(backend)
    with group.normalized():
        weight = net.conv.weight
        norm = net.up.parametrizations.weight[0]
        right, norm._u = norm._u, torch.ones(1)
        with pytest.raises((TypeError, ValueError), match=r"up\.weight"), group.normalized():
            pass
        norm._u = right
        assert net.conv.weight is weight


@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_a_forward_inside_of_a_forward_computes_anew(order, backend):
    class Recursive(nn.Module):
        def __init__(self, apply):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
            apply(self.first, "weight")
            apply(self.last, "weight")

        def forward(self, x, depth):
            x = torch.tanh(self.first(x))
            if depth:
                x = self(x, depth - 1)
            return self.last(x)

    stock, net = Recursive(STOCK[order]), Recursive(STOCK[order])
    spectral_ext.fuse(net.last, backend=backend)
    spectral_ext.fuse(net, backend=backend)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(net(x, 0), stock(x, 0))
    for model in (net, stock):
        model(x, 1)
    for name in ("first", "last"):
        found, expected = getattr(net, name), getattr(stock, name)
        assert_close(access(found, "weight"), access(expected, "weight"))
    # Back in the outer forward, its own weights are in force again.
    group = spectral_ext.group_of(net)
    with group.normalized():
        outer = net.first.weight
        with group.normalized():
            assert net.first.weight is not outer
        assert net.first.weight is outer


def test_a_group_inside_of_another_hides_only_its_own_layers(backend):
    net, group = fused(backend)
    inner = spectral_ext.fuse(net.body, backend=backend)
    with group.normalized():
        weight = net.conv.weight
        assert net.body[0].weight is not net.body[0].weight
        with inner.normalized():
            assert net.conv.weight is weight
            assert net.body[0].weight is net.body[0].weight


def test_a_parametrization_that_was_replaced_leaves_the_group(backend):
    net, group = fused(backend)
    norm = net.conv.parametrizations.weight[0]
    before = norm._u.clone()
    net.conv.parametrizations.weight[0] = nn.Identity()
    net(inputs())
    assert torch.equal(norm._u, before)
    assert torch.equal(net.conv.weight, net.conv.parametrizations.weight.original)
    assert group.sigmas.shape == (len(group.layers),) == (len(NORMS) - 1,)


def test_a_record_is_seen_by_its_own_thread_only(backend):
    net, group = fused(backend)
    seen = []
    with group.normalized():
        thread = threading.Thread(target=lambda: seen.extend(read(net)))
        thread.start()
        thread.join()
        assert all(a is not b for a, b in zip(seen, read(net), strict=True))


def test_one_model_in_evaluation_from_eight_threads(backend):
    net, _ = fused(backend)
    net.eval()
    expected = [net(inputs(i)).detach() for i in range(8)]
    before = state(net)
    failed: list[object] = []
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        for _ in range(10):
            loss = net(inputs(i))
            if not torch.equal(loss.detach(), expected[i]) or active.record is not None:
                failed.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(torch.equal(a, before[key]) for key, a in state(net).items())


def test_one_model_per_thread(backend):
    nets = [fused(backend)[0] for _ in range(4)]

    def train(net):
        for step in range(5):
            net(inputs(step)).sum().backward()

    threads = [threading.Thread(target=train, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stock = make(STOCK["u_first"])
    train(stock)
    for net in nets:
        assert_same_state(net, stock)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_asked_for_after_an_entry_without_them(mode, training, backend):
    net, group = fused(backend, STOCK["u_first"], STOCK["v_first"])
    stock = make(STOCK["u_first"], STOCK["v_first"])
    for model in (net, stock):
        model(inputs())  # before it, an access of a layer with a hook gives the raw weight
        model.train(training)
    with mode():
        context = group.normalized()
        context.__enter__()
    try:
        after_entry = state(net)
        weights = read(net)
        assert all(weight.requires_grad for weight in weights)
        assert read(net)[0] is weights[0]
        assert all(torch.equal(a, after_entry[key]) for key, a in state(net).items())
    finally:
        context.__exit__(None, None, None)
    losses = [sum((w * w.detach().cos()).sum() for w in weights)]
    expected = [access(stock.get_submodule(layer), name) for layer, name, _ in NORMS]
    losses.append(sum((w * w.detach().cos()).sum() for w in expected))
    for loss in losses:
        loss.backward()
    assert_same_state(net, stock)


def test_without_gradients_there_is_no_graph(backend):
    net, _ = fused(backend)
    with torch.no_grad():
        assert not net(inputs()).requires_grad
    with torch.inference_mode():
        assert net(inputs()).is_inference()
    net(inputs()).sum().backward()


def test_exchanged_parameters_count(backend):
    """The whole model, and a part of it inside of its forward, called with other parameters."""
    net, group = fused(backend)
    stock = make(STOCK["u_first"])
    parameters = {
        name: (2 * p.detach() + 0.1).requires_grad_() for name, p in net.named_parameters()
    }
    for _ in range(2):
        results = []
        for model in (net, stock):
            loss = torch.func.functional_call(model, parameters, (inputs(),)).sum()
            results.append(torch.autograd.grad(loss, list(parameters.values())))
        for found, expected in zip(*results, strict=True):
            assert_close(found, expected)
        assert_same_state(net, stock)
    with group.normalized():
        weight = net.conv.weight
        part = {"parametrizations.weight.original": 3 * torch.ones_like(weight)}
        x = inputs()
        found = torch.func.functional_call(net.conv, part, (x,))
        assert net.conv.weight is weight
        assert not torch.allclose(found, net.conv(x))


def test_tensors_that_are_changed_in_place_count(backend):
    """`module.to(…)` and `.data = …` leave the parameters the same objects."""
    net, group = fused(backend)
    stock = make(STOCK["u_first"])

    def exchange(model):
        with torch.no_grad():
            weight = model.conv.parametrizations.weight.original
            weight.data = weight.data * 3

    for change in (
        exchange,
        lambda model: model.body.float(),  # float32 and float64 side by side
        lambda model: model.float(),
        exchange,
        lambda model: model.double(),
    ):
        for model in (net, stock):
            change(model)
        with group.normalized():
            found = read(net)
        expected = read(stock)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
        for loss in (sum((w * w.detach().cos()).sum() for w in ws) for ws in (found, expected)):
            loss.backward()
        for a, b in zip(net.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
            a.grad = b.grad = None
        u = net.conv.parametrizations.weight[0]._u
        right, before = u.data, state(net)
        u.data = torch.ones(2, dtype=u.dtype)
        with pytest.raises((TypeError, ValueError), match=r"conv\.weight"), group.normalized():
            pass
        u.data = right
        assert equal_states(before, state(net))


def test_copied_and_removed_layers_are_computed_alone(backend):
    net, group = fused(backend)
    with group.normalized():
        copied = copy.deepcopy(net.body)
        assert copied[0].weight is not net.body[0].weight
        assert copied[0].parametrizations.weight[0]._group is None
        parametrize.remove_parametrizations(net.conv, "weight")
        assert isinstance(net.conv.weight, nn.Parameter)
    assert len(group.layers) == len(NORMS) - 1


def test_sigmas(backend):
    net, group = fused(backend, OURS["u_first"], OURS["v_first"])
    before = state(net)

    def sigma(layer):
        norm, weight = layer.parametrization, layer.weight
        if norm.is_vector:
            return torch.linalg.vector_norm(weight)
        matrix = weight.movedim(layer.dim, 0).reshape(weight.shape[layer.dim], -1)
        return norm._u @ matrix @ norm._v

    def check():
        sigmas = group.sigmas
        assert not sigmas.requires_grad
        assert sigmas.shape == (len(NORMS),)
        for layer, found in zip(group.layers, sigmas, strict=True):
            assert_close(found, sigma(layer))
            assert torch.equal(group.sigma_of(layer.qualified_name), found)

    check()  # before any forward
    assert all(torch.equal(a, before[key]) for key, a in state(net).items())
    net(inputs())
    check()
    found = group.sigmas
    with torch.no_grad():
        net.conv.parametrizations.weight.original.mul_(2)
    assert torch.equal(group.sigmas, found)  # those of the last forward
    net.body.eval()  # two calls
    net(inputs())
    check()
    assert torch.equal(group.sigma_of("conv"), group.sigma_of("conv.weight"))
    if len(NORMS) == 6:
        with pytest.raises(KeyError, match=r"body\.0\.bias"):
            group.sigma_of("body.0")  # has two
    with pytest.raises(KeyError, match="nothing"):
        group.sigma_of("nothing")


def test_repr_tells_what_is_fused(backend):
    _, group = fused(backend, bucket_mb=2)
    text = repr(group)
    layers, parameters = len(NORMS), 541 if len(NORMS) == 6 else 534
    assert text.startswith(
        f"SpectralGroup({layers} layers, {parameters} parameters, backend {backend}, buckets of 2"
    )
    assert "up.weight: (5, 3, 2, 2), n_power_iterations=2, dim=1" in text


@pytest.mark.parametrize("order", ["u_first"])
def test_cached_spans_forwards_as_in_stock(order, backend):
    net, group = fused(backend, STOCK[order])
    stock = make(STOCK[order])
    for _ in range(2):
        with parametrize.cached():
            for model in (stock, net):
                before = model.up.weight  # one layer is read before the first forward
                first, second = model(inputs(0)), model(inputs(1))
                assert model.up.weight is before
                (first + second).sum().backward()
        assert_same_state(net, stock)
    with parametrize.cached(), group.normalized():
        assert net.conv.weight is net.conv.weight


def test_cached_keeps_the_end_of_a_stack(backend):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    nets = [make(STOCK["u_first"]), make(STOCK["u_first"])]
    for net in nets:
        parametrize.register_parametrization(net.conv, "weight", Double())
    spectral_ext.fuse(nets[1], backend=backend)
    for net in nets:
        with parametrize.cached():
            (net(inputs(0)) + net(inputs(1))).sum().backward()
    assert_same_state(nets[1], nets[0])


def replicate(module, memo=None):
    """What torch.nn.parallel.replicate does to each module, with a copy of every parameter."""
    replicas = {id(m): m._replicate_for_data_parallel() for m in module.modules()}
    for original in module.modules():
        replica = replicas[id(original)]
        for name, child in original._modules.items():
            replica._modules[name] = replicas[id(child)]
        for name, parameter in original._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
        for name, buffer in original._buffers.items():
            replica._buffers[name] = buffer
    return replicas[id(module)]


def test_replicas_of_data_parallel(backend):
    net, group = fused(backend)
    stock = make(STOCK["u_first"])
    with group.normalized():  # the replica is another model, even here
        replica = replicate(net)
        replica(inputs()).sum().backward()
    expected = make(STOCK["u_first"])
    for _ in range(2):
        stock(inputs()).sum()
    expected(inputs())
    expected(inputs()).sum().backward()
    assert spectral_ext.group_of(net) is group
    assert_same_state(net, expected)


def test_methods_other_than_forward(backend):
    net, group = fused(backend)
    stock = make(STOCK["u_first"])
    assert_close(net.body(torch.ones(1, 48).double()), stock.body(torch.ones(1, 48).double()))
    with group.normalized() as entered:
        assert entered is group
        net.body(torch.ones(1, 48).double())
        net.body(torch.ones(1, 48).double())
    read(stock)
    assert_same_state(net, stock)


def test_settings_do_not_change_what_the_last_forward_made():
    net = make(STOCK["u_first"], STOCK["v_first"])
    group = spectral_ext.fuse(net)
    net(inputs())
    before = group.iterations
    group.layers[0].parametrization.n_power_iterations = 7
    assert torch.equal(group.iterations, before)


def test_what_was_not_finite_is_noted_once_for_the_same_layers():
    net = make(STOCK["u_first"], STOCK["v_first"])
    group = spectral_ext.fuse(net, check_finite=True)
    for _ in range(3):
        net(inputs())
        group.invalidate()
    assert len(group._last._not_finite) == 1
