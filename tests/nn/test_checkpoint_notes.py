"""What a checkpointed forward used lives as long as its graph; what is not known is refused."""

import gc

import pytest
import torch
from checkpoints import (
    Checkpoints,
    Plain,
    both,
    cell,
    compare,
    kinds,
    sample,
)
from torch.nn.utils import parametrize

from spectral_ext.nn import history


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


@kinds
def test_inside_of_cached_the_backward_belongs_inside_too(kind):
    """Outside of it the recomputation would have to know the vectors of a forward that made no note."""

    def forwards(model, block):
        model.block, h = Plain(), sample()
        for _ in range(3):
            h = block(model, h) + h
        return h.square().sum()

    def run(model, block):
        with parametrize.cached():
            forwards(model, block).backward()

    compare(kind, False, run)
    model = cell(kind, Plain())
    with parametrize.cached():
        loss = forwards(model, Checkpoints(False))
    with pytest.raises(RuntimeError, match=r"^(body\.0|Linear)\.weight.*parametrize\.cached"):
        loss.backward()


def pack(x):
    return x


def test_hooks_of_a_module_that_is_named_after_checkpoints_are_none(monkeypatch):
    monkeypatch.setattr(pack, "__module__", "my_checkpoint_io")
    model = cell("fused", Plain())
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        model(sample(0)).sum().backward()


def test_a_checkpoint_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(pack, "__qualname__", "non_reentrant_checkpoint.<locals>.checkpoint_pack")
    model = cell("fused", Plain())
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, pack),
        pytest.raises(RuntimeError, match="does not know the activation checkpointing"),
    ):
        model(sample(0))
