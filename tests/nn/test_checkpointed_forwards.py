"""A checkpointed forward is recomputed with its own vectors, whatever lies between and around it."""

import copy
import threading

import pytest
import torch
from checkpoints import (
    WIDTH,
    Cell,
    Checkpoints,
    Plain,
    both,
    cell,
    compare,
    kinds,
    sample,
    slow,
)
from torch import nn
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import spectral_ext


@both
@kinds
def test_many_forwards_before_one_backward(kind, reentrant):
    def run(model, _):
        h = sample()
        for _ in range(40):
            h = model(h) + 0.5 * h
        h.square().sum().backward()

    compare(kind, reentrant, run)


@both
@kinds
def test_one_checkpoint_around_many_forwards(kind, reentrant):
    """The k-th forward of the recomputation is the k-th one of the forward."""

    def run(model, block):
        model.block = Plain()

        def loop(x):
            for _ in range(12):
                x = model(x) + 0.5 * x
            return x

        h = block(loop, sample())
        with torch.no_grad():
            model(sample(1))
        h = block(loop, h)
        h.square().sum().backward()

    compare(kind, reentrant, run)


@both
@pytest.mark.parametrize("outer", [True, False], ids=["in reentrant", "in not reentrant"])
@kinds
def test_checkpoints_in_a_checkpoint(kind, outer, reentrant):
    def run(model, block):
        around = block if isinstance(block, Plain) else Checkpoints(outer)

        def twice(x):
            return model(model(x) + x) + x

        def whole(x):
            return around(twice, x)

        h = around(whole, sample())
        model(sample(1))
        h = around(whole, h)
        model(sample(2)).sum().backward()
        h.square().sum().backward()

    compare(kind, reentrant, run)


@both
@kinds
def test_a_forward_without_gradients_between_forward_and_backward(kind, reentrant):
    """Its node numbers follow those of the checkpoint at once."""

    def run(model, _):
        loss = model(sample())
        with torch.no_grad():
            for i in range(3):
                model(sample(i))
        loss.backward(torch.ones_like(loss))

    compare(kind, reentrant, run)


@both
@kinds
def test_a_graph_that_is_used_twice(kind, reentrant):
    def run(model, block):
        model.block = Plain()
        loss = block(lambda x: model(model(x)), sample()).square().sum()
        loss.backward(retain_graph=True)
        model(sample(1)).sum().backward()
        loss.backward()

    compare(kind, reentrant, run)


@kinds
def test_without_an_early_stop(kind):
    def run(model, _):
        losses = [model(sample(i)).square().sum() for i in range(3)]
        losses[0].backward()
        losses[2].backward()

    compare(kind, False, run, options={"early_stop": False, "preserve_rng_state": False})


@kinds
def test_gradients_of_gradients(kind):
    def run(model, _):
        x = sample()
        out = model(x)
        model(sample(1))
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (grad.square().sum() + out.sum()).backward()

    compare(kind, False, run)


@both
@kinds
def test_functions_of_autograd_in_the_block(kind, reentrant):
    """They make nodes, also where gradients are off."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def run(model, _):
        model.body.insert(0, nn.Module())
        model.body[0].forward = Double.apply
        model.body.insert(2, model.body[0])
        losses = [model(sample(i)).square().sum() for i in range(3)]
        for loss in losses:
            loss.backward()

    compare(kind, reentrant, run)


@both
@kinds
def test_saved_tensors_on_the_cpu(kind, reentrant):
    """Other hooks of saved tensors, inside of the checkpoint and outside of it."""

    def run(model, block):
        def inside(x):
            with torch.autograd.graph.save_on_cpu():
                return model.body(x)

        model.block = lambda _, x: block(inside, x)
        losses = []
        for i in range(3):
            with torch.autograd.graph.save_on_cpu():
                losses.append(model(sample(i)).square().sum())
        for loss in losses:
            loss.backward()

    compare(kind, reentrant, run)


@both
def test_a_backward_inside_of_a_later_forward(reentrant):
    """The weights of the later forward are in force meanwhile, and are not those of the checkpoint."""

    def run(model, _):
        group = spectral_ext.nn.group_of(model)
        loss = model(sample()).square().sum()
        with group.normalized():
            loss.backward()

    compare("fused", reentrant, run)


@both
@kinds
def test_threads_have_checkpoints_of_their_own(kind, reentrant):
    """One thread makes forwards between forward and backward of the other, in a fixed order."""

    def run(model, _):
        def in_thread(function):
            thread = threading.Thread(target=function)
            thread.start()
            thread.join()

        losses = []

        def forward():
            losses.append(model(sample(len(losses))).square().sum())

        forward()
        in_thread(forward)
        in_thread(forward)
        forward()
        in_thread(lambda: losses[0].backward())
        losses[2].backward()
        losses[1].backward()
        losses[3].backward()

    compare(kind, reentrant, run)


@both
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("fused", {"fuse": {"bucket_mb": 1e-5}}),
        ("fused", {"gain": "sigma"}),
        ("fused", {"blocks": 2, "order": "v_first"}),
        ("alone", {"blocks": 2, "gain": "one"}),
        ("alone", {"order": "v_first", "tol": 1e-3}),
        ("fused", {"fuse": {"check_finite": True}, "bound": 0.1}),
        ("fused", {"norm": hook_spectral_norm}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_settings(kind, settings, reentrant):
    def run(model, _):
        losses = [model(sample(i)).square().sum() for i in range(3)]
        losses[1].backward()
        model(sample(4)).sum().backward()
        losses[0].backward()
        losses[2].backward()

    compare(kind, reentrant, run, **settings)


@both
@pytest.mark.parametrize("update", ["step", "manual"])
def test_weights_that_are_kept_and_change_before_the_backward(update, reentrant):
    def run(model, _):
        group = spectral_ext.nn.group_of(model)
        h = sample()
        for _ in range(10):
            h = model(h) + h
            if update == "manual":
                group.iterate()
            else:
                group.invalidate()
        h.square().sum().backward()

    compare("fused", reentrant, run, fuse={"update": update})


@both
@kinds
def test_layers_that_share_a_weight(kind, reentrant):
    def tied(kind, block):
        model = cell("alone", block)
        model.body[2] = model.body[0]
        if kind == "fused":
            spectral_ext.fuse(model)
        return model

    def run(model, _):
        losses = [model(sample(i)).square().sum() for i in range(10)]
        for loss in losses:
            loss.backward()

    compare(kind, reentrant, run, tied)


@both
@kinds
def test_complex_weights(kind, reentrant):
    def of_complex(kind, block):
        torch.manual_seed(0)
        model = Cell(block)
        layers = [slow(nn.Linear(WIDTH, WIDTH, dtype=torch.complex128)) for _ in range(2)]
        model.body = nn.Sequential(*map(spectral_ext.spectral_norm, layers))
        if kind == "fused":
            spectral_ext.fuse(model)
        return model

    def run(model, _):
        losses = [model(sample(i) + 0j).abs().sum() for i in range(3)]
        for loss in losses:
            loss.backward()

    compare(kind, reentrant, run, of_complex)


@both
@kinds
def test_an_evaluation_is_recomputed_as_one(kind, reentrant):
    """Also where the model trains again, and advances, before the backward."""

    def run(model, _):
        for training in (True, False):
            model.train()
            model(sample())
            model.eval()
            loss = model(sample(1)).square().sum()
            model.train()
            if training and not reentrant:
                model(sample(2))
            loss.backward()

    compare(kind, reentrant, run)


class TwoPasses(nn.Module):
    """An LSTM looks whether its weights have changed, and reads them again if so."""

    def __init__(self, block):
        super().__init__()
        self.cell = nn.LSTM(WIDTH, WIDTH, batch_first=True, dtype=torch.float64)
        spectral_ext.spectral_norm(self.cell, "weight_hh_l0")
        self.block = block

    def forward(self, x):
        for _ in range(2):
            x = self.block(lambda x: self.cell(x)[0], x)
        return x


@both
def test_a_recomputation_that_reads_a_weight_in_force_more_often(reentrant):
    gradients = []
    for block in (Plain(), Checkpoints(reentrant)):
        torch.manual_seed(0)
        model = TwoPasses(block)
        spectral_ext.fuse(model)
        h = torch.ones(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
        losses = [model(h).square().sum() for _ in range(2)]
        sum(losses).backward()
        gradients.append([h.grad, *(p.grad for p in model.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_may_be_on_inside_of_a_reentrant_checkpoint():
    """Its forward is known without a look at whether gradients are on."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                *(spectral_norm(nn.Linear(5, 5, dtype=torch.float64)) for _ in range(2))
            )
            self.is_checkpointed = True

        def with_gradients(self, x):
            with torch.enable_grad():
                return self.layers(x).tanh()

        def forward(self, x):
            if self.is_checkpointed:
                return checkpoint(self.with_gradients, x, use_reentrant=True)
            return self.with_gradients(x)

    ours = Block()
    twin = copy.deepcopy(ours)
    twin.is_checkpointed = False
    spectral_ext.fuse(ours)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for model in (ours, twin):
        loss = model(x).sum()
        model(x)  # moves u and v on
        loss.backward()
    for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-13)
