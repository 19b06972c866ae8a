"""Where a training step goes, with stock's spectral norms and with fused ones.

``torch.profiler`` writes a Chrome trace of each; the shares are read from the same events. Time of a
backward is the spectral norms' if its node was made inside of one.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.nn import Module
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from ..nn import SpectralGroup, SpectralNorm, fuse
from .measure import random_like
from .models import Model
from .peers import Setting, Weights

__all__ = ["PARTS", "Profile", "operations_table", "parts_table", "profile_step"]

NORM = "spectral norm"
NODE = "autograd::engine::evaluate_function: "
OWN = "spectral_ext::"
PARTS = ("norms, forward", "rest of forward", "norms, backward", "rest of backward", "optimizer")


@dataclass(frozen=True)
class Profile:
    """Milliseconds a step: of the parts, and by operation with the number of its calls."""

    parts: dict[str, float]
    operations: dict[str, tuple[float, float]]

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self.parts.values())


def profile_step(
    model: Model, fused: bool, trace: Path, *, steps: int = 10, device: torch.device
) -> Profile:
    """Profile training steps of a copy of a model: forward, backward and Adam.

    Without inputs the forward takes the weights and nothing else, and the backward starts from random
    gradients of them. With inputs it is the model's own, and the backward that of the sum of what it returns.

    Args:
        model: what to train.
        fused: whether its spectral norms are fused, or stock's.
        trace: the file of the Chrome trace of all steps.
        steps: after three that are not counted.
        device: where.
    """
    step = _step_of(model, fused, device)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with _marked() as nodes, profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return _read(profiler.events(), nodes, steps, device)


def _step_of(model: Model, fused: bool, device: torch.device) -> Callable[[], None]:
    inputs = [each.to(device) if isinstance(each, Tensor) else each for each in model.inputs]
    if model.net is None or not model.inputs:
        net: Module = Weights(model.layers, Setting(device=device)).to(device)
    else:
        net = deepcopy(model.net).to(device).train()
    if fused:
        fuse(net)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-6)
    grads: list[Tensor] = []

    def step() -> None:
        nonlocal grads
        with record_function("forward"):
            outputs = [t for t in tree_leaves(net(*inputs)) if isinstance(t, Tensor)]
            outputs = [t for t in outputs if t.requires_grad]
        grads = grads or random_like(outputs)
        with record_function("backward"):
            torch.autograd.backward(outputs, grads)
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step


@contextmanager
def _marked() -> Iterator[set[int]]:
    """Let spectral norms of all kinds note when they run; the value has the numbers of their nodes."""
    nodes: set[int] = set()
    is_inside = False

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal is_inside
            if is_inside:  # a group computes layers
                return function(*arguments, **named)
            first, is_inside = torch._C._autograd._get_sequence_nr(), True
            try:
                with record_function(NORM):
                    return function(*arguments, **named)
            finally:
                is_inside = False
                nodes.update(range(first, torch._C._autograd._get_sequence_nr()))

        return run

    kinds: list[tuple[Any, str]] = [
        (parametrizations._SpectralNorm, "forward"),
        (StockHook, "__call__"),
        (SpectralNorm, "forward"),
        (SpectralGroup, "compute"),
    ]
    before = [cls.__dict__[name] for cls, name in kinds]
    for (cls, name), function in zip(kinds, before, strict=True):
        setattr(cls, name, marked(function))
    try:
        yield nodes
    finally:
        for (cls, name), function in zip(kinds, before, strict=True):
            setattr(cls, name, function)


def _read(events: Any, nodes: set[int], steps: int, device: torch.device) -> Profile:
    is_gpu = device.type == "cuda"
    spans: Counter[str] = Counter()
    milliseconds: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        total = event.device_time_total if is_gpu else event.cpu_time_total
        own = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        if event.name in ("forward", "backward", "optimizer", NORM):
            spans[event.name] += total
        elif event.name.startswith(NODE) and event.sequence_nr in nodes:
            spans["norms, backward"] += total
        milliseconds[event.name] += own / 1e3 / steps
        calls[event.name] += 1
    found = {name: value / 1e3 / steps for name, value in spans.items()}
    forward, backward = found.get(NORM, 0.0), found.get("norms, backward", 0.0)
    parts = (forward, found["forward"] - forward, backward, found["backward"] - backward)
    operations = {name: (value, calls[name] / steps) for name, value in milliseconds.items()}
    return Profile(
        dict(zip(PARTS, (*parts, found["optimizer"]), strict=True)),
        dict(sorted(operations.items(), key=lambda item: -item[1][0])),
    )


def parts_table(stock: Profile, fused: Profile, title: str) -> Table:
    """Return where a step goes, stock beside fused."""
    table = Table("part of a step", title=title, title_justify="left")
    for column in ("stock ms", "share", "fused ms", "share", "stock / fused"):
        table.add_column(column, justify="right")
    for name in (*PARTS, "step"):
        row = [name]
        pair = [each.parts.get(name, each.total) for each in (stock, fused)]
        for each, value in zip((stock, fused), pair, strict=True):
            row += [f"{value:.3f}", f"{value / each.total:.0%}"]
        row.append(f"{pair[0] / pair[1]:.2f}" if pair[1] > 0 else "")
        table.add_row(*row, style="bold" if name == "step" else None)
    return table


def operations_table(stock: Profile, fused: Profile, count: int = 10) -> Table:
    """Return the slowest operations and all operators of spectral_ext.

    Operations are ordered by their self time, which excludes the operations that they call.

    Args:
        stock: the profile of a step with PyTorch's spectral norms.
        fused: the profile of a step with fused spectral norms.
        count: the number of slowest operations. Operators of spectral_ext that are not among them
            follow below.
    """
    table = Table(title="operations by self time", title_justify="left")
    for side in ("stock", "fused"):
        table.add_column(side)
        table.add_column("ms", justify="right")
        table.add_column("calls", justify="right")
    for pair in itertools.zip_longest(_rows(stock, count), _rows(fused, count)):
        cells: list[str] = []
        for item in pair:
            if item is None:
                cells += ["", "", ""]
            else:
                name, (value, calls) = item
                cells += [_short(name), f"{value:.3f}", f"{calls:g}"]
        table.add_row(*cells)
    return table


def _rows(profile: Profile, count: int) -> list[tuple[str, tuple[float, float]]]:
    rows = list(profile.operations.items())
    return rows[:count] + [row for row in rows[count:] if row[0].startswith(OWN)]


def _short(name: str) -> str:
    return name.removeprefix(NODE).removeprefix("aten::")[:36]
