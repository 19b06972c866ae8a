"""What a layer costs before any arithmetic: microseconds of a call against the number of layers of 8x8.

    python bench/host.py [--counts N ...] [--seconds S]

One thread. Each row does more than the one before: the group's call alone, with the accesses of `.weight`,
both with gradients, and with the backward. The last column is the slope of a line through the counts. Of
many hundred layers each costs more, since all that belongs to them no longer fits the second cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import spectral_ext

ROWS = (
    "call, no gradients",
    "and accesses",
    "call with gradients",
    "and accesses",
    "and backward",
)


class Layers(nn.Module):
    """Many small weights with a norm; the forward may take them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(count))
        for layer in self.layers:
            spectral_norm(layer)

    def forward(self, access: bool) -> list[Tensor]:
        """Return the normalized weights, or nothing."""
        return [layer.weight for layer in self.layers] if access else []


def calls(count: int) -> list[Callable[[], object]]:
    """Return what the rows do."""
    model = Layers(count)
    spectral_ext.fuse(model)
    weights = list(model.parameters())
    grads = [torch.randn(8, 8) for _ in weights]

    def without_gradients(access: bool) -> object:
        with torch.no_grad():
            return model(access)

    return [
        lambda: without_gradients(False),
        lambda: without_gradients(True),
        lambda: model(False),
        lambda: model(True),
        lambda: torch.autograd.grad(model(True), weights, grads),
    ]


def microseconds(call: Callable[[], object]) -> float:
    """Time one call, with the release of what it returns."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 20, 50, 100, 200])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number of layers")
    options = parser.parse_args()
    if len(set(options.counts)) < 2 or min(options.counts) < 1:
        parser.error("a line needs two numbers of layers")
    torch.set_num_threads(1)
    medians: list[list[float]] = []
    for count in track(options.counts, "measuring", transient=True):
        rows = calls(count)
        times: list[list[float]] = [[] for _ in rows]
        end = time.monotonic() + options.seconds
        while time.monotonic() < end or len(times[0]) < 5:  # in turns
            for row, seen in zip(rows, times, strict=True):
                seen.append(microseconds(row))
        medians.append([statistics.median(seen) for seen in times])
    table = Table(title="µs")
    table.add_column("layers of 8x8")
    for count in options.counts:
        table.add_column(str(count), justify="right")
    table.add_column("for each", justify="right")
    for name, row in zip(ROWS, zip(*medians, strict=True), strict=True):
        slope = statistics.linear_regression(options.counts, row).slope
        table.add_row(name, *(f"{value:.0f}" for value in row), f"{slope:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
