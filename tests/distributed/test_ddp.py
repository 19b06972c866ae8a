"""DistributedDataParallel around fused models, and fused models inside of it."""

import contextlib
import inspect

import pytest
import torch
import torch.distributed as dist
from models import LAYERS, assert_close, batch, make, state, vectors
from ranks import assert_same_on_all_ranks, share
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import spectral_ext

pytestmark = pytest.mark.xdist_group("distributed")

# Vectors are not sent in every forward. Newer torch has a word for it that sends them once, at the start;
# without it they are those of each rank, which then has to start from the same seed.
SENT_ONCE = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
UNSYNCHRONIZED = {"forward_sync_buffers" if SENT_ONCE else "broadcast_buffers": False}


def loss_of(net, x):
    return (net(x) - x.mean((1, 2, 3))[:, None]).square().mean()


def wrapped(how, *kinds, seeds=False, settings=(), **keywords):
    """Return a fused model in DDP, in the order of calls that is asked for."""
    # With seeds of its own a rank starts elsewhere; DDP gives all of them what rank 0 has.
    net = make(*kinds, seed=dist.get_rank() if seeds else 0)
    settings = dict(settings)
    if how == "fuse, wrap":
        spectral_ext.fuse(net, **settings)
        return DistributedDataParallel(net, **keywords)
    ddp = DistributedDataParallel(net, **keywords)
    spectral_ext.fuse(ddp.module if how == "wrap, fuse" else ddp, **settings)
    return ddp


def train(ddp, reference, steps=3, rtol=1e-10, loss=None):
    """Train on this rank's part of each batch, and the reference on the whole, and compare."""
    loss = loss or (lambda model, x: loss_of(model, x))
    pairs = [(m, torch.optim.Adam(m.parameters(), 0.01)) for m in (ddp, reference)]
    for step in range(steps):
        losses = []
        for model, optimizer in pairs:
            optimizer.zero_grad()
            x = batch(seed=step)
            losses.append(loss(model, x if model is reference else share(x)))
            losses[-1].backward()
        net = getattr(ddp, "module", ddp)
        assert_same_on_all_ranks({**state(net), "loss": _average(losses[0])})
        assert_close({"loss": _average(losses[0])}, {"loss": losses[1].detach()}, rtol)
        assert_close(state(net), state(reference), rtol)
        for _, optimizer in pairs:
            optimizer.step()


def _average(loss):
    average = loss.detach() / dist.get_world_size()
    dist.all_reduce(average)
    return average


def one_process(how, kinds, seeds, keywords, settings):
    ddp = wrapped(how, *kinds, seeds=seeds, settings=settings, **keywords)
    reference = make(*kinds)
    spectral_ext.fuse(reference, **settings)
    train(ddp, reference)
    ddp.eval()
    reference.eval()
    with torch.no_grad():
        assert_close({"": ddp(batch())}, {"": reference(batch())})


@pytest.mark.parametrize("world_size", [2, 4])
def test_it_gives_the_numbers_of_one_process(ranks, world_size):
    cases = [
        ("fuse, wrap", ["u_first", "v_first"], True, {}, {}),
        ("fuse, wrap", ["u_first"], SENT_ONCE, UNSYNCHRONIZED, {"bucket_mb": 1e-4}),
        ("wrap, fuse", ["stock", "hook", "u_first"], True, {}, {}),
        ("fuse the wrapper", ["u_first", "hook"], False, {}, {}),
        ("fuse, wrap", ["u_first"], True, {"static_graph": True}, {}),
        ("fuse, wrap", ["u_first"], True, {"static_graph": True}, {"bucket_mb": 1e-4}),
        ("fuse, wrap", ["u_first"], False, {"gradient_as_bucket_view": True}, {"update": "step"}),
        ("wrap, fuse", ["u_first"], False, {"find_unused_parameters": True}, {}),
    ]
    for case in cases if world_size == 2 else cases[:3]:
        ranks.run(world_size, one_process, *case)


def stock(kind, passes):
    """Stock under the same wrapper, with the same seeds; one and two forwards before a backward."""

    def loss(model, x):
        return sum(loss_of(model, x + i) for i in range(passes))

    ddp = wrapped("fuse, wrap", "u_first" if kind == "stock" else "v_first")
    expected = make(kind)
    net = ddp.module
    net.load_state_dict(expected.state_dict())
    expected = DistributedDataParallel(expected)
    for step in range(3):
        for model in (ddp, expected):
            model.zero_grad()
            loss(model, share(batch(seed=step))).backward()
        for name in LAYERS:
            layers = [model.module.get_submodule(name) for model in (ddp, expected)]
            assert_close(*map(tensors_of, layers), 1e-12)
        for model in (ddp, expected):
            torch.optim.SGD(model.parameters(), 0.1).step()


def tensors_of(layer):
    """Return the tensors of a normalized layer, whatever its norm."""
    if not hasattr(layer, "parametrizations"):
        weight, u, v = layer.weight_orig, layer.weight_u, layer.weight_v
    else:
        norm = layer.parametrizations.weight
        weight, u, v = norm.original, norm[0]._u, norm[0]._v
    return {"weight": weight.detach(), "grad": weight.grad, "u": u, "v": v}


@pytest.mark.parametrize("kind", ["stock", "hook"])
@pytest.mark.parametrize("passes", [1, 2])
def test_it_gives_the_numbers_of_stock_under_the_same_wrapper(ranks, kind, passes):
    ranks.run(2, stock, kind, passes)


def gan(keywords, settings):
    """A pass with real and one with fake images before one backward."""

    def loss(model, x):
        return torch.relu(1 - model(x)).mean() + torch.relu(1 + model(x * 0.5)).mean()

    seeds = not keywords or SENT_ONCE
    ddp = wrapped("fuse, wrap", "u_first", seeds=seeds, settings=settings, **keywords)
    reference = make("u_first")
    spectral_ext.fuse(reference, **settings)
    before = vectors(ddp.module)
    train(ddp, reference, loss=loss)
    assert any(not torch.equal(value, before[key]) for key, value in vectors(ddp.module).items())


@pytest.mark.parametrize("keywords", [{}, UNSYNCHRONIZED], ids=["synchronized", "not"])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_two_forwards_before_a_backward(ranks, keywords, update):
    ranks.run(2, gan, keywords, {"update": update})


def accumulation(settings, broadcast):
    """Two backwards, of which only the second is shared; and gradients of one of two outputs."""
    keywords = {} if broadcast else UNSYNCHRONIZED
    ddp = wrapped("fuse, wrap", "u_first", "v_first", settings=settings, **keywords)
    reference = make("u_first", "v_first")
    spectral_ext.fuse(reference, **settings)
    for step in range(3):
        for model in (ddp, reference):
            model.zero_grad()
            for i, last in enumerate((False, True)):
                x = batch(seed=10 * step + i)
                alone = model is ddp and not last
                with ddp.no_sync() if alone else contextlib.nullcontext():
                    loss_of(model, x if model is reference else share(x)).backward()
        assert_same_on_all_ranks(state(ddp.module))
        assert_close(state(ddp.module), state(reference))
        for model in (ddp, reference):
            torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("settings", [{}, {"bucket_mb": 1e-4}, {"update": "step"}], ids=str)
def test_accumulation_without_synchronization(ranks, settings):
    ranks.run(2, accumulation, settings, True)
    ranks.run(2, accumulation, settings, False)


class Ordered(nn.Module):
    """Notes when the backward comes to a block."""

    def __init__(self, net, events):
        super().__init__()
        self.net, self.events = net, events

    def forward(self, x):
        x = torch.tanh(self.net.stem(x))
        for i, block in enumerate(self.net.blocks):
            x.register_hook(lambda _, i=i: self.events.append(f"backward of block {i}"))
            x = block(x)
        return x


def readiness(bucket_mb):
    """DDP hears of a gradient when it is accumulated: note these, and the backward between them."""
    events = []
    model = Ordered(make("u_first"), events)
    spectral_ext.fuse(model, bucket_mb=bucket_mb)
    for name, parameter in model.named_parameters():
        if name.endswith("weight.original"):
            layer = name.removeprefix("net.").removesuffix(".parametrizations.weight.original")
            parameter.register_post_accumulate_grad_hook(
                lambda _, layer=layer: events.append(layer)
            )
    ddp = DistributedDataParallel(model)
    for _ in range(2):  # DDP orders its buckets after the first
        events.clear()
        loss_of(ddp, share(batch())).backward()
    return events


def test_buckets_give_gradients_before_the_backward_is_over(ranks):
    backward = [f"backward of block {i}" for i in (2, 1, 0)]
    for events in ranks.run(2, readiness, None):
        assert events[:3] == backward  # all gradients come at the end
        assert sorted(events[3:]) == sorted(LAYERS)
    for events in ranks.run(2, readiness, 1e-6):  # a bucket for each layer
        place = {event: i for i, event in enumerate(events)}
        assert [event for event in events if event in backward] == backward
        assert max(place["blocks.2.0"], place["blocks.2.2"]) < place["backward of block 1"]
        assert place["blocks.1.1"] < place["backward of block 0"]
        assert place["stem"] == len(events) - 1


class Unused(nn.Module):
    """Uses its second head in some forwards only."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        torch.manual_seed(5)
        self.other = nn.Linear(7, 1).double()
        spectral_ext.spectral_norm(self.other)

    def forward(self, x):
        x = torch.tanh(self.net.stem(x))
        x = self.net.blocks[1](self.net.blocks[0](x))
        return self.net.blocks[2](x) if self.use_first else self.other(x)


def unused():
    model, reference = (Unused(make("u_first")) for _ in range(2))
    for net in (model, reference):
        spectral_ext.fuse(net)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(4):
        for net in (ddp, reference):
            getattr(net, "module", net).use_first = step % 2 == 0
            net.zero_grad()
            x = batch(seed=step)
            loss_of(net, x if net is reference else share(x)).backward()
        found, expected = state(model), state(reference)
        unused = {key for key, value in found.items() if key.endswith("grad") and not value.any()}
        assert_close({k: v for k, v in found.items() if k not in unused}, expected)


def test_unused_parameters(ranks):
    ranks.run(2, unused)


def compiled(bucket_mb):
    ddp = wrapped("fuse, wrap", "u_first", settings={"bucket_mb": bucket_mb})
    reference = make("u_first")
    spectral_ext.fuse(reference)
    train_compiled = torch.compile(ddp, backend="aot_eager")
    train_compiled.module = ddp.module
    train(train_compiled, reference, steps=2)


def test_compiled(ranks):
    ranks.run(2, compiled, None)
