"""The table of results: one line for each question, machine and version, the latest measurement of it."""

import csv
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

import spectral_ext

from .measure import Measurement, quantiles

__all__ = ["COLUMNS", "KEY", "commit", "device_name", "read", "row_of", "upsert"]

#: What a line is known by.
KEY = (
    "model",
    "mode",
    "provider",
    "dtype",
    "order",
    "n_power_iterations",
    "training",
    "update",
    "passes",
    "threads",
    "device",
    "torch",
)
COLUMNS = (
    *KEY,
    "spectral_ext",
    "commit",
    "layers",
    "numel",
    "calls",
    "median_ms",
    "q20_ms",
    "q80_ms",
    "peak_mb",
)
Row = dict[str, str]


def row_of(measurement: Measurement, peak_bytes: int | None = None) -> Row:
    """Return the line of a measurement; times in milliseconds, the peak memory of a call in MB."""
    case, setting = measurement.case, measurement.case.setting
    median, q20, q80 = (f"{value:.4f}" for value in quantiles(measurement.times))
    return {
        "model": case.model.name,
        "mode": case.mode,
        "provider": measurement.provider,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "order": setting.order,
        "n_power_iterations": str(setting.n_power_iterations),
        "training": str(setting.training),
        "update": setting.update,
        "passes": str(case.passes),
        "threads": str(torch.get_num_threads()) if setting.device.type == "cpu" else "",
        "device": device_name(setting.device),
        "torch": torch.__version__,
        "spectral_ext": spectral_ext.__version__,
        "commit": commit(),
        "layers": str(len(case.model.layers)),
        "numel": str(case.model.numel),
        "calls": str(len(measurement.times)),
        "median_ms": median,
        "q20_ms": q20,
        "q80_ms": q80,
        "peak_mb": "" if peak_bytes is None else f"{peak_bytes / 1e6:.1f}",
    }


def read(path: Path) -> list[Row]:
    """Return the lines of a table; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def upsert(path: Path, rows: Iterable[Row]) -> None:
    """Put lines into a table, in the place of those with the same :data:`KEY`."""
    merged = {tuple(row[name] for name in KEY): row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged[key] for key in sorted(merged))


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Return the commit of the checkout that this is, marked if its code differs from it; else nothing."""
    root = Path(__file__).resolve().parents[2]
    if not (
        root / "csrc"
    ).is_dir():  # an installed package, perhaps in a checkout of something else
        return ""
    made = [
        f":!{path}" for path in ("README.md", "docs", "bench/data")
    ]  # by what asks for the commit
    try:
        name = _git(root, "rev-parse", "--short", "HEAD")
        changed = _git(root, "diff", "--name-only", "HEAD", "--", ".", *made)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{name}-dirty" if changed else name


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
