"""The memory that one forward and backward takes, measured in a process of its own.

``python -m spectral_ext.benchmark.memory MODEL PROVIDER MODE DEVICE THREADS`` prints by how many bytes a
first call raises the peak of the resident size (Linux), or of what is allocated on a GPU.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from .measure import Case, Mode, prepare
from .models import Model, load, random_layer
from .peers import Setting

__all__ = ["peak_bytes"]


def peak_bytes(
    model: str, provider: str, mode: Mode = "forward+backward", device: str = "cpu"
) -> int | None:
    """Return what a first call adds to the memory that weights, ``u`` and ``v`` take.

    Results and gradients are in it. None where it cannot be measured.
    """
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", __name__, model, provider, mode, device]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _measure(model: Model, provider: str, mode: Mode, device: torch.device) -> int:
    job, _ = prepare(Case(model, mode, Setting(device=device)), provider, checked=False)
    argument = job.start()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job.run(argument)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # free memory of the set-up must not serve the call
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    result = job.run(argument)
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main(name: str, provider: str, mode: Mode, device: str, threads: str) -> None:
    """Print the bytes; a tiny model goes first and takes what is allocated only once."""
    torch.set_num_threads(int(threads))
    tiny = Model("tiny", [random_layer("tiny", [8, 8], 0)])
    _measure(tiny, provider, mode, torch.device(device))
    print(_measure(load(name), provider, mode, torch.device(device)))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
