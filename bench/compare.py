"""Time this tree against another commit: the ratio says whether plain layers became slower.

    python bench/compare.py REVISION [--models NAME ...] [--repeats N] [--threads N]

The other commit is checked out and compiled under ``build/compare``. Each tree runs in a process of its own;
they take turns, so that a change of the machine's speed meets both. A ratio is this tree's time divided by
the other's.
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
MODELS = ("sngan_cifar10_D", "sngp_wrn28_10", "biggan128_D_ch96")
MODES = ("forward", "forward+backward", "evaluation")


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
        "forward+backward": forward_backward,
        "evaluation": torch.no_grad()(model),
    }
    for line in sys.stdin:
        mode, count = line.split()
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


def compare(
    table: Table, name: str, trees: tuple[Path, Path], repeats: int, threads: int, tick
) -> None:
    """Add a row for each mode of a model."""
    with worker(trees[0], name, threads) as ours, worker(trees[1], name, threads) as theirs:
        for mode in MODES:
            fastest = min(min(ask(p, mode, 3)) for p in (ours, theirs))
            count = max(1, min(40, round(20 / fastest)))
            times: dict[int, list[float]] = {ours.pid: [], theirs.pid: []}
            ratios = []
            for turn in range(repeats):
                medians = {}
                for process in (ours, theirs) if turn % 2 else (theirs, ours):
                    found = ask(process, mode, count)
                    times[process.pid] += found
                    medians[process.pid] = statistics.median(found)
                ratios.append(medians[ours.pid] / medians[theirs.pid])
                tick()
            here, there = (statistics.median(times[p.pid]) for p in (ours, theirs))
            low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
            median = statistics.median(ratios)
            row = (f"{here:.3f}", f"{there:.3f}", f"{here / there:.3f}")
            table.add_row(name, mode, *row, f"{median:.3f} ({low:.3f} to {high:.3f})")


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("revision", nargs="?", default="HEAD~1")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=30, help="turns of each, at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", nargs=2, metavar=("NAME", "TREE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        serve(*args.serve)
        return 0
    console = Console(width=max(110, Console().width))
    with console.status(f"checking out and compiling {args.revision}"):
        trees = (ROOT, tree_of(args.revision))
    columns = (
        "model",
        "mode",
        "ms here",
        f"ms {args.revision}",
        "of medians",
        "by turns (20 to 80 %)",
    )
    table = Table(*columns, title=f"this tree divided by {args.revision}")
    with Progress(console=console, transient=True) as progress:
        total = len(MODES) * args.repeats * len(args.models)
        task = progress.add_task("timing", total=total)
        for name in args.models:
            tick = partial(progress.advance, task)
            compare(table, name, trees, args.repeats, args.threads, tick)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
