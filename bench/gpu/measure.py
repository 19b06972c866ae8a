"""Time spectral normalization of whole models on a GPU, and record it in bench/data/results.csv.

    python bench/gpu/measure.py [--seconds N] [--models NAME ...] [--list]

A set-up for the runner in ``spectral_ext/benchmark``, without its tables and bars: the Python of a machine
with a GPU may have nothing but torch. Important models come first and are compiled, too; what did not fit
in the time is said. The second cache is cold in every call, and numbers are compared before anything is
timed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from spectral_ext import backends  # noqa: E402
from spectral_ext.benchmark.measure import Case, Measurement, measure  # noqa: E402
from spectral_ext.benchmark.models import SHAPES, load  # noqa: E402
from spectral_ext.benchmark.peers import GPU_PEERS, Setting  # noqa: E402
from spectral_ext.benchmark.results import row_of, upsert  # noqa: E402

RESULTS = ROOT / "bench" / "data" / "results.csv"
FIRST = ("biggan128_D_ch96", "sngan_cifar10_D", "sngp_wrn28_10")
MODES = ("forward", "forward+backward")
TO_COMPILE = 40.0  # seconds, of one mode of one model


def line_of(found: list[Measurement]) -> str:
    """Return the times of one case, and those of others over ours as a graph."""
    medians = {each.provider: each.median for each in found}
    ours = medians.get("ours graphed") or medians["ours"]
    times = (f"{name} {1e3 * ms:.1f} ({ms / ours:.2f}x)" for name, ms in medians.items())
    return f"{found[0].case.model.name}, {found[0].case.mode}, µs: {', '.join(times)}"


def main() -> int:
    """Measure, print and record; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    parser.add_argument("--list", action="store_true", help="say what would be measured, and stop")
    options = parser.parse_args()
    names = options.models or [*FIRST, *(name for name in SHAPES if name not in FIRST)]
    if options.list:
        print("\n".join(names))
        return 0
    setting = Setting(device=torch.device("cuda", 0))
    if (reason := backends.unavailable("triton", setting.device)) is not None:
        print(f"triton: {reason}")
    end = time.monotonic() + options.seconds
    missing = []
    for name in names:
        for mode in MODES:
            left = end - time.monotonic()
            if left < 8:
                missing.append(f"{name} {mode}")
                continue
            is_compiled = name in FIRST and left > TO_COMPILE + 8
            peers = [p for p in GPU_PEERS if is_compiled or "compiled" not in p]
            found = measure(Case(load(name), mode, setting), peers, seconds=1.0)
            print(line_of(found), flush=True)
            upsert(RESULTS, map(row_of, found))
        torch.cuda.empty_cache()
    if missing:
        print(f"no time was left for {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
