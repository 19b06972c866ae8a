"""Ours against stock over random sequences of what users do: the whole state after every step."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import (
    NORMS,
    OURS,
    STOCK,
    access,
    assert_close,
    assert_same_state,
    equal_states,
    hook_of,
    inputs,
    make,
    matrices_only,
    remove,
    state,
)
from torch import nn

import spectral_ext

LAYERS = st.integers(0, len(NORMS) - 1)
INPUTS = st.integers(0, 4)
ACTIONS = st.one_of(
    st.tuples(st.just("train"), st.booleans()),
    st.tuples(st.just("freeze_part"), st.booleans()),
    st.tuples(st.just("step"), INPUTS),
    st.tuples(st.just("two_forwards"), INPUTS, INPUTS),
    st.tuples(st.just("step_between_backwards"), INPUTS, INPUTS),
    st.tuples(st.just("forward_no_grad"), INPUTS),
    st.tuples(st.just("access"), LAYERS),
    st.tuples(st.just("access_no_grad"), LAYERS),
    st.tuples(st.just("deepcopy")),
    st.tuples(st.just("pickle")),
    st.tuples(st.just("save")),
    st.tuples(st.just("checkpoint"), st.sampled_from(["parametrization", "hook"])),
    st.tuples(st.just("load_stock")),
    st.tuples(st.just("remove"), LAYERS),
    st.tuples(st.just("fuse")),
    st.tuples(st.just("unfuse")),
)


class Pair:
    """A stock model and ours, which must stay the same."""

    def __init__(self, orders: tuple[str, ...], made_by: dict, fused: bool, backend: str) -> None:
        self.orders, self.made_by, self.backend = orders, made_by, backend
        self.stock = make(*(STOCK[order] for order in orders))
        self.ours = make(*(made_by[order] for order in orders))
        self.removed: set[int] = set()
        self.fused = False
        if fused:
            self.fuse()
        # The hook's random vectors can give a σ near zero, which would magnify rounding.
        self.forward_no_grad(0)

    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.stock, self.ours

    def train(self, mode: bool) -> None:
        for net in self.both():
            net.train(mode)

    def freeze_part(self, mode: bool) -> None:
        for net in self.both():
            net.body.train(mode)
            net.up.train(not mode)

    def step(self, x: int) -> None:
        losses = []
        for net in self.both():
            net.zero_grad()
            losses.append(net(inputs(x)).square().sum())
            losses[-1].backward()
        assert_close(losses[1], losses[0], "loss")
        assert_same_state(self.ours, self.stock)
        with torch.no_grad():
            for net in self.both():
                for parameter in net.parameters():
                    parameter -= 0.02 * parameter.grad

    def two_forwards(self, x: int, y: int) -> None:
        for net in self.both():
            net.zero_grad()
            (net(inputs(x)).square() - net(inputs(y))).sum().backward()

    def step_between_backwards(self, x: int, y: int) -> None:
        """Stock cannot do this: the step changes weights that its second backward needs."""
        parameters = [p for p in self.stock.parameters() if p.requires_grad]
        losses = [self.stock(inputs(i)).square().sum() for i in (x, y)]
        grads = [torch.autograd.grad(loss, parameters) for loss in losses]
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads[0], strict=True):
                parameter -= 0.02 * grad
                parameter.grad = None
        for parameter, grad in zip(parameters, grads[1], strict=True):
            parameter.grad = grad
        self.ours.zero_grad()
        first, second = (self.ours(inputs(i)).square().sum() for i in (x, y))
        first.backward()
        # What the layers compute with saves their normalized weights. A tensor whose norm was
        # removed is a plain parameter again, and that one must not change in between.
        assert not self.removed
        with torch.no_grad():
            for module, name in self.normalized():
                weight = module.parametrizations[name].original
                if weight.grad is not None:
                    weight -= 0.02 * weight.grad
        norms = {id(module.parametrizations[name].original) for module, name in self.normalized()}
        others = [p for p in self.ours.parameters() if id(p) not in norms]
        first_grads = [p.grad for p in others]
        self.ours.zero_grad()
        second.backward()
        with torch.no_grad():
            for parameter, grad in zip(others, first_grads, strict=True):
                parameter -= 0.02 * grad

    def normalized(self) -> list[tuple[nn.Module, str]]:
        return [
            (self.ours.get_submodule(layer), name)
            for i, (layer, name, _) in enumerate(NORMS)
            if i not in self.removed
        ]

    def forward_no_grad(self, x: int) -> None:
        with torch.no_grad():
            expected, found = (net(inputs(x)) for net in self.both())
        assert_close(found, expected, "output")
        assert not found.requires_grad

    def access(self, i: int) -> None:
        layer, name, _ = NORMS[i % len(NORMS)]
        values = []
        for net in self.both():
            net.zero_grad()
            weight = access(net.get_submodule(layer), name)
            (weight * weight.detach().cos()).sum().backward()
            values.append(weight)
        assert_close(values[1], values[0], f"{layer}.{name}")
        assert values[0].stride() == values[1].stride()

    @torch.no_grad()
    def access_no_grad(self, i: int) -> None:
        layer, name, _ = NORMS[i % len(NORMS)]
        expected, found = (access(net.get_submodule(layer), name) for net in self.both())
        assert_close(found, expected, f"{layer}.{name}")
        assert not found.requires_grad or found.is_leaf

    def go_on_with_copy(self, copy_of: Callable[[nn.Module], nn.Module]) -> None:
        """Go on with a copy; the model that it is a copy of must not move with it."""
        if self.made_by is STOCK and not self.fused:
            return  # stock's modules cannot be pickled, or not copied after a forward
        self.clear_grads()
        old, before = self.ours, state(self.ours)
        ours = copy_of(old)
        assert equal_states(before, state(ours))
        self.ours = ours
        self.ours(inputs())
        self.stock(inputs())
        assert equal_states(before, state(old))

    def deepcopy(self) -> None:
        self.go_on_with_copy(copy.deepcopy)

    def pickle(self) -> None:
        self.go_on_with_copy(lambda net: pickle.loads(pickle.dumps(net)))

    def save(self) -> None:
        self.go_on_with_copy(saved_and_loaded)

    def clear_grads(self) -> None:
        """Copies of a parameter have no gradient, in torch."""
        for net in self.both():
            net.zero_grad()

    def checkpoint(self, layout: str) -> None:
        """Save ours for stock, and load it into a new model of ours and one of stock's."""
        self.clear_grads()
        saved = spectral_ext.stock_state_dict(self.ours, layout)
        order = {"parametrization": "u_first", "hook": "v_first"}[layout]
        stock = make(STOCK[order], seed=1, without=self.removed)
        made_by = [self.made_by[order] for order in self.orders]
        self.ours = ours = make(*made_by, seed=1, without=self.removed)
        self.fuse()
        for net in (stock, ours):
            net.load_state_dict(saved)
            net.eval()
        with torch.no_grad():
            assert_close(ours(inputs()), stock(inputs()), "output of the loaded models")
        for name, module in self.stock.named_children():
            ours.get_submodule(name).train(module.training)
        ours.training = self.stock.training
        if layout == "parametrization":
            self.copy_vectors_of_1d()

    def copy_vectors_of_1d(self) -> None:
        """The layout of the parametrization has no place for u and v of a vector."""
        bias = self.stock.body[0]
        if hook_of(bias, "bias") is not None:
            norm = self.ours.body[0].parametrizations.bias[0]
            bias.bias_u.copy_(norm._u)
            bias.bias_v.copy_(norm._v)

    def load_stock(self) -> None:
        if self.made_by is STOCK and not self.fused and self.removed:
            return  # removing stock's hook leaves its hook on loading, which misses the keys
        self.ours.load_state_dict(self.stock.state_dict())

    def remove(self, i: int) -> None:
        i %= len(NORMS)
        layer, name, _ = NORMS[i]
        if i in self.removed:
            return
        self.clear_grads()
        for net in self.both():
            # Removal reads the tensor once more, which iterates in training; not so stock's hook.
            module = net.get_submodule(layer)
            modes = {m: m.training for m in module.modules()}
            module.eval()
            remove(module, name)
            for m, mode in modes.items():
                m.training = mode
        self.removed.add(i)

    def fuse(self) -> None:
        if len(self.removed) < len(NORMS):
            spectral_ext.fuse(self.ours, backend=self.backend)
            self.fused = True

    def unfuse(self) -> None:
        spectral_ext.unfuse(self.ours)
        self.fused = False


def saved_and_loaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("start", ["ours", "ours_fused", "stock_fused"])
@pytest.mark.parametrize(
    "orders", [("u_first",), ("v_first",), ("u_first", "v_first")], ids="+".join
)
@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=12), with_vector=st.booleans())
def test_state_is_that_of_stock_after_every_step(orders, start, backend, actions, with_vector):
    if backend == "triton":  # is interpreted
        actions = actions[:4]
    with contextlib.nullcontext() if with_vector else matrices_only():
        run_actions(orders, start, backend, actions)


def run_actions(orders, start, backend, actions):
    made_by = STOCK if start == "stock_fused" else OURS
    pair = Pair(orders, made_by, start != "ours", backend)
    assert_same_state(pair.ours, pair.stock)
    for action, *arguments in actions:
        if action == "step_between_backwards" and (pair.removed or start == "stock_fused"):
            continue
        getattr(pair, action)(*arguments)
        assert_same_state(pair.ours, pair.stock)
