"""Time this tree against another commit: the ratio says whether plain layers became slower.

    python bench/compare.py REVISION [--models NAME ...] [--repeats N] [--threads N] [--at-most RATIO]

The other commit is checked out and compiled under ``build/compare``. Each tree runs in processes of its own.
Pairs of processes are timed alternately, so that a change of the machine's speed affects both. A ratio is
this tree's time divided by the other's. Models of tiny layers show what a layer costs on the host before
any arithmetic.

With ``--at-most`` the exit status is 1 if a row is slower than that: if 80 % of its ratios are larger.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import spectral_ext

ROOT = Path(__file__).resolve().parent.parent
SHAPES = json.loads((ROOT / "spectral_ext" / "benchmark" / "model_shapes.json").read_text())
MODELS = ("1 x 8x8", "200 x 8x8", "sngan_cifar10_D", "sngp_wrn28_10", "biggan128_D_ch96")
# A process may be up to 10 % slower than another one that does the same.
PAIRS = 4
MODES = ("forward", "with gradients", "forward+backward", "evaluation")


def git(*arguments: str) -> str:
    """Run git on this tree; return what it prints."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def tree_of(revision: str) -> Path:
    """Return a folder with another commit, compiled for the CPU."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    tree = ROOT / "build" / "compare" / commit[:12]
    if not tree.exists():
        git("worktree", "prune")
        git("worktree", "add", "--force", "--detach", str(tree), commit)
    if not list((tree / "spectral_ext").glob("_C*.so")):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = {**os.environ, "SKIP_CUDA": "1"}
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    return tree


class Weights(nn.Module):
    """The layers of a model; an older tree has no runner, so that this script brings all it needs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        if name in SHAPES:
            entries = SHAPES[name]
        else:  # "9 x 64x32"
            count, _, shape = name.split()
            entries = [{"shape": [*map(int, shape.split("x"))], "dim": 0}] * int(count)
        self.layers = nn.ModuleList(nn.Module() for _ in entries)
        for layer, entry in zip(self.layers, entries, strict=True):
            layer.weight = nn.Parameter(torch.randn(entry["shape"]) * 0.02)
            spectral_norm(layer, dim=entry["dim"])

    def forward(self) -> list[torch.Tensor]:
        """Take every weight once."""
        return [layer.weight for layer in self.layers]


def milliseconds(call: Callable[[], object]) -> float:
    """Time one call, with the release of what it returned."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def serve(name: str, tree: str) -> None:
    """Answer each line ``mode count`` with so many milliseconds."""
    assert Path(spectral_ext.__file__).is_relative_to(tree), f"not of {tree}: {spectral_ext}"
    model = Weights(name)
    spectral_ext.fuse(model)
    parameters = list(model.parameters())
    grads = [torch.randn_like(parameter) for parameter in parameters]

    def forward_backward() -> object:
        weights = model()
        return weights, torch.autograd.grad(weights, parameters, grads)

    calls = {
        "forward": torch.no_grad()(model),
        "with gradients": model,
        "forward+backward": forward_backward,
        "evaluation": torch.no_grad()(model),
    }
    for line in sys.stdin:
        mode, count = line.rsplit(maxsplit=1)
        model.train(mode != "evaluation")
        calls[mode]()
        print(json.dumps([milliseconds(calls[mode]) for _ in range(int(count))]), flush=True)


@contextmanager
def worker(tree: Path, name: str, threads: int) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that times a model with the package of a tree."""
    command = [sys.executable, __file__, "--serve", name, str(tree), "--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def ask(process: "subprocess.Popen[str]", mode: str, count: int) -> list[float]:
    """Let a process time some calls."""
    assert process.stdin is not None and process.stdout is not None
    print(mode, count, file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


@dataclass(frozen=True)
class Row:
    """What was measured for a mode of a model: medians in milliseconds, and the ratio of each turn."""

    model: str
    mode: str
    here: float
    there: float
    ratios: list[float]

    @property
    def quantiles(self) -> tuple[float, float]:
        """The 20 % and 80 % quantiles of the ratios."""
        low, *_, high = statistics.quantiles(self.ratios, n=5, method="inclusive")
        return low, high

    def is_slower(self, bound: float) -> bool:
        """Return whether the ratio exceeds a bound beyond the noise: in 80 % of the turns."""
        return self.quantiles[0] > bound

    def cells(self) -> list[str]:
        """Return the row of the table."""
        low, high = self.quantiles
        of_turns = f"{statistics.median(self.ratios):.3f} ({low:.3f} to {high:.3f})"
        medians = [f"{value:.3f}" for value in (self.here, self.there, self.here / self.there)]
        return [self.model, self.mode, *medians, of_turns]


def compare(
    name: str,
    trees: tuple[Path, Path],
    repeats: int,
    threads: int,
    tick: Callable[[], object],
) -> Iterator[Row]:
    """Yield a row for each mode of a model."""
    here: dict[str, list[float]] = {mode: [] for mode in MODES}
    there: dict[str, list[float]] = {mode: [] for mode in MODES}
    ratios: dict[str, list[float]] = {mode: [] for mode in MODES}
    for pair in range(PAIRS):
        with worker(trees[0], name, threads) as ours, worker(trees[1], name, threads) as theirs:
            for mode in MODES:
                fastest = min(min(ask(p, mode, 3)) for p in (ours, theirs))
                count = max(1, min(40, round(20 / max(fastest, 0.01))))
                for turn in range(pair, repeats, PAIRS):
                    found = {}
                    for process in (ours, theirs) if turn % 2 else (theirs, ours):
                        found[process] = ask(process, mode, count)
                    here[mode] += found[ours]
                    there[mode] += found[theirs]
                    medians = [statistics.median(found[p]) for p in (ours, theirs)]
                    ratios[mode].append(medians[0] / medians[1])
                    tick()
    for mode in MODES:
        yield Row(
            name, mode, statistics.median(here[mode]), statistics.median(there[mode]), ratios[mode]
        )


def table_of(rows: list[Row], revision: str) -> Table:
    """Return the table of all rows."""
    columns = ("model", "mode", "ms here", f"ms {revision}", "of medians", "by turns (20 to 80 %)")
    table = Table(*columns, title=f"this tree divided by {revision}")
    for row in rows:
        table.add_row(*row.cells())
    return table


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("revision", nargs="?", default="HEAD~1")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=30, help="turns of each, at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--at-most", type=float, metavar="RATIO", help="fail if a row is slower")
    parser.add_argument("--serve", nargs=2, metavar=("NAME", "TREE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    if args.serve:
        serve(*args.serve)
        return 0
    console = Console(width=max(110, Console().width))
    with console.status(f"checking out and compiling {args.revision}"):
        trees = (ROOT, tree_of(args.revision))
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        total = len(MODES) * args.repeats * len(args.models)
        task = progress.add_task("timing", total=total)
        tick = partial(progress.advance, task)
        for name in args.models:
            rows += compare(name, trees, args.repeats, args.threads, tick)
    console.print(table_of(rows, args.revision))
    slower = [row for row in rows if args.at_most is not None and row.is_slower(args.at_most)]
    for row in slower:
        console.print(f"slower than {args.at_most}: {row.model}, {row.mode}", soft_wrap=True)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
