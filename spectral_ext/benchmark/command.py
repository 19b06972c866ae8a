"""``python -m spectral_ext bench MODEL`` and ``python -m spectral_ext profile MODEL``."""

import argparse
import itertools
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import track

from .arguments import DTYPES
from .measure import Case
from .models import SHAPES, load
from .peers import PEERS, Setting
from .profiling import operations_table, parts_table, profile_step
from .runner import Question, run

__all__ = ["bench", "profile"]


def bench(options: argparse.Namespace) -> None:
    """Measure every case that the options make.

    Raises:
        ValueError: there is no such model or provider, or a number is out of range.
        WrongNumbersError: a provider computes something else.
    """
    unknown = [p for p in options.providers if p.removesuffix(" graphed") not in PEERS]
    if unknown:
        raise ValueError(f"there is no provider {unknown[0]!r}; there are: {', '.join(PEERS)}")
    if min(*options.iterations, *options.threads, options.passes) < 1:
        raise ValueError("--iterations, --threads and --passes must be positive")
    run(list(_questions(options)), seconds=options.seconds, results=options.results)


def _questions(options: argparse.Namespace) -> Iterator[Question]:
    for name in SHAPES if options.models == ["all"] else options.models:
        model = load(name)
        for dtype, order, iterations, threads, mode in itertools.product(
            options.dtypes, options.orders, options.iterations, options.threads, options.modes
        ):
            setting = Setting(
                iterations,
                order,
                not options.evaluation,
                DTYPES[dtype],
                options.update,
                options.device,
            )
            case = Case(model, mode, setting, options.passes)
            is_plain = setting == Setting(device=options.device) and options.passes == 1
            source = name if options.memory and is_plain else None
            yield Question(case, threads, options.providers, source)


def profile(options: argparse.Namespace) -> None:
    """Profile a training step with stock's norms and with fused ones, and show both.

    Raises:
        ValueError: there is no such model, or a number is out of range.
    """
    if min(options.steps, options.threads) < 1:
        raise ValueError("--steps and --threads must be positive")
    model = load(options.model)
    torch.set_num_threads(options.threads)
    console = Console(width=max(110, Console().width))
    folder = options.out / model.name
    stock, fused = (
        profile_step(
            model,
            name == "fused",
            folder / f"{name}.json",
            steps=options.steps,
            device=options.device,
        )
        for name in track(("stock", "fused"), "profiling", console=console, transient=True)
    )
    console.print(parts_table(stock, fused, f"{model.name}, {options.threads} threads"))
    console.print(operations_table(stock, fused))
    console.print(
        f"Chrome traces: {folder}/stock.json and fused.json, for chrome://tracing or ui.perfetto.dev. "
        "A profiled step is slower than a plain one, most where operations are small.",
        soft_wrap=True,
    )
