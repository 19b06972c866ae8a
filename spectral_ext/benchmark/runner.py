"""Measure a list of cases: a bar of progress, a table of each case, a line of each provider in a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from ..backends.cpu import empty_cache
from .measure import Case, Measurement, measure
from .memory import peak_bytes
from .peers import CPU_PEERS, GPU_PEERS
from .results import commit, device_name, row_of, upsert
from .tables import table_of

__all__ = ["Question", "run"]


@dataclass(frozen=True)
class Question:
    """A case, who is to answer it, and with how many threads.

    ``source`` is the name by which another process loads the model again, for the peak memory of stock and
    ours; without it that is not measured.
    """

    case: Case
    threads: int
    providers: Sequence[str] = ()
    source: str | None = None


def run(
    questions: Sequence[Question], *, seconds: float = 3.0, results: Path | None = None
) -> list[Measurement]:
    """Measure all questions, one after the other.

    Args:
        questions: what to measure.
        seconds: of timing for each question; checks and compilation come on top.
        results: a file of results to put the lines into, after each question.

    Raises:
        WrongNumbersError: a provider computes something else.
    """
    console = Console(width=max(100, Console().width))  # names are not cut short in a pipe
    everything: list[Measurement] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(questions))
        for question in questions:
            torch.set_num_threads(question.threads)
            tick = partial(_describe, progress, bar, question.case.model.name)
            found = _answer(question, seconds, tick, results)
            console.print(table_of(found))
            everything += found
            progress.advance(bar)
    if questions:
        device = questions[0].case.setting.device
        at = commit()
        about = f"{device_name(device)}, torch {torch.__version__}" + (
            f", commit {at}" if at else ""
        )
        console.print(about, highlight=False, soft_wrap=True)
    return everything


def _describe(progress: Progress, bar: TaskID, model: str, what: str) -> None:
    progress.update(bar, description=f"{model}: {what}")


def _answer(
    question: Question, seconds: float, tick: "partial[None]", results: Path | None
) -> list[Measurement]:
    case = question.case
    device = case.setting.device
    peers = question.providers or (GPU_PEERS if device.type == "cuda" else CPU_PEERS)
    found = measure(case, peers, seconds=seconds, tick=tick)
    empty_cache()  # a pool for the largest model so far would stay
    rows = []
    for each in found:
        peak = None
        if question.source is not None and each.provider in ("stock", "ours"):
            tick(f"{each.provider}: memory")
            peak = peak_bytes(question.source, each.provider, case.mode, device.type)
        rows.append(row_of(each, peak))
    if results is not None:
        upsert(results, rows)
    return found
