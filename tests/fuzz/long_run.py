"""Run the machine for some minutes: ``python tests/fuzz/long_run.py --minutes 30``.

It stops at the first failure, after hypothesis has made it small, and prints a script that repeats it.
At the end it prints how often each operation ran.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import COUNTS, END, LEAVE_OUT, machine
from registry import OPERATIONS


def profile(examples: int, shrink: bool = True, steps: int = 25) -> settings:
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )


def explore(
    minutes: float, leave_out: list[str], seed: int, shrink: bool = True, examples: int = 50
) -> None:
    """Run examples until the time is over; raise what the first failing one raises."""
    end = time.monotonic() + 60 * minutes
    made = machine(leave_out)
    END.append(end)
    while time.monotonic() < end:
        made._hypothesis_internal_use_seed = seed  # what hypothesis.seed() sets on a test
        run_state_machine_as_test(made, settings=profile(examples, shrink))
        seed += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leave-out", default=",".join(LEAVE_OUT), help="names, with commas")
    parser.add_argument("--no-shrink", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    leave_out = [name for name in arguments.leave_out.split(",") if name]
    try:
        explore(arguments.minutes, leave_out, arguments.seed, not arguments.no_shrink)
    finally:
        print(f"{COUNTS['build']} models; how often each operation ran:")
        for name in OPERATIONS:
            print(f"{COUNTS[name]:8} {name}")
    few = [name for name in OPERATIONS if COUNTS[name] < 50 and name not in leave_out]
    if few and arguments.minutes >= 5:
        print(f"Run fewer than 50 times: {', '.join(few)}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
