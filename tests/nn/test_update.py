"""``update="step"`` and ``"manual"``: one computation for all forwards between two changes of a weight."""

import copy
import weakref

import pytest
import torch
from nets import OURS, STOCK, assert_close, assert_same_state, inputs, make, matrices_only, state
from torch import nn

import spectral_ext


@pytest.fixture(params=["a_vector_too", "matrices_only"], autouse=True)
def with_and_without_a_vector(request):
    if request.param == "matrices_only":
        with matrices_only():
            yield
    else:
        yield


def fused(backend, update="step", **settings):
    net = make(OURS["u_first"])
    return net, spectral_ext.fuse(net, update=update, backend=backend, **settings)


def vectors(net):
    return {key: value for key, value in state(net).items() if key[-2:] in (" u", " v")}


def advanced(net, before):
    return any(not torch.equal(value, before[key]) for key, value in vectors(net).items())


def reference_with_one_update(net):
    """Return stock that has made the same update as a forward of ``net`` makes, and will make no other."""
    stock = make(STOCK["u_first"])
    stock.load_state_dict(spectral_ext.stock_state_dict(net))
    stock(inputs())
    return stock.eval()


@pytest.mark.parametrize("bucket_mb", [None, 1e-4])
def test_forwards_of_one_step_share_a_computation_and_have_stock_s_gradients(backend, bucket_mb):
    """Separate backward calls, accumulation, and a backward after another forward."""
    net, _ = fused(backend, bucket_mb=bucket_mb)
    stock = reference_with_one_update(net)
    before = vectors(net)
    for model in (stock, net):
        first, second = (model(inputs(i)).square().sum() for i in range(2))
        first.backward()
        (model(inputs(2)).sum() + second).backward()
    assert advanced(net, before)
    assert_same_state(net, stock)


def test_a_second_forward_computes_nothing(backend, monkeypatch):
    net, group = fused(backend)
    net(inputs())
    before, sigmas = state(net), group.sigmas.clone()
    monkeypatch.setattr(group, "_normalize", lambda *_: pytest.fail("it was computed again"))
    net(inputs(1))
    with torch.no_grad():
        net(inputs(1))
    assert all(torch.equal(value, before[key]) for key, value in state(net).items())
    assert torch.equal(group.sigmas, sigmas)


CHANGES = {
    "optimizer": lambda net, group: torch.optim.SGD(net.parameters(), 0.1).step(),
    "fused optimizer": lambda net, group: torch.optim.Adam(net.parameters(), fused=True).step(),
    "foreach optimizer": lambda net, group: torch.optim.Adam(net.parameters(), foreach=True).step(),
    "load_state_dict": lambda net, group: net.load_state_dict(
        {k: v * 1.5 for k, v in net.state_dict().items()}
    ),
    "in place": lambda net, group: nn.init.normal_(net.head.parametrizations.weight.original),
    "another memory": lambda net, group: setattr(
        net.head.parametrizations.weight.original, "data", torch.randn(1, 6, dtype=torch.float64)
    ),
    "another parameter": lambda net, group: setattr(
        net.head.parametrizations.weight, "original", nn.Parameter(torch.randn(1, 6).double())
    ),
    "a setting": lambda net, group: setattr(net.head.parametrizations.weight[0], "scale", 2.0),
    "by hand": lambda net, group: (
        net.head.parametrizations.weight.original.data.mul_(-2),
        group.invalidate(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_computed_again(backend, change):
    net, group = fused(backend)
    net(inputs()).square().sum().backward()
    CHANGES[change](net, group)
    stock = reference_with_one_update(net)
    scale = 2.0 if change == "a setting" else 1.0
    before = vectors(net)
    with group.normalized():
        assert_close(net.head.weight, scale * stock.head.weight, "weight")
    assert advanced(net, before)
    again = vectors(net)
    net(inputs())
    assert not advanced(net, again)


def test_an_optimizer_of_other_parameters_changes_nothing(backend):
    net, _ = fused(backend)
    other = nn.Linear(2, 2)
    other(torch.randn(1, 2)).sum().backward()
    net(inputs())
    before = vectors(net)
    torch.optim.SGD(other.parameters(), 0.1).step()
    net(inputs())
    assert not advanced(net, before)


def test_frozen_in_the_generator_s_step(backend):
    """The gradient goes through to the input, and to no weight."""
    net, _ = fused(backend)
    stock = reference_with_one_update(net)
    net(inputs())
    for model in (stock, net):
        model.requires_grad_(False)
    xs = [inputs(1).requires_grad_() for _ in "12"]
    for model, x in zip((stock, net), xs, strict=True):
        model(x).square().sum().backward()
    assert_close(xs[1].grad, xs[0].grad, "gradient of the input")
    net.requires_grad_(True)
    stock.requires_grad_(True)
    for model in (stock, net):
        model(inputs(2)).square().sum().backward()
    assert_same_state(net, stock)


def test_an_evaluation_computes_and_training_goes_on(backend):
    net, _ = fused(backend)
    before = vectors(net)
    stock = make(STOCK["u_first"]).eval()
    stock.load_state_dict(spectral_ext.stock_state_dict(net))
    net.eval()
    assert_close(net(inputs()), stock(inputs()), "output")
    assert not advanced(net, before)
    net.train()(inputs())
    assert advanced(net, before)  # not with the weights of the evaluation


def test_a_forward_without_gradients_first(backend):
    net, _ = fused(backend)
    stock = reference_with_one_update(net)
    with torch.no_grad():
        net(inputs())
    for model in (stock, net):
        model(inputs(1)).square().sum().backward()
    assert_same_state(net, stock)


def test_by_hand(backend):
    net, group = fused(backend, "manual")
    stock = make(STOCK["u_first"]).eval()
    stock.load_state_dict(spectral_ext.stock_state_dict(net))
    before = vectors(net)
    for model in (stock, net):
        model(inputs()).square().sum().backward()
    assert_same_state(net, stock)
    assert not advanced(net, before)
    with torch.no_grad():
        for model in (stock, net):
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert_close(net(inputs()), stock(inputs()), "output")
    group.iterate()
    stock.train()(inputs())
    stock.eval()
    assert_close(net(inputs()), stock(inputs()), "output")
    assert_same_state(net, stock)


@pytest.mark.parametrize("update", ["manual", "step"])
def test_a_forward_takes_what_iterate_has_computed(backend, monkeypatch, update):
    net, group = fused(backend, update)
    group.iterate()
    monkeypatch.setattr(group, "_normalize", lambda *_: pytest.fail("it was computed again"))
    net(inputs())


def test_second_derivatives(backend):
    net, _ = fused(backend)
    stock = reference_with_one_update(net)
    net(inputs(1))
    for model in (stock, net):
        x = inputs().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert_same_state(net, stock)


def test_copies_have_their_own_weights(backend):
    net, _ = fused(backend)
    net(inputs())
    net.zero_grad()
    other = copy.deepcopy(net)
    assert spectral_ext.group_of(other).update == "step"
    before = state(net)
    with torch.no_grad():
        other.head.parametrizations.weight.original.mul_(3)
    other(inputs())
    net(inputs())
    assert all(torch.equal(value, before[key]) for key, value in state(net).items())


def test_memory_of_a_step_is_given_back(backend):
    """The kept weights are one set, and a graph that is gone holds none of them."""
    net, group = fused(backend)
    net(inputs()).sum().backward()
    kept = weakref.ref(group._kept.parts[0][0].normalized[0])
    assert kept() is not None
    with torch.no_grad():
        net.head.parametrizations.weight.original.mul_(2)
    net(inputs())
    assert kept() is None


def test_unknown_update():
    with pytest.raises(ValueError, match="update must be one of"):
        spectral_ext.fuse(make(OURS["u_first"]), update="never")
