"""Operations: optimizers, averages, and changes of weights, modes and gradients."""

import copy
from typing import Any

import torch
from family import inputs
from hypothesis import strategies as st
from ops_forward import squares
from pair import Pair, Side, close
from registry import BOOL, SEED, operation, skip_unless
from torch import Tensor, nn

OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, foreach=False),
    "foreach SGD": lambda ps: torch.optim.SGD(ps, 0.05, foreach=True),
    "fused SGD": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.5, fused=True),
    # A large eps: a gradient that is zero but for rounding must not become a step.
    "Adam": lambda ps: torch.optim.Adam(ps, 0.01, eps=1e-2, foreach=False),
    "foreach Adam": lambda ps: torch.optim.Adam(ps, 0.01, eps=1e-2, foreach=True),
    "fused Adam": lambda ps: torch.optim.Adam(ps, 0.01, eps=1e-2, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 0.01, eps=1e-2),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 0.01, eps=1e-2),
}


@operation(kind=st.sampled_from(list(OPTIMIZERS)))
def new_optimizer(side: Side, kind: str) -> None:
    side.optimizer = OPTIMIZERS[kind](list(side.model.parameters()))
    side.kept["optimizer"] = kind


@operation(passes=st.integers(1, 2), seed=SEED)
def optimizer_step(side: Side, passes: int, seed: int) -> Tensor:
    if side.optimizer is None:
        side.optimizer = OPTIMIZERS["SGD"](list(side.model.parameters()))
        side.kept["optimizer"] = "SGD"
    side.optimizer.zero_grad()
    loss = sum(squares(side.model(inputs(seed + i)) - 0.3) for i in range(passes))
    if loss.requires_grad:
        loss.backward()
    side.optimizer.step()
    side.has_changed()
    return loss


@operation()
def a_step(side: Side) -> Tensor:
    """A step of training, under a name that comes first: hypothesis draws the first rule most often."""
    return optimizer_step(side, 1, len(side.pair.script) % 4)


@operation(of_the_pair=True)
def exchange_optimizer_states(pair: Pair) -> None:
    """Resume each of both from the checkpoint of the other's optimizer."""
    for side in pair.sides:
        if side.optimizer is None or not side.optimizer.state:
            optimizer_step(side, 1, 0)
    states = [copy.deepcopy(side.optimizer.state_dict()) for side in pair.sides]
    for side, state in zip(pair.sides, states[::-1], strict=True):
        side.optimizer = OPTIMIZERS[side.kept["optimizer"]](list(side.model.parameters()))
        side.optimizer.load_state_dict(state)
    found, expected = (
        {
            name: {k: v for k, v in side.optimizer.state[p].items() if isinstance(v, Tensor)}
            for name, p in side.parameters().items()
            if p in side.optimizer.state
        }
        for side in pair.sides
    )
    close(found, expected, "state of the optimizer", 1e-9)


@operation(by=st.sampled_from([".data", "copy_", "swap of .data"]), validate=BOOL, seed=SEED)
def evaluate_the_average(side: Side, by: str, validate: bool, seed: int) -> list[Tensor]:
    """Averages of weights as libraries make them: store, copy to the model, evaluate, restore."""
    parameters = list(side.model.parameters())
    average = [p.detach() * 0.8 + 0.1 for p in parameters]
    modes = {module: module.training for module in side.model.modules()}
    outputs = []
    if validate:
        side.model.eval()
        outputs.append(side.model(inputs(seed)))
    kept = [p.detach().clone() for p in parameters]
    for values in (average, kept):
        if not validate:
            side.model.train(values is kept)  # libraries change weights between the modes
        for p, value in zip(parameters, values, strict=True):
            if by == ".data":
                p.data.copy_(value)
            elif by == "copy_":
                with torch.no_grad():
                    p.copy_(value)
            else:
                p.data = value.clone()
        if validate:
            side.model.eval()
        else:
            side.model.train(values is average).train(values is kept)
        outputs.append(side.model(inputs(seed)))
    for module, mode in modes.items():
        module.training = mode
    return outputs


@operation(
    layer="layer",
    how=st.sampled_from(["copy_", "mul_", "init", ".data.copy_", ".data =", "through .data"]),
    seed=SEED,
)
def change_weight(side: Side, layer: str, how: str, seed: int) -> None:
    weight = side.norm(layer).weight
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        if how == "copy_":
            weight.copy_(value)
        elif how == "mul_":
            weight.mul_(1.5)
        elif how == "init":
            nn.init.normal_(weight, generator=generator)
        elif how == ".data.copy_":
            weight.data.copy_(value)
        elif how == ".data =":
            weight.data = value
        else:
            weight.data[0] += 0.5
    leaves_no_trace = how in (".data.copy_", "through .data")
    if leaves_no_trace:
        side.pair.start_anew(side)
        side.kept.pop("loss", None)  # stock's graph has the new values, and does not notice


@operation(layer="layer", seed=SEED)
def new_parameter(side: Side, layer: str, seed: int) -> None:
    """Another ``Parameter`` object in the place of the weight."""
    norm = side.norm(layer)
    generator = torch.Generator().manual_seed(seed)
    shape = norm.weight.shape
    norm.weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    side.forget()


@operation(layer="layer")
def assign_to_the_tensor(side: Side, layer: str) -> None:
    """``layer.weight = value``: the right inverse of the parametrization."""
    norm = side.norm(layer)
    skip_unless(not side.pair.twin.norm(layer).is_hook)
    with torch.no_grad():
        setattr(norm.module, norm.tensor, norm.weight.detach() * 1.5 + 0.1)


@operation(layer="layer", mode=BOOL)
def requires_grad(side: Side, layer: str, mode: bool) -> None:
    side.norm(layer).weight.requires_grad_(mode)


@operation(mode=BOOL)
def requires_grad_of_all(side: Side, mode: bool) -> None:
    side.model.requires_grad_(mode)


@operation(mode=BOOL)
def train(side: Side, mode: bool) -> None:
    side.model.train(mode)


@operation(block="block", mode=BOOL)
def train_block(side: Side, block: str, mode: bool) -> None:
    side.model.get_submodule(block).train(mode)


@operation(to_none=BOOL)
def zero_grad(side: Side, to_none: bool) -> None:
    side.model.zero_grad(set_to_none=to_none)


@operation(layer="layer", steps=st.integers(1, 3))
def change_iterations(side: Side, layer: str, steps: int) -> None:
    """A setting that changes while the model is in use."""
    norm = side.norm(layer)
    skip_unless(norm.vectors)
    if getattr(norm.norm, "tol", 0.0) == 0.0:
        norm.norm.n_power_iterations = steps
        side.setting_was_assigned(norm)


@operation(layer="layer", scale=st.sampled_from([0.5, 1.0, 2.0]))
def change_scale(side: Side, layer: str, scale: float) -> None:
    norm = side.norm(layer)
    is_ours = isinstance(side.pair.twin.norm(layer).norm, spectral_norm_class())
    skip_unless(is_ours and norm.norm.bound is None and norm.norm.learned_gain is None)
    norm.norm.scale = scale
    side.setting_was_assigned(norm)


def spectral_norm_class() -> Any:
    from spectral_ext.nn import SpectralNorm

    return SpectralNorm


@operation(of_the_pair=True)
def iterate(pair: Pair) -> None:
    """``group.iterate()``, for ``update="manual"``; it works for the others, too."""
    skip_unless(pair.root_is_fused)
    # A layer that is never called is not iterated after the first forward.
    skip_unless(all(n.norm.called for n in pair.twin.norms() if hasattr(n.norm, "called")))
    skip_unless(pair.all_are_in_groups())
    pair.group().iterate()
    next(group for group in pair.twin.groups if group.root is pair.twin.model).iterate()
