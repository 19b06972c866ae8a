"""Build, test and measure the backends of CUDA devices on the GPU here: `make gpu`, `make gpu-smoke`.

Needs torch with CUDA, nvcc and pytest in the Python that runs it, and no network. Every step has its
share of the time; what did not fit is said, and a step that failed makes the whole fail at the end.
The short table of the benchmark comes last.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "synccheck")
# Tests that a smoke test leaves out, by words in their names.
SLOW = ("scales", "eps", "gradcheck", "reversed", "strided", "expanded", "3-", "2_to_the_31")


@dataclass
class Steps:
    """The steps of a run, and what became of them."""

    seconds: float
    start: float = field(default_factory=time.monotonic)
    outcomes: list[str] = field(default_factory=list)
    failed: bool = False

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.seconds - (time.monotonic() - self.start)

    def run(self, name: str, *command: object, limit: float, **environ: str) -> bool:
        """Run a command for at most `limit` seconds and print what it prints; return whether it was well."""
        limit = min(limit, self.left())
        words = [str(word) for word in command]
        print(f"\n== {name} (at most {limit:.0f} s): {' '.join(words)}", flush=True)
        begin = time.monotonic()
        try:
            if limit < 5:
                raise subprocess.TimeoutExpired(words, limit)
            code = run_all_of(words, limit, {**os.environ, **environ})
            outcome = "passed" if code == 0 else f"FAILED with status {code}"
        except subprocess.TimeoutExpired:
            outcome = "NOT FINISHED in its time"
        except FileNotFoundError as error:
            outcome = f"FAILED: {error}"
        self.failed |= outcome != "passed"
        self.outcomes.append(f"{name}: {outcome} ({time.monotonic() - begin:.0f} s)")
        return outcome == "passed"

    def skip(self, name: str, reason: str) -> None:
        """Note a step that cannot be done here."""
        self.outcomes.append(f"{name}: not done, {reason}")


def run_all_of(words: list[str], limit: float, environ: dict[str, str]) -> int:
    """Run a command, and end it with all processes that it has started if its time is over.

    The Python that compute-sanitizer starts would otherwise go on, and use the device beside the next step.
    """
    with subprocess.Popen(words, cwd=ROOT, env=environ, start_new_session=True) as process:
        try:
            return process.wait(limit)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def architecture() -> str | None:
    """Return what to compile for: the device's own architecture, None without a device."""
    script = (
        "import torch\n"
        "if torch.cuda.is_available(): print('%d.%d' % torch.cuda.get_device_capability())"
    )
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    return output.strip() or None


def sanitizer() -> str | None:
    """Return compute-sanitizer, from PATH or from the usual toolkit."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("compute-sanitizer", path=path)


def main() -> int:
    """Run all steps; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the essential half, in two minutes")
    parser.add_argument(
        "--dry-run", action="store_true", help="build and collect, without a device"
    )
    arguments = parser.parse_args()
    steps = Steps(seconds=115 if arguments.smoke else 470)
    python = sys.executable

    device = architecture()
    if device is None and not arguments.dry_run:
        print(
            "torch sees no CUDA device here; `make gpu DRY_RUN=1` builds and collects without one"
        )
        return 1
    build = {"FORCE_CUDA": "1"}
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        build["TORCH_CUDA_ARCH_LIST"] = device or "9.0"
    limit = 600 if arguments.dry_run else 200
    if arguments.dry_run:
        steps.seconds = 900
    if not steps.run(
        "build", python, "setup.py", "build_ext", "--inplace", limit=limit, **build
    ) or not steps.run("installation", python, "-m", "spectral_ext", limit=60):
        print("\n" + "\n".join(steps.outcomes))
        return 1

    tests = [python, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    tests += ["tests/test_cuda_device.py"]
    measure = [python, HERE / "measure.py"]
    if arguments.dry_run:
        steps.run("tests", *tests, "--collect-only", limit=100)
        steps.run("benchmark", *measure, "--list", limit=100)
    else:
        chosen = ["-k", f"not ({' or '.join(SLOW)})"] if arguments.smoke else []
        steps.run("tests", *tests, *chosen, limit=50 if arguments.smoke else 200)
        tool = sanitizer()
        for check in TOOLS[:1] if arguments.smoke else TOOLS:
            if tool is None:
                steps.skip(check, "there is no compute-sanitizer")
                continue
            steps.run(
                check, tool, "--tool", check, "--error-exitcode", "9", python,
                HERE / "small_list.py", limit=25 if arguments.smoke else 45,
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # each tensor is a block that has bounds
            )  # fmt: skip
        print("\n" + "\n".join(steps.outcomes))
        seconds = max(10.0, steps.left() - 15)
        steps.run("benchmark", *measure, "--seconds", f"{seconds:.0f}", limit=seconds + 10)
    if steps.failed or arguments.dry_run:
        print("\n" + "\n".join(steps.outcomes))
    return int(steps.failed)


if __name__ == "__main__":
    sys.exit(main())
