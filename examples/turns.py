"""Trainings in turns from one seed, with stock's spectral norms and fused: same numbers, less time."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from report import Report
from rich.progress import track

__all__ = ["Comparison", "compare"]


@dataclass
class Comparison:
    """Losses and times of the steps of each training, by its name."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def difference(self, steps: int) -> float:
        """Return how far apart the first steps of the first two trainings are at most, by their losses."""
        stock, fused, *_ = (torch.tensor(losses[:steps]) for losses in self.losses.values())
        return (stock - fused).abs().max().item()

    def add_to(self, report: Report, early: int = 10) -> None:
        """Add the times of a step and the differences of the first two trainings to a report."""
        stock, fused, *_ = (
            1e3 * torch.tensor(seconds).median().item() for seconds in self.seconds.values()
        )
        steps = len(next(iter(self.losses.values())))
        report.table(
            ("", *list(self.losses)[:2], "ratio or difference"),
            [
                ("ms a step, median", f"{stock:.2f}", f"{fused:.2f}", f"{stock / fused:.2f}×"),
                *(
                    (f"loss, first {count} steps", "", "", f"{self.difference(count):.1e}")
                    for count in sorted({min(early, steps), steps})
                ),
            ],
            "One training twice from one seed, step by step in turns; roundings of float32 grow:",
        )


def compare(steps: int, **trainings: Iterator[float]) -> Comparison:
    """Make steps of trainings in turns, with a progress bar, and the same random numbers for all of them.

    Args:
        steps: how many of each.
        trainings: iterators that make a step each time, and give its loss.
    """
    found = Comparison({name: [] for name in trainings}, {name: [] for name in trainings})
    for _ in track(range(steps), description=" and ".join(trainings)):
        state = torch.get_rng_state()
        for name, training in trainings.items():
            torch.set_rng_state(state)
            start = time.perf_counter()
            found.losses[name].append(next(training))
            found.seconds[name].append(time.perf_counter() - start)
    return found
