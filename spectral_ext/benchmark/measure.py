"""Time the peers in turns, after their numbers were checked."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import reference
from .models import Layer, Model
from .peers import EPS, PEERS, Peer, Setting, why_not

__all__ = [
    "MODES",
    "Case",
    "Job",
    "Measurement",
    "Mode",
    "WrongNumbersError",
    "measure",
    "prepare",
    "quantiles",
]

Mode = Literal["forward", "backward", "forward+backward"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: Reads and writes of every weight that a mode cannot do without: W in, Y out; G and Y in, gW out.
TRANSFERS = {"forward": 2, "backward": 3, "forward+backward": 5}
#: Largest relative error of ours against float64, of any weight or gradient.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
#: Of others, times that: compiled stock (torch 2.13) is off by 3e-3 in the gradient of a first layer.
LENIENCE = 100
PATIENCE = 2.0  # seconds: a peer that takes longer for one call is called three times in all


class WrongNumbersError(Exception):
    """A peer computes something else than the reference: its times would mean nothing."""


@dataclass(frozen=True)
class Case:
    """One question: how long do these layers take, in this setting?

    ``passes`` of the mode are one call, between two changes of the weights: what ``update="step"`` is for.
    """

    model: Model
    mode: Mode
    setting: Setting = field(default_factory=Setting)
    passes: int = 1

    @property
    def floor(self) -> int:
        """The bytes that must move in one call."""
        size = self.model.numel * self.setting.dtype.itemsize
        return TRANSFERS[self.mode] * size * self.passes


@dataclass(frozen=True)
class Measurement:
    """What one peer took for a case, in milliseconds a call."""

    case: Case
    provider: str
    times: list[float]
    error: float | None
    """Against float64; None where nothing is computed, or something else."""

    @property
    def median(self) -> float:
        """The median in milliseconds."""
        return statistics.median(self.times)

    @property
    def bytes(self) -> int:
        """What had to move, at the least."""
        if self.provider in ("copy_", "read"):
            size = self.case.model.numel * self.case.setting.dtype.itemsize
            return 2 * size if self.provider == "copy_" else size
        return self.case.floor

    @property
    def gigabytes_per_second(self) -> float:
        """What had to move, over the median."""
        return self.bytes / self.median / 1e6


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the 20 % and 80 % quantiles."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def measure(
    case: Case,
    providers: Sequence[str],
    *,
    seconds: float = 3.0,
    tick: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Check and time providers of :data:`PEERS` in turns, each about as often.

    A turn begins with one untimed call, which brings the provider's own memory back into the caches, and
    has several timed ones where they are short. The turns, whose order rotates, go on for so many
    seconds, and there are five at the least. A time includes the release of what the call returned.

    Args:
        case: what to measure.
        providers: names of :data:`PEERS`, on a GPU also with `` graphed`` at the end; those that cannot run
            here are left out.
        seconds: of timing; checks and compilation come on top.
        tick: called with what is being done, for a bar of progress.

    Raises:
        WrongNumbersError: names the provider. Nothing was timed.
    """
    jobs: dict[str, Job] = {}
    errors: dict[str, float | None] = {}
    torch._dynamo.reset()
    moved = _moved(case)  # once: all providers share the memory of the weights
    for name in providers:
        if why_not(name.removesuffix(" graphed"), case.setting) is None:
            tick(f"{name}: checking")
            jobs[name], errors[name] = prepare(moved, name)
    times = _in_turns(jobs, seconds, case.setting.device, tick)
    return [Measurement(case, name, times[name], errors[name]) for name in jobs]


def _moved(case: Case) -> Case:
    """Return a case whose weights are on its device and of its dtype; nothing is copied that is so."""
    setting = case.setting
    layers = [
        replace(layer, weight=layer.weight.to(setting.device, setting.dtype))
        for layer in case.model.layers
    ]
    return replace(case, model=replace(case.model, layers=layers))


@dataclass(frozen=True)
class Job:
    """What is timed is ``run(argument)``, and not ``start()``, which makes the argument before each call."""

    start: Callable[[], Any]
    run: Callable[[Any], object]


def prepare(case: Case, name: str, *, checked: bool = True) -> tuple[Job, float | None]:
    """Return the call of a provider, and its error if it was checked.

    Raises:
        WrongNumbersError: the error is too large.
    """
    setting = case.setting
    layers = _moved(case).model.layers
    peer = PEERS[name.removesuffix(" graphed")](layers, setting)
    if name in ("copy_", "read"):
        return Job(lambda: None, lambda _: peer.run()), None
    grads = random_like(peer.originals)
    error = None
    if checked and peer.vectors is not None:
        error = largest_error(peer, layers, grads, setting)
        lenience = 1 if name.startswith("ours") else LENIENCE
        if not error < TOLERANCES[setting.dtype] * lenience:
            raise WrongNumbersError(
                f"{name} differs from the reference in float64 by {error:.1e} on {case.model.name}"
            )
    job = _job(peer, grads, case)
    return (_graphed(job) if name.endswith(" graphed") else job), error


def random_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients to start a backward with."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator).to(t) for t in tensors]


def largest_error(
    peer: Peer, layers: Sequence[Layer], grads: Sequence[Tensor], setting: Setting
) -> float:
    """Call a peer; return the largest relative error of its weights and gradients against float64."""
    assert peer.vectors is not None
    before = [(u.detach().clone().double(), v.detach().clone().double()) for u, v in peer.vectors()]
    normalized = peer.run()
    found = torch.autograd.grad(normalized, peer.originals, grads)
    largest = 0.0
    for layer, (u, v), y, g, gw in zip(layers, before, normalized, grads, found, strict=True):
        weight = layer.weight.double().requires_grad_()
        expected = reference.spectral_normalize(
            weight, u, v, n_power_iterations=setting.n_power_iterations, eps=EPS, dim=layer.dim,
            order=peer.order, update=setting.training,
        ).weight  # fmt: skip
        pairs = [(y, expected), (gw, torch.autograd.grad(expected, weight, g.double())[0])]
        for actual, truth in pairs:
            error = (torch.dist(actual.double(), truth) / truth.norm()).item()
            largest = max(largest, error if math.isfinite(error) else math.inf)
    return largest


def _job(peer: Peer, grads: list[Tensor], case: Case) -> Job:
    def change() -> None:
        if case.setting.update != "forward":  # a new step, for who looks at versions
            with torch.no_grad():
                torch._foreach_mul_(peer.originals, 1.0)

    def forward(_: object) -> object:
        with torch.no_grad():
            return [peer.run() for _ in range(case.passes)]

    def backward(outputs: list[list[Tensor]]) -> object:
        return [torch.autograd.grad(outputs.pop(), peer.originals, grads) for _ in list(outputs)]

    def both(_: object) -> object:
        results = []
        for _ in range(case.passes):
            weights = peer.run()
            results.append((weights, torch.autograd.grad(weights, peer.originals, grads)))
        return results

    def graphs() -> list[list[Tensor]]:
        change()
        return [peer.run() for _ in range(case.passes)]

    if case.mode == "backward":
        return Job(graphs, backward)
    return Job(change, forward if case.mode == "forward" else both)


def _graphed(job: Job) -> Job:
    """Return the replay of what a job does, its start included."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        job.run(job.start())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job.run(job.start())
    return Job(lambda: None, lambda _: graph.replay())


def _timed(job: Job, device: torch.device) -> float:
    """Return milliseconds of one call, with the release of what it returned.

    On a GPU the second cache is filled with other things before; on a CPU the call before has left its own.
    """
    argument = job.start()
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        torch.empty(2 * cache, dtype=torch.uint8, device=device).zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        job.run(argument)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    job.run(argument)
    return (time.perf_counter() - start) * 1e3


def _in_turns(
    jobs: dict[str, Job], seconds: float, device: torch.device, tick: Callable[[str], None]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in jobs}
    counts: dict[str, int] = {}
    for name, job in jobs.items():
        tick(f"{name}: first calls")
        fastest = min(_timed(job, device) for _ in range(2))
        if fastest < PATIENCE * 1e3:
            counts[name] = max(1, min(10, round(20 / max(fastest, 0.01))))
        else:
            times[name] = [_timed(job, device) for _ in range(3)]
    for turn in _turns(seconds):
        names = list(counts)
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            tick(f"{name}: turn {turn + 1}")
            _timed(jobs[name], device)
            times[name] += [_timed(jobs[name], device) for _ in range(counts[name])]
    return times


def _turns(seconds: float, least: int = 5) -> Iterator[int]:
    end, turn = time.monotonic() + seconds, 0
    while turn < least or time.monotonic() < end:
        yield turn
        turn += 1
