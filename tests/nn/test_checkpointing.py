"""Activation checkpointing of any block: the gradients of a model without it, and u, v advance once."""

import gc
import threading

import pytest
import torch
from nets import OURS, STOCK, Net, assert_close, assert_same_state, inputs, make
from torch import nn
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.utils.checkpoint import checkpoint

import spectral_ext
from spectral_ext.nn import history


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        x = self.up(torch.tanh(self.conv(x))).flatten(1)
        x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return checkpoint(self.head, x, use_reentrant=self.reentrant)


def models(kind, reentrant, backend, **settings):
    """Return stock without checkpoints and a model with them, of one seed."""
    plain = make(STOCK["u_first"])
    net = make((OURS if kind == "alone" else STOCK)["u_first"])
    net.__class__ = type("Checkpointed", (Checkpointed,), {"reentrant": reentrant})
    if kind == "fused":
        spectral_ext.fuse(net, backend=backend, **settings)
    for module in net.modules():
        if isinstance(module, spectral_ext.nn.SpectralNorm):
            module.backend = backend
    return plain, net


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["fused", "alone"])
def test_gradients_and_vectors_are_as_without(kind, training, reentrant, backend):
    plain, net = models(kind, reentrant, backend)
    for model in (plain, net):
        model.train(training)
        model(inputs()).square().sum().backward()
    assert_same_state(net, plain)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["fused", "alone"])
def test_each_forward_is_recomputed_with_its_own_vectors(kind, reentrant, backend):
    """Two forwards before the backward, as of a discriminator; their vectors differ."""
    plain, net = models(kind, reentrant, backend)
    for model in (plain, net):
        losses = [model(inputs(i)).square().sum() for i in range(2)]
        with torch.no_grad():
            model(inputs(2))
        losses[1].backward()
        losses[0].backward()
    assert_same_state(net, plain)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_with_weights_that_are_kept(reentrant, backend):
    plain, net = models("fused", reentrant, backend, update="step")
    plain(inputs()).square().sum().backward()
    for parameter in plain.parameters():
        parameter.grad = 2 * parameter.grad
    for loss in [net(inputs()).square().sum() for _ in range(2)]:
        loss.backward()
    assert_same_state(net, plain)


def test_blocks_and_gains_are_recomputed_with_their_own_vectors(backend):
    """Beside a plain layer, in one group; the backward of the first forward comes last."""
    nets = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        settings = ({"blocks": 2, "bound": 0.2}, {}, {"gain": "one"})
        layers = [nn.Linear(6, 6, dtype=torch.float64) for _ in settings]
        pairs = zip(layers, settings, strict=True)
        net = nn.Sequential(*(spectral_ext.spectral_norm(x, **s) for x, s in pairs))
        group = spectral_ext.fuse(net, backend=backend)
        xs = [torch.randn(3, 6, dtype=torch.float64) for _ in range(2)]
        losses = []
        for x in xs:
            with group.normalized():
                run = nn.Sequential.forward.__get__(net)
                y = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
            losses.append(y.square().sum())
        losses[1].backward()
        losses[0].backward()
        nets.append(net)
    for found, expected in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        assert_close(found.grad, expected.grad)
    for found, expected in zip(nets[1].buffers(), nets[0].buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_the_whole_model_in_a_checkpoint(reentrant, update, backend):
    plain, net = make(STOCK["u_first"]), make(STOCK["u_first"])
    spectral_ext.fuse(net, backend=backend, update=update)
    for model in (plain, net):
        xs = [inputs(i).requires_grad_() for i in range(2)]
        if model is plain and update == "step":
            model(xs[0])
            model.eval()
        run = model if model is plain else lambda x: checkpoint(net, x, use_reentrant=reentrant)
        losses = [run(x).square().sum() for x in xs]
        losses[1].backward()
        losses[0].backward()
    assert_same_state(net, plain)


class Plain:
    """Calls in place of checkpoints."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, function, *arguments):
        return function(*arguments)


class Checkpoints:
    def __init__(self, reentrant, **options):
        self.options = {"use_reentrant": reentrant, **options}

    def __call__(self, function, *arguments):
        return checkpoint(function, *arguments, **self.options)


WIDTH = 6
both = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
kinds = pytest.mark.parametrize("kind", ["fused", "alone"])


class Cell(nn.Module):
    """Two normalized layers in a block that ``block`` runs."""

    def __init__(self, block, norm=spectral_ext.spectral_norm, **settings):
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2)]
        for layer in layers:
            norm(layer, **settings)
        self.body = nn.Sequential(layers[0], nn.Tanh(), layers[1])
        self.block = block

    def forward(self, x):
        return self.block(self.body, x)


def cell(kind, block, norm=spectral_ext.spectral_norm, fuse=None, **settings):
    torch.manual_seed(0)
    model = Cell(block, norm, **settings)
    if kind == "fused":
        spectral_ext.fuse(model, **(fuse or {}))
    return model


def sample(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def assert_same(found, expected):
    """Compare gradients and vectors of two models."""
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    for (name, parameter), other in pairs:
        assert_close(parameter.grad, other.grad, name)
    for (name, buffer), other in zip(found.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def compare(kind, reentrant, run, make_cell=cell, options=(), **settings):
    """Run a model with checkpoints and one without, and compare them."""
    models = []
    for block in (Plain(), Checkpoints(reentrant, **dict(options))):
        model = make_cell(kind, block, **settings)
        run(model, block)
        models.append(model)
    assert_same(models[1], models[0])


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
        layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.complex128) for _ in range(2)]
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


def notes():
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is history.Notes]


@both
@kinds
def test_what_a_forward_used_lives_as_long_as_its_graph(kind, reentrant):
    model = cell(kind, Checkpoints(reentrant))
    losses = [model(sample(i)).sum() for i in range(20)]
    assert len(notes()) == 20
    losses[0].backward()
    del losses[10:]
    assert len(notes()) <= 10
    del losses
    assert not notes()


@kinds
def test_without_checkpoints_nothing_is_noted(kind):
    model = cell(kind, Plain())
    for i in range(1000):
        model(sample(i)).sum().backward()
    with torch.no_grad():
        for i in range(100):
            model(sample(i))
    assert not notes()


@both
@kinds
def test_a_recomputation_that_does_more_names_the_layer(kind, reentrant):
    model = cell(kind, Plain())
    block = Checkpoints(reentrant, **({} if reentrant else {"early_stop": False}))
    runs = []

    def block_of(x):
        runs.append(x)
        for _ in range(len(runs)):
            x = model(x)
        return x

    loss = block(block_of, sample()).sum()
    vectors = [buffer.clone() for buffer in model.buffers()]
    name = "body.0.weight" if kind == "fused" else "Linear.weight"
    with pytest.raises(RuntimeError, match=f"{name}.*more often than its forward"):
        loss.backward()
    for buffer, before in zip(model.buffers(), vectors, strict=True):
        assert torch.equal(buffer, before)


@kinds
def test_checkpoints_of_an_unknown_kind_are_refused(kind):
    model = cell(kind, Plain())

    def pack(x):
        return x

    pack.__module__ = "other.checkpointing"
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    before = [buffer.clone() for buffer in model.buffers()]
    with hooks, pytest.raises(RuntimeError, match=r"does not know .* other\.checkpointing"):
        model(sample())
    for buffer, vector in zip(model.buffers(), before, strict=True):
        assert torch.equal(buffer, vector)
    model(sample()).sum().backward()
