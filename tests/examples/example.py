"""Run an example as its user does, import it, and read its report."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

__all__ = ["load", "numbers", "run", "tables"]

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import an example; its folder is on the path until the test ends."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


def run(name: str, out: Path, *options: str) -> None:
    """Run an example with its report in a folder, or fail with what it said."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--threads", "1", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def tables(report: Path) -> list[list[list[str]]]:
    """Return the tables of a report: of each the rows, the first with the columns, as cells."""
    found: list[list[list[str]]] = []
    previous = ""
    for line in report.read_text().splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if set(cells) != {"---"}:
                found[-1].append(cells)
        previous = line
    return found


def numbers(cells: list[str]) -> list[float]:
    """Return the first number of each cell that has one."""
    found = (re.search(r"-?\d+(\.\d+)?(e[-+]\d+)?", cell) for cell in cells)
    return [float(match.group()) for match in found if match]
