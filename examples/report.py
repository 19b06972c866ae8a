"""The report of an example: what it found, its pictures, and what the numbers depend on.

An example makes one :class:`Report`, adds to it in reading order, and calls :meth:`Report.write` last.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import spectral_ext
from spectral_ext.benchmark.results import commit, device_name

__all__ = ["Report", "argument_parser"]


def argument_parser(description: str, name: str, **counts: int) -> argparse.ArgumentParser:
    """Return a parser with ``--threads``, ``--out`` and an integer option for each of ``counts``."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for count, default in counts.items():
        parser.add_argument(f"--{count.replace('_', '-')}", type=int, default=default, metavar="N")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("out") / name, metavar="FOLDER")
    return parser


class Report:
    """Collects text, tables and pictures; the pictures are written at once, the text at the end.

    Args:
        title: The heading of the report.
        out: The folder of ``report.md`` and of the pictures. It is made if it is not there.
    """

    def __init__(self, title: str, out: Path) -> None:
        self._out, self._start = out, time.monotonic()
        self._parts = [f"# {title}"]
        out.mkdir(parents=True, exist_ok=True)

    def text(self, text: str) -> None:
        """Add a paragraph of Markdown."""
        self._parts.append(text.strip())

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """Add a table, and print it."""
        shown = Table(*columns, title=title)
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
        lines = [columns, ["---"] * len(columns), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self._parts.append(f"{title}\n\n{table}".strip())

    def picture(self, figure: Figure, name: str, caption: str) -> None:
        """Write a figure to ``<name>.png``, and show it in the report."""
        figure.savefig(self._out / f"{name}.png", dpi=110)
        self._parts.append(f"![{caption}]({name}.png)\n\n*{caption}*")

    def write(self) -> Path:
        """Write ``report.md``, which ends with the command, the versions, the machine and the commit."""
        command = shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        self._parts.append(
            f"`{command}` took {time.monotonic() - self._start:.0f} s: torch {torch.__version__}, "
            f"spectral_ext {spectral_ext.__version__} of commit {commit() or 'unknown'}, "
            f"{torch.get_num_threads()} threads, {device_name(torch.device('cpu'))}."
        )
        path = self._out / "report.md"
        path.write_text("\n\n".join(self._parts) + "\n")
        print(f"The report is {path}; its pictures are beside it.")
        return path
