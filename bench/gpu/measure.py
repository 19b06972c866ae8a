"""Time spectral normalization of whole models on a GPU, and record it in bench/data/gpu.csv.

    python bench/gpu/measure.py [--seconds N] [--models NAME ...] [--list]

Providers: `copy` (all weights copied, the ceiling), stock PyTorch eager, graphed, compiled, compiled
and graphed; ours eager and graphed, by tickets, by phases and by Triton, and the first phase alone.
Passes: forward, and forward with backward; that of `copy` is one pass for both.

A model's weights are made so many times that they exceed the L2 cache twice, and calls take turns, so
that nothing is found in a cache by accident. Numbers are compared with stock before anything is timed.
Important models come first; what did not fit in the time is said.
"""

import argparse
import csv
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from spectral_ext import backends  # noqa: E402
from spectral_ext.functional import spectral_normalize  # noqa: E402

SHAPES = json.loads((ROOT / "tests" / "data" / "model_shapes.json").read_text())
RESULTS = ROOT / "bench" / "data" / "gpu.csv"
KEY = ("model", "provider", "mode", "card", "torch")
COLUMNS = (*KEY, "median_us", "low_us", "high_us", "sets", "driver", "cuda", "triton", "commit")
FIRST = ("biggan128_D_ch96", "sngan_cifar10_D", "sngp_wrn28_10")
MODES = ("forward", "forward+backward")
EPS = 1e-12


@dataclass
class Weights:
    """One set of a model's layers, and gradients of their normalized weights."""

    weights: list[Tensor]
    us: list[Tensor]
    vs: list[Tensor]
    grads: list[Tensor]
    dims: list[int]


def make(model: str) -> Weights:
    """Return a model's layers with random numbers on the device."""
    made = Weights([], [], [], [], [])
    for entry in SHAPES[model]:
        shape, dim = entry["shape"], entry["dim"] % len(entry["shape"])
        weight = torch.randn(shape, device="cuda") * 0.02
        rows, columns = shape[dim], math.prod(shape) // shape[dim]
        made.weights.append(weight.requires_grad_())
        made.us.append(F.normalize(torch.randn(rows, device="cuda"), dim=0))
        made.vs.append(F.normalize(torch.randn(columns, device="cuda"), dim=0))
        made.grads.append(torch.randn_like(weight))
        made.dims.append(dim)
    return made


def stock(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int]
) -> list[Tensor]:
    """Do what torch.nn.utils.parametrizations.spectral_norm does in a training step.

    Without modules: compiled code would be specialized on each of them.
    """
    normalized = []
    for weight, u, v, dim in zip(weights, us, vs, dims, strict=True):
        matrix = (weight if dim == 0 else weight.movedim(dim, 0)).flatten(1)
        with torch.no_grad():
            F.normalize(torch.mv(matrix, v), dim=0, eps=EPS, out=u)
            F.normalize(torch.mv(matrix.mT, u), dim=0, eps=EPS, out=v)
        sigma = torch.vdot(u.clone(), torch.mv(matrix, v.clone()))
        normalized.append(weight / sigma)
    return normalized


def ours(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int]
) -> list[Tensor]:
    """Normalize all layers in one call."""
    return list(spectral_normalize(weights, us, vs, dims=dims, backend="cuda")[0])


def ours_by_triton(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int]
) -> list[Tensor]:
    """Normalize all layers in the launches of the Triton backend."""
    return list(spectral_normalize(weights, us, vs, dims=dims, backend="triton")[0])


def call(function: Callable[..., list[Tensor]], mode: str, layers: Weights) -> object:
    """Run one step of a provider."""
    if mode == "forward":
        with torch.no_grad():
            return function(layers.weights, layers.us, layers.vs, layers.dims)
    normalized = function(layers.weights, layers.us, layers.vs, layers.dims)
    return torch.autograd.grad(normalized, layers.weights, layers.grads)


def timed(run: Callable[[], object], calls: int, seconds: float) -> list[float]:
    """Return microseconds for each of the `calls` in a run, measured again and again."""
    run()
    torch.cuda.synchronize()
    times = []
    end = time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
        begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        finish.record()
        finish.synchronize()
        times.append(begin.elapsed_time(finish) * 1000 / calls)
    return times


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of what a run does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def check(model: str, layers: Weights, ours: Callable[..., list[Tensor]]) -> None:
    """Raise unless ours and stock agree on weights, vectors and gradients."""
    clones = [Weights(la.weights, [u.clone() for u in la.us], [v.clone() for v in la.vs],
                      la.grads, la.dims) for la in (layers, layers)]  # fmt: skip
    found = [
        call(function, MODES[1], la) for function, la in zip((ours, stock), clones, strict=True)
    ]
    torch.testing.assert_close(list(found[0]), list(found[1]), rtol=1e-3, atol=1e-4, msg=model)
    torch.testing.assert_close(clones[0].us + clones[0].vs, clones[1].us + clones[1].vs,
                               rtol=1e-3, atol=1e-4, msg=model)  # fmt: skip


def first_phase(sets: list[Weights]) -> list[float]:
    """Return microseconds of the first launch of a forward by phases, as the profiler saw it.

    Nothing where it sees no kernels, since not everyone may profile.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for layers in sets[:10]:
            call(ours, MODES[0], layers)
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if "forward_kernel" in e.name]
    kernels.sort(key=lambda event: event.time_range.start)
    if not kernels:
        return []
    launches = len(kernels) // min(len(sets), 10)
    return [event.time_range.elapsed_us() for event in kernels[::launches]]


class Recorder:
    """Collects times and writes them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        properties = torch.cuda.get_device_properties(0)
        self.facts = {
            "card": properties.name,
            "torch": torch.__version__,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "triton": output(sys.executable, "-c", "import triton; print(triton.__version__)"),
            "commit": output("git", "describe", "--always", "--dirty"),
        }

    def add(self, model: str, provider: str, mode: str, sets: int, times: list[float]) -> None:
        """Record the times of a provider."""
        low, _, high = statistics.quantiles(times, n=4)
        row = {"model": model, "provider": provider, "mode": mode, "sets": sets, **self.facts}
        row |= {"median_us": f"{statistics.median(times):.2f}"}
        self.rows.append(row | {"low_us": f"{low:.2f}", "high_us": f"{high:.2f}"})
        print(f"{model:24} {provider:18} {mode:18} {statistics.median(times):10.1f} µs", flush=True)

    def write(self) -> None:
        """Put the rows in place of those with the same key."""
        new = {tuple(str(row[name]) for name in KEY): row for row in self.rows}
        kept: list[dict[str, object]] = []
        if RESULTS.exists():
            with RESULTS.open(newline="") as file:
                kept = [r for r in csv.DictReader(file) if tuple(r[n] for n in KEY) not in new]
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *self.rows])

    def table(self) -> str:
        """Return how many times faster ours graphed is than the others, for each model."""
        medians = {
            (row["model"], row["provider"], row["mode"]): float(str(row["median_us"]))
            for row in self.rows
        }
        others = ("ours triton graphed", "stock", "stock graphed", "compiled", "compiled graphed")
        lines = [
            f"{'ours graphed, and the others over it':44}" + "".join(f"{o:>21}" for o in others)
        ]
        lines[0] += f"{'copy/ours':>12}"
        for model in dict.fromkeys(row["model"] for row in self.rows):
            for mode in MODES:
                mine = medians.get((model, "ours graphed", mode))
                if mine is None:
                    continue
                line = f"{model!s:20} {mode:16}{mine:7.0f}"
                for other in others:
                    value = medians.get((model, other, mode))
                    line += f"{'-' if value is None else f'{value / mine:.1f}×':>21}"
                copy = medians.get((model, "copy", "forward"))
                line += f"{'-' if copy is None else f'{copy / mine:.2f}':>12}"
                lines.append(line)
        return "\n".join(lines)


def output(*command: str) -> str:
    """Return the first line that a command prints, or nothing if it cannot be run."""
    try:
        result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip().partition("\n")[0]


def measure_model(model: str, recorder: Recorder, deadline: float) -> None:
    """Time all providers on one model; the compiled ones last, since compiling takes longest."""
    size = 4 * sum(math.prod(entry["shape"]) for entry in SHAPES[model])
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [make(model) for _ in range(max(2, math.ceil(2 * cache / size)))]
    seconds = 0.25
    why_no_triton = backends.unavailable("triton", torch.device("cuda", 0))
    check(model, sets[0], ours)
    if why_no_triton is None:
        check(model, sets[0], ours_by_triton)
    else:
        print(f"triton: {why_no_triton}")

    flat = [torch.empty(size // 4, device="cuda") for _ in range(len(sets) + 1)]

    def copy() -> None:
        for source, target in itertools.pairwise(flat):
            target.copy_(source)

    recorder.add(model, "copy", "forward", len(sets), timed(copy, len(sets), seconds))
    flat.clear()

    def every(function: Callable[..., list[Tensor]], mode: str) -> Callable[[], object]:
        # Results are dropped one by one, so that memory is used again as in training.
        def run() -> None:
            for layers in sets:
                call(function, mode, layers)

        return run

    def add(provider: str, mode: str, run: Callable[[], object]) -> None:
        recorder.add(model, provider, mode, len(sets), timed(run, len(sets), seconds))

    for mode in MODES:
        for schedule in ("ticket", "phases"):
            os.environ["SPECTRAL_EXT_CUDA_SCHEDULE"] = schedule
            name = "ours" if schedule == "ticket" else "ours phases"
            add(name, mode, every(ours, mode))
            add(f"{name} graphed", mode, graphed(every(ours, mode)))
        if why_no_triton is None:
            add("ours triton", mode, every(ours_by_triton, mode))
            add("ours triton graphed", mode, graphed(every(ours_by_triton, mode)))
        if mode == "forward":
            alone = first_phase(sets)
            if alone:
                recorder.add(model, "ours P1 alone", mode, len(sets), alone)
        add("stock", mode, every(stock, mode))
        add("stock graphed", mode, graphed(every(stock, mode)))
    for mode in MODES:
        if time.monotonic() > deadline - 40:
            print(f"{model}: no time is left to compile stock's {mode}", flush=True)
            continue
        torch._dynamo.reset()
        compiled = torch.compile(stock, fullgraph=True)
        add("compiled", mode, every(compiled, mode))
        add("compiled graphed", mode, graphed(every(compiled, mode)))


def main() -> int:
    """Measure, print and record; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    parser.add_argument("--list", action="store_true", help="say what would be measured, and stop")
    arguments = parser.parse_args()
    models = arguments.models or [*FIRST, *(name for name in SHAPES if name not in FIRST)]
    if arguments.list:
        print("\n".join(models))
        return 0
    deadline = time.monotonic() + arguments.seconds
    recorder = Recorder()
    missing = []
    for i, model in enumerate(models):
        if time.monotonic() > deadline - 8:
            missing.append(model)
            continue
        # Important models take what they need; each of the others leaves some for those that follow.
        left = len(models) - i - 1
        measure_model(model, recorder, deadline - (6 * left if model not in FIRST else 0))
        recorder.write()
        torch.cuda.empty_cache()
    print(f"\n{recorder.facts['card']}, torch {recorder.facts['torch']}; times in µs")
    print(recorder.table())
    if missing:
        print(f"no time was left for {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
