"""Optimizers, averages of models, pruning: the tools of torch that work on a model's parameters.

A fused model goes the way of stock's, step by step: losses, weights, u and v.
"""

import copy

import pytest
import torch
from nets import NORMS, STOCK, assert_close, assert_same_state, inputs, make, state
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as weight_norm_hook
from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    update_bn,
)

import spectral_ext

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.0, 0.9), foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, 1e-2, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=4),
    "LBFGS with a search": lambda p: torch.optim.LBFGS(
        p, max_iter=3, line_search_fn="strong_wolfe"
    ),
}


def step(net, optimizer, x):
    """Make one step, by a closure that LBFGS calls several times; return the first loss."""

    def closure():
        optimizer.zero_grad(set_to_none=x % 2 == 0)
        loss = net(inputs(x)).square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        return loss

    return optimizer.step(closure)


@pytest.mark.parametrize("settings", [{}, {"update": "step"}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, settings, backend):
    """The optimizer is made before fusing, and goes on with the same parameters and its state."""
    stock, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (stock, net)]
    for x in range(4):
        if x == 1:
            spectral_ext.fuse(net, backend=backend, **settings)
        if x == 3:
            spectral_ext.unfuse(net)
        losses = [step(*pair, x) for pair in zip((stock, net), optimizers, strict=True)]
        assert optimizers[1].state.keys() <= set(net.parameters())
        # What rounding does to a line of steps grows; RMSprop divides by small numbers.
        assert_close(losses[1], losses[0], f"loss {x}", rtol=1e-9)
        assert_same_state(net, stock, rtol=1e-8)


class Averages:
    """The ways that torch has to average a model."""

    mean = staticmethod(AveragedModel)

    @staticmethod
    def ema(model, **options):
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), **options)

    @staticmethod
    def ema_one_by_one(model, **options):
        return AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), **options)


@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers"])
@pytest.mark.parametrize("average", ["mean", "ema", "ema_one_by_one"])
def test_averages_of_a_fused_model(average, use_buffers, backend):
    """The average is fused as its model is. In evaluation its σ is that of unit vectors.

    With ``use_buffers`` it has averages of u and v, whose norms are below 1: there stock is wrong.
    """
    stock, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    spectral_ext.fuse(net, backend=backend)
    models = [(m, getattr(Averages, average)(m, use_buffers=use_buffers)) for m in (stock, net)]
    for x in range(5):
        for model, averaged in models:
            step(model, torch.optim.SGD(model.parameters(), 0.3), x)
            averaged.update_parameters(model)
    found, expected = models[1][1].module, models[0][1].module
    assert_same_state(found, expected, rtol=1e-10)
    assert found is not net and spectral_ext.group_of(found) is not spectral_ext.group_of(net)
    # The average begins as it would be with unit vectors.
    exact = copy.deepcopy(expected).eval()
    for layer, name, _ in NORMS:
        norm = exact.get_submodule(layer).parametrizations[name][0]
        for vector in norm.buffers():
            if use_buffers and len(vector) > 1:
                assert vector.norm() < 1 - 1e-6
            vector /= vector.norm()
    before = state(found)
    with torch.no_grad():
        assert_close(found.eval()(inputs()), exact(inputs()), rtol=1e-10)
        sigmas = spectral_ext.group_of(found).sigmas
    largest = [  # u and v of an average have not settled: σ is below the largest singular value
        torch.linalg.matrix_norm(
            layer.weight.movedim(layer.dim, 0).reshape(layer.weight.shape[layer.dim], -1), 2
        )
        if layer.weight.ndim > 1
        else layer.weight.norm()
        for layer in spectral_ext.group_of(found).layers
    ]
    for sigma, norm in zip(sigmas, largest, strict=True):
        assert 0.9 * norm < sigma < norm * (1 + 1e-12)
    assert all(torch.equal(before[key], now) for key, now in state(found).items())


def test_stochastic_weight_averaging_with_batch_norm(backend):
    """The recipe of torch's documentation, on a discriminator with batch norms."""

    def build():
        torch.manual_seed(0)
        net = nn.Sequential(
            parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            parametrizations.spectral_norm(nn.Conv2d(4, 1, 6)),
        )
        return net.double()

    results = []
    for fused in (False, True):
        net = build()
        if fused:
            spectral_ext.fuse(net, backend=backend)
        averaged = AveragedModel(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for x in range(4):
            step(net, optimizer, x)
            averaged.update_parameters(net)
            schedule.step()
        update_bn([inputs(x) for x in range(3)], averaged)
        averaged.eval()
        with torch.no_grad():
            results.append((averaged(inputs()), averaged.state_dict()))
    (expected, state_of_stock), (found, state_of_ours) = results
    assert_close(found, expected, rtol=1e-10)
    assert state_of_ours.keys() == state_of_stock.keys()
    for key, value in state_of_stock.items():
        assert_close(state_of_ours[key].double(), value.double(), key, rtol=1e-10)


def weight_norm_of_bias(layer):
    parametrizations.weight_norm(layer, "bias", dim=None)


def weight_norm_hook_of_bias(layer):
    weight_norm_hook(layer, "bias", dim=None)


def prune_bias(layer):
    prune.l1_unstructured(layer, "bias", amount=2)


def prune_weight(layer):
    """Under a parametrization it takes the parameter that stands behind the weight."""
    prune.l1_unstructured(layer.parametrizations.weight, "original", amount=9)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change", [weight_norm_of_bias, weight_norm_hook_of_bias, prune_bias, prune_weight]
)
def test_beside_pruning_and_weight_norm(change, when, backend):
    """On another tensor of a normalized module, or the weight itself; before fusing or after it."""

    def build():
        torch.manual_seed(0)
        layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)]
        net = nn.Sequential(*layers).double()
        for layer in (net[0], net[2]):
            parametrizations.spectral_norm(layer)
        return net

    nets = []
    for fused in (False, True):
        net = build()
        if when == "before":
            change(net[0])
        if fused:
            spectral_ext.fuse(net, backend=backend)
        if when == "after":
            change(net[0])
        nets.append(net)
    stock, net = nets
    x = torch.randn(3, 6, dtype=torch.float64)
    for _ in range(3):
        losses = []
        for model in nets:
            model.zero_grad()
            losses.append(model(x).square().sum())
            losses[-1].backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.05 * parameter.grad
        assert_close(losses[1], losses[0])
        expected = stock.state_dict()
        for key, value in net.state_dict().items():
            assert_close(value, expected[key], key, rtol=1e-10)


def test_a_pruned_weight_is_back_in_the_group_when_pruning_is_made_permanent(backend):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    for layer in net:
        parametrizations.spectral_norm(layer)
    group = spectral_ext.fuse(net, backend=backend)
    x = torch.ones(1, 6, dtype=torch.float64)
    list_ = net[0].parametrizations.weight
    prune.l1_unstructured(list_, "original", amount=9)
    net(x).sum().backward()
    assert [layer.name for layer in group.layers] == ["1"] and group.sigmas.shape == (1,)
    assert (list_.original_orig.grad[list_.original_mask == 0] == 0).all()
    prune.remove(list_, "original")
    net(x)
    assert [layer.name for layer in group.layers] == ["0", "1"] and group.sigmas.shape == (2,)
    assert (list_.original == 0).sum() == 9
    prune.l1_unstructured(list_, "original", amount=9)
    expected = net.eval()(x)
    spectral_ext.unfuse(net)
    assert type(net[0].parametrizations.weight[0]) is parametrizations._SpectralNorm
    assert_close(net(x), expected)
