"""Set-ups of the benchmark: what is measured for bench/data/results.csv, from which bench/plot.py draws.

    python bench/run.py [SET-UP ...] [--seconds S] [--results CSV]

A set-up is a list of questions for the runner, ``spectral_ext/benchmark``; ``python -m spectral_ext bench``
asks others. ``bench/NOTES.md`` says how to read what comes out.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from spectral_ext.benchmark.measure import MODES, Case
from spectral_ext.benchmark.models import SHAPES, load
from spectral_ext.benchmark.peers import Setting
from spectral_ext.benchmark.runner import Question, run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "data" / "results.csv"
HEADLINE = ("sngan_cifar10_D", "sngp_wrn28_10", "biggan128_D_ch96")
THREADS = torch.get_num_threads()
QUICK = ("stock", "foreach", "biggan", "ours", "copy_", "read")  # nothing to wait for
ONLY_OURS = ("stock", "ours", "copy_", "read")


def headline() -> Iterator[Question]:
    """Three models, every mode, every peer, and the peak memory."""
    for name in HEADLINE:
        model = load(name)
        for mode in MODES:
            yield Question(Case(model, mode), THREADS, source=name)


def models() -> Iterator[Question]:
    """All models, without those peers that take minutes to start."""
    for name in SHAPES:
        model = load(name)
        for mode in ("forward", "forward+backward"):
            if name not in HEADLINE:
                yield Question(Case(model, mode), THREADS, QUICK)


def settings() -> Iterator[Question]:
    """One thing changed at a time, on a model of many small layers and on one of large ones."""
    plain = Setting()
    dtypes = (torch.float64, torch.bfloat16, torch.float16)
    variants = [
        *(replace(plain, n_power_iterations=count) for count in (2, 5)),
        *(replace(plain, dtype=dtype) for dtype in dtypes),
        replace(plain, order="v_first"),
        replace(plain, training=False),
    ]
    for name in HEADLINE[:2]:
        model = load(name)
        for mode in ("forward", "forward+backward"):
            for setting in variants:
                yield Question(Case(model, mode, setting), THREADS, ONLY_OURS)
            for threads in range(1, THREADS):  # with all of them: the headline
                yield Question(Case(model, mode), threads, QUICK)
        three_passes = Case(model, "forward+backward", replace(plain, update="step"), passes=3)
        yield Question(three_passes, THREADS, ONLY_OURS)


def peers() -> Iterator[Question]:
    """A peer that does more, on a small model: deel-torchlip's layers, where they are installed."""
    model = load(HEADLINE[0])
    for mode in ("forward", "forward+backward"):
        yield Question(Case(model, mode), THREADS, ("torchlip",))


def growth() -> Iterator[Question]:
    """Time against the number of layers, the bytes of a layer, and the iterations."""
    modes = ("forward", "forward+backward")
    for count in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        model = load(f"{count} x 8x8")
        for mode in modes:
            yield Question(Case(model, mode), THREADS, QUICK)
    for side in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384):
        model = load(f"1 x {side}x{side}")
        for mode in modes:
            yield Question(Case(model, mode), THREADS, ONLY_OURS)
    model = load(HEADLINE[1])
    for count in (3, 10, 20):  # 1, 2 and 5 are asked above
        setting = Setting(n_power_iterations=count)
        yield Question(Case(model, "forward", setting), THREADS, ONLY_OURS)


SETUPS = {each.__name__: each for each in (headline, models, settings, peers, growth)}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("setups", nargs="*", metavar="SET-UP", help=f"of {', '.join(SETUPS)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each question")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file to update")
    options = parser.parse_args()
    for name in options.setups or SETUPS:
        if name not in SETUPS:
            parser.error(f"there is no set-up {name!r}; there are {', '.join(SETUPS)}")
    for name in options.setups or SETUPS:
        run(list(SETUPS[name]()), seconds=options.seconds, results=options.results)


if __name__ == "__main__":
    main()
