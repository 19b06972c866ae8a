"""Operations: what interrupts a forward, looks at it from outside, or makes weights that break stock."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from family import inputs
from hypothesis import strategies as st
from ops_forward import back_from, squares
from pair import Pair, Side, close
from registry import BOOL, SEED, Skip, operation, skip_unless
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from twin import Norm, QuietHook

import spectral_ext

PACKAGE = str(Path(spectral_ext.__file__).parent)


@operation(seed=SEED)
def exception_in_the_forward(side: Side, seed: int) -> bool:
    """A block raises; the layers have advanced as in a forward that went well."""

    def fail(module: Any, args: Any) -> None:
        raise ZeroDivisionError

    # A layer that was fused since its last call is on trial: it has advanced once its hook has run.
    pairs = zip(side.pair.fused.norms(), side.pair.twin.norms(), strict=True)
    hooks = [(getattr(mine.norm, "_hook", None), twin.norm) for mine, twin in pairs]
    agree = all(mine is None or mine.called == twin.called for mine, twin in hooks)
    skip_unless(side.is_twin or agree)
    block = side.blocks()[-1][1]
    handle = block.register_forward_pre_hook(fail)
    try:
        side.model(inputs(seed))
    except ZeroDivisionError:
        return True
    finally:
        handle.remove()
    return False


@operation(of_the_pair=True, after=st.integers(0, 40), seed=SEED)
def interrupt_in_the_forward(pair: Pair, after: int, seed: int) -> None:
    """A ``KeyboardInterrupt`` on entry of a function of the package, where CPython looks for signals."""
    calls = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal calls
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and code.co_name != "<genexpr>":
            calls += 1
            if calls > after:
                sys.settrace(None)
                raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        pair.fused.model(inputs(seed))
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    # Some layers have advanced and others not.
    pair.twin.model(inputs(seed))
    if not pair.all_are_in_groups():  # how often an LSTM reads a weight depends on its last forward
        pair.fused.model(inputs(seed))
    pair.adopt_vectors()
    pair.renew()


@operation(of_the_pair=True, seed=SEED)
def dry_run(pair: Pair, seed: int) -> None:
    """A forward under ``FakeTensorMode`` changes nothing, but that hooks were called once."""
    skip_unless(all(norm.norm.called for norm in pair.twin.norms() if is_grouped_hook(norm)))
    # An LSTM outside of a group keeps a list of weights, and what it finds there decides how often the
    # next forward reads, and so iterates: the twin would need the dry run, too.
    is_rnn = any(isinstance(norm.module, nn.RNNBase) for norm in pair.twin.norms())
    skip_unless(not is_rnn or pair.all_are_in_groups())
    pair.twin.has_changed()
    pair.invalidate()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = pair.fused.model(inputs(seed))
    assert tuple(y.shape) == tuple(inputs(seed).shape)
    pair.renew()


@operation(of_the_pair=True, block="block", seed=SEED)
def symbolic_trace(pair: Pair, block: str, seed: int) -> None:
    """``torch.fx``: the graph follows the weights, as the model does; of a block if not of the model."""
    # The hooks of stock leave what they have traced in the model.
    place = part_without_hooks(pair, block, lambda norm: True)
    mine, stock = (side.model.get_submodule(place) for side in pair.sides)
    with pair.fused.evaluating(), pair.twin.evaluating():
        traced = torch.fx.symbolic_trace(mine)
        expected = stock(inputs(seed))
        close(traced(inputs(seed)), expected, "output of the graph", pair.tolerance)
        assert list(traced.parameters()), "the graph has no parameters"
        for side in pair.sides:
            with torch.no_grad():
                for parameter in side.model.parameters():
                    parameter.mul_(1.25)
        expected = stock(inputs(seed))
        close(traced(inputs(seed)), expected, "output with other weights", pair.tolerance)
        mine(inputs(seed))  # as the twin has


def part_without_hooks(pair: Pair, block: str, fits: Callable[[Norm], bool]) -> str:
    """Return the place of the model if it has no hook and all its norms fit; else that of the block."""
    for place in ("", block):
        inside = [n for n in pair.twin.norms() if n.name.startswith(f"{place}." if place else "")]
        if inside and all(not norm.is_hook and fits(norm) for norm in inside):
            return place
    raise Skip


def is_hook_of_the_root(pair: Pair, layer: str) -> bool:
    """Whether the entry computes the weight after all pre-hooks of the root, where stock did before them."""
    norm = pair.twin.norm(layer)
    return norm.is_hook and norm.module is pair.twin.model


def is_grouped_hook(norm: Norm) -> bool:
    return isinstance(norm.norm, QuietHook)


def is_ours(pair: Pair, layer: str) -> bool:
    """Whether a layer is computed by this package: stock does not recover from what follows."""
    is_called = getattr(pair.twin.norm(layer).norm, "called", True)  # others are not computed
    return is_called and isinstance(pair.fused.norm(layer).norm, spectral_ext.nn.SpectralNorm)


def check_the_norm(pair: Pair, layer: str, what: str) -> None:
    """After many forwards a layer must be normalized: compare with its exact singular values."""
    model = pair.fused.model
    modes = {module: module.training for module in model.modules()}
    model.train()
    for _ in range(60):
        if pair.update == "manual" and pair.is_fused:
            for module in model.modules():
                if "_spectral_group" in module.__dict__:
                    spectral_ext.group_of(module).iterate()
        model(inputs(0))
        pair.invalidate()
    norm = pair.fused.norm(layer)
    weight = norm.weight.detach()
    matrix = weight.movedim(norm.norm.dim, 0).flatten(1) if weight.ndim > 1 else weight[:, None]
    exact = torch.linalg.matrix_norm(matrix, 2).item()
    ratio = norm.sigma() / exact
    assert abs(ratio - 1) < 0.05, f"{what}: σ of {layer} is {ratio:.3f} of the exact one"
    for module, mode in modes.items():
        module.training = mode


def restart(pair: Pair, layer: str, bad: float) -> None:
    """Give a layer a bad weight and a good one again; stock cannot recover, so the twin follows."""
    sides = pair.sides
    for side in sides:
        side.model.zero_grad()
        side.forget()
    weight = pair.fused.norm(layer).weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(bad)
        pair.fused.model(inputs(0))
        weight.copy_(good)
    check_the_norm(pair, layer, f"after a weight of {bad}")
    pair.adopt_vectors()
    pair.renew()


@operation(of_the_pair=True, layer="layer", bad=st.sampled_from([0.0, 1e-20, 1e23, float("nan")]))
def bad_weight_for_a_while(pair: Pair, layer: str, bad: float) -> None:
    skip_unless(is_ours(pair, layer))
    restart(pair, layer, bad)


@operation(of_the_pair=True, layer="layer", bad=st.sampled_from([0.0, 1e-20, 1e23]))
def norm_on_a_bad_weight(pair: Pair, layer: str, bad: float) -> None:
    """The norm is put on a weight that it cannot iterate, as zero initialization has it."""
    skip_unless(is_ours(pair, layer) and pair.fused.norm(layer).vectors)
    norm = pair.fused.norm(layer)
    vectors = norm.vectors
    bad_weight = torch.full_like(norm.weight, bad).detach()
    order = norm.norm.order if hasattr(norm.norm, "order") else "u_first"
    holder = nn.Module()
    holder.weight = nn.Parameter(bad_weight)
    spectral_ext.spectral_norm(holder, "weight", dim=norm.norm.dim, order=order)
    made = holder.parametrizations["weight"][0]
    with torch.no_grad():
        for vector, name in zip(vectors, ("_u", "_v"), strict=True):
            vector.copy_(made._buffers[name])
    for side in pair.sides:
        side.model.zero_grad()
        side.forget()
    check_the_norm(pair, layer, f"the norm was put on a weight of {bad}")
    pair.adopt_vectors()
    pair.renew()


@operation(of_the_pair=True, vectors=st.sampled_from([0.0, float("nan"), 3e38]), layer="layer")
def bad_vectors(pair: Pair, layer: str, vectors: float) -> None:
    """Memory of ``to_empty`` in ``u`` and ``v``."""
    skip_unless(is_ours(pair, layer) and pair.fused.norm(layer).vectors)
    with torch.no_grad():
        for vector in pair.fused.norm(layer).vectors:
            vector.fill_(vectors)
    for side in pair.sides:
        side.model.zero_grad()
        side.forget()
    check_the_norm(pair, layer, f"u and v were {vectors}")
    pair.adopt_vectors()
    pair.renew()


@operation(of_the_pair=True, block="block", buffers=BOOL, seed=SEED)
def offloaded_forward(pair: Pair, block: str, buffers: bool, seed: int) -> None:
    """accelerate's ``cpu_offload`` of a copy: weights are on meta until a layer runs."""
    from accelerate import cpu_offload

    # A hook of stock runs, and attention reads the weight of ``out_proj``, before it is loaded.
    place = part_without_hooks(pair, block, lambda norm: norm.name.endswith("layer.weight"))
    mine, stock = (side.model.get_submodule(place) for side in pair.sides)
    # Blocks without a norm may read a weight that is not loaded, after the call of its module or before.
    normalized = [norm.name for norm in pair.twin.norms()]
    inside = [name for name, _ in pair.twin.blocks() if not place or name == place]
    skip_unless(all(any(x.startswith(f"{name}.") for x in normalized) for name in inside))
    with pair.fused.evaluating(), pair.twin.evaluating(), torch.no_grad():
        copied = copy.deepcopy(mine)
        if place and pair.is_fused:
            spectral_ext.fuse(copied)
        cpu_offload(copied, execution_device="cpu", offload_buffers=buffers)
        found = copied(inputs(seed))
        mine(inputs(seed))  # it has not run in evaluation before, and the twin will have
        close(found, stock(inputs(seed)), "output with weights on meta", pair.tolerance)


@operation(seed=SEED)
def forward_in_a_capture(side: Side, seed: int) -> Tensor:
    """The capture of a CUDA graph, faked: it must compute, and from then on nothing is kept."""
    skip_unless(side.pair.is_fused and side.pair.update != "forward")
    module = sys.modules[spectral_ext.SpectralGroup.__module__]
    real = module.is_capturing
    module.is_capturing = lambda device: True
    if side.is_twin:
        for group in side.groups:
            if any(norm.training for norm in group.members()):
                group.was_captured = True
    try:
        y = side.model(inputs(seed))
    finally:
        module.is_capturing = real
    return y


@operation(of_the_pair=True, layer="layer", seed=SEED)
def write_on_a_normalized_weight(pair: Pair, layer: str, seed: int) -> None:
    """A change in place of a weight in use must not outlive its forward."""
    skip_unless(pair.is_fused and pair.all_are_in_groups())
    skip_unless(not is_hook_of_the_root(pair, layer))
    # A group of a part that runs twice advances between: no vectors are those of the whole output.
    parts = [group for group in pair.twin.groups if group.root is not pair.twin.model]
    skip_unless(pair.root != "shared" or not parts)

    def clamp(module: Any, args: Any) -> None:
        for side in pair.sides:
            norm = side.norm(layer)
            if norm.module is module:
                getattr(module, norm.tensor).detach().mul_(0.0)

    for side in pair.sides:
        handle = side.norm(layer).module.register_forward_pre_hook(clamp)
        with torch.no_grad():
            side.model(inputs(seed))
        handle.remove()
    pair.follow_a_forward(inputs(seed))


@operation(of_the_pair=True)
def what_the_group_tells(pair: Pair) -> None:
    """σ of every layer under its name, of the last forward or of now, and only layers of the model."""
    skip_unless(pair.root_is_fused)
    group = pair.group()
    sigmas = dict(zip((x.qualified_name for x in group.layers), group.sigmas.tolist(), strict=True))
    of_twin = next(g for g in pair.twin.groups if g.root is pair.twin.model)
    members = {norm.name: norm for norm in of_twin.members()}
    # A layer whose hook no forward has called has the raw weight.
    expected = {name for name, norm in members.items() if not norm.is_waiting}
    if not of_twin.has_run:
        expected = set(members)
    assert set(sigmas) == expected, f"layers {set(sigmas)}, the model has {expected}"
    for name, sigma in sigmas.items():
        seen = (of_twin.sigmas, of_twin.sigmas_before)
        norm = members[name]
        allowed = [norm.sigma(), *(s[id(norm.norm)] for s in seen if id(norm.norm) in s)]
        # The last forward may have been one in another dtype.
        assert any(abs(sigma - a) <= 0.02 * max(1, abs(a)) for a in allowed), (
            f"σ of {name} is {sigma}, expected one of {allowed}"
        )
    assert all(value == value for value in group.log_dict().values())
    repr(group)


@operation(seed=SEED)
def penalty_inside(side: Side, seed: int) -> Tensor:
    """A loss whose graph has two entries of the model, one inside of the other's output."""
    y = side.model(side.model(inputs(seed)))
    back_from(squares(y))
    return y
