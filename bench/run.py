"""Time spectral normalization of whole models: stock, compiled stock, fused, and a plain copy.

    python bench/run.py [--models NAME ...] [--repeats N] [--threads N]

Numbers are compared before anything is timed. ``bench/NOTES.md`` says how to read the tables.
"""

import argparse
import copy
import csv
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import spectral_ext

ROOT = Path(__file__).resolve().parent.parent
SHAPES = json.loads((ROOT / "tests" / "data" / "model_shapes.json").read_text())
RESULTS = ROOT / "bench" / "data" / "results.csv"
KEY = ("model", "provider", "mode", "dtype", "threads", "cpu", "torch")
COLUMNS = (*KEY[:5], "median_ms", "q20_ms", "q80_ms", *KEY[5:], "commit")
TOLERANCE = 1e-4
VERDICT = {True: "[green]reached", False: "[bold red]NOT reached"}

# The ratio is the other's time divided by ours, but for copy_ ours divided by the copy's.
RATIOS = (
    *(("forward", other) for other in ("stock", "compiled", "copy_")),
    *(("forward+backward", other) for other in ("stock", "compiled")),
)
TARGETS: dict[str, tuple[float, ...]] = {
    "sngan_cifar10_D": (10, 4, 1.8, 8, 4),
    "sngp_wrn28_10": (3, 1.8, 1.1, 4.5, 1.4),
    "biggan128_D_ch96": (4.5, 4.5, 1.15, 8, 2.5),
}
Call = Callable[[], Any]
Times = dict[tuple[str, str], list[float]]  # (mode, provider) -> milliseconds


class Weights(nn.Module):
    """The normalized layers of a model; its forward accesses every weight once."""

    def __init__(self, shapes: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            spectral_norm(make_layer(**shape), dim=shape["dim"]) for shape in shapes
        )

    def forward(self) -> list[Tensor]:
        """Return all normalized weights."""
        return [layer.weight for layer in self.layers]


def make_layer(name: str, shape: list[int], dim: int) -> nn.Module:
    """Return a layer whose weight has that shape and whose rows lie along ``dim``."""
    if len(shape) == 2:
        return nn.Embedding(*shape) if "emb" in name else nn.Linear(shape[1], shape[0], False)
    kind = f"{'ConvTranspose' if dim else 'Conv'}{len(shape) - 2}d"
    channels = shape[:2] if dim else shape[1::-1]
    return getattr(nn, kind)(*channels, tuple(shape[2:]), bias=False)


def random_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients to start a backward with."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator) for t in tensors]


def forward(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Compute all weights without a graph."""
    with torch.no_grad():
        return run()


def forward_backward(
    run: Callable[[], list[Tensor]], parameters: list[nn.Parameter], grads: list[Tensor]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Compute all weights, and the gradients of their originals."""
    weights = run()
    return weights, torch.autograd.grad(weights, parameters, grads)


def copy_all(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Read and write every weight once: the least that a forward can do."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def providers_of(model: Weights) -> dict[str, dict[str, Call]]:
    """Return, for each mode, the providers as calls without arguments; each has its own model."""
    to_compile, fused = copy.deepcopy(model), copy.deepcopy(model)
    spectral_ext.fuse(fused)
    models = {"stock": model, "compiled": to_compile, "ours": fused}
    runs = {**models, "compiled": torch.compile(to_compile)}
    grads = random_like(list(model.parameters()))
    calls: dict[str, dict[str, Call]] = {"forward": {}, "forward+backward": {}}
    for name, run in runs.items():
        parameters = list(models[name].parameters())
        calls["forward"][name] = partial(forward, run)
        calls["forward+backward"][name] = partial(forward_backward, run, parameters, grads)
    sources = [parameter.detach() for parameter in model.parameters()]
    targets = [source.clone() for source in sources]
    calls["forward"]["copy_"] = partial(copy_all, sources, targets)
    return calls


def largest_error(calls: dict[str, Call], name: str) -> float:
    """Call stock and another twice; return the largest relative error of weights and gradients."""
    for call in (calls["stock"], calls[name]):
        call()
    expected, actual = ([*w, *g] for w, g in (calls["stock"](), calls[name]()))
    errors = [
        float((a - e).detach().norm() / e.detach().norm())
        for a, e in zip(actual, expected, strict=True)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def timed(call: Call) -> float:
    """Return milliseconds of one call, with the release of what it returned."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(calls: dict[str, dict[str, Call]], repeats: int, tick: Callable[[], None]) -> Times:
    """Time all providers in turns, so that a change of the machine's speed meets all of them.

    A turn begins with one untimed call, which brings the provider's own memory back into the
    caches, and has several timed ones where they are short.
    """
    times: Times = {}
    for mode, providers in calls.items():
        counts: dict[str, int] = {}
        for name, call in providers.items():
            fastest = min(timed(call) for _ in range(3))
            counts[name] = max(1, min(10, round(20 / fastest)))
            times[mode, name] = []
        for turn in range(repeats):
            names = list(providers)
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                call = providers[name]
                call()
                times[mode, name] += [timed(call) for _ in range(counts[name])]
            tick()
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the 20 % and 80 % quantiles."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def print_peak(name: str, fused: bool = True) -> None:
    """Print the bytes by which a first forward+backward, ours or stock's, raises the peak resident size.

    Runs in a process of its own; a tiny model goes first and takes what is allocated only once.
    """

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    for shapes in ([{"name": "tiny", "shape": [8, 8], "dim": 0}], SHAPES[name]):
        model = Weights(shapes)
        if fused:
            spectral_ext.fuse(model)
        parameters = list(model.parameters())
        grads = random_like(parameters)
        ctypes.CDLL(None).malloc_trim(0)  # free memory of the set-up must not serve the call
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status("VmRSS")
        result = forward_backward(model, parameters, grads)
        peak = (status("VmHWM") - before) * 1024
        del result
    print(peak)


def times_table(name: str, times: Times) -> Table:
    """Show medians and quantiles of one model."""
    table = Table("mode", "provider", "median ms", "20 %", "80 %", title=name)
    for (mode, provider), values in times.items():
        table.add_row(mode, provider, *(f"{value:.3f}" for value in quantiles(values)))
    return table


def add_ratios(table: Table, name: str, times: Times) -> None:
    """Add a row for each ratio of medians."""
    medians = {key: statistics.median(values) for key, values in times.items()}
    targets: Sequence[float | None] = TARGETS.get(name) or [None] * len(RATIOS)
    for (mode, other), target in zip(RATIOS, targets, strict=True):
        ratio, sign = medians[mode, other] / medians[mode, "ours"], "≥"
        if other == "copy_":
            ratio, sign = 1 / ratio, "≤"
        row = [name, mode, other, f"{ratio:.2f}×"]
        if target is not None:
            reached = ratio <= target if other == "copy_" else ratio >= target
            row += [f"{sign} {target:g}×", VERDICT[reached]]
        table.add_row(*row)


def add_memory(table: Table, name: str, threads: int) -> None:
    """Add a row with the peak extra memory, relative to normalized weights and gradients."""
    command = [sys.executable, __file__, "--peak-of", name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    peak = None if done.returncode else int(done.stdout)
    floor = 2 * 4 * sum(math.prod(shape["shape"]) for shape in SHAPES[name])
    found = "not measured" if peak is None else f"{peak / floor:.2f}× ({peak / 2**20:.1f} MiB)"
    judged = "" if peak is None else VERDICT[peak <= 1.1 * floor]
    table.add_row(name, "peak memory", "weights+grads", found, "≤ 1.1×", judged)


def machine_of(threads: int) -> dict[str, str]:
    """Return what the numbers depend on; the commit is marked if files differ from it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    cpu = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return {"threads": str(threads), "cpu": cpu, "torch": torch.__version__, "commit": commit}


def save(path: Path, name: str, times: Times, machine: dict[str, str]) -> None:
    """Write one model's lines to the table of results; a line with the same key is replaced."""
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    for (mode, provider), values in times.items():
        median, q20, q80 = (f"{value:.4f}" for value in quantiles(values))
        row = {"model": name, "provider": provider, "mode": mode, "dtype": "float32", **machine}
        rows.append({**row, "median_ms": median, "q20_ms": q20, "q80_ms": q80})
    merged = {tuple(row[column] for column in KEY): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged[key] for key in sorted(merged))


def main() -> int:
    """Run the benchmark; return 1 if ours computes something else than stock."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(TARGETS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each, at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file to update")
    parser.add_argument("--peak-of", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(args.peak_of, fused=not args.stock)
        return 0

    console = Console(width=max(100, Console().width))  # names are not cut short in a pipe
    machine = machine_of(args.threads)
    ratios = Table("model", "mode", "ours against", "ratio", "target", "", title="ratios")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=2 * args.repeats * len(args.models))
        for name in args.models:
            progress.update(task, description=f"{name}: checking")
            torch._dynamo.reset()
            calls = providers_of(Weights(SHAPES[name]))
            error = largest_error(calls["forward+backward"], "ours")
            if not error < TOLERANCE:
                console.print(f"[bold red]{name}: ours differs from stock by {error:.1e}")
                return 1
            console.print(f"{name}: ours equals stock within {error:.1e}")
            progress.update(task, description=f"{name}: timing")
            times = measure(calls, args.repeats, partial(progress.advance, task))
            del calls
            console.print(times_table(name, times))
            add_ratios(ratios, name, times)
            add_memory(ratios, name, args.threads)
            save(args.results, name, times, machine)
    console.print(ratios)
    about = "{cpu}, {threads} threads, torch {torch}, commit {commit}".format(**machine)
    console.print(about, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
