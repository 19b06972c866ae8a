"""Draw bench/data/results.csv: the pictures, and the tables between marks in README.md and docs/.

    python bench/plot.py [--results CSV]

Of several machines or versions in the file the one with most lines is shown. A table stands between
``<!-- results: NAME -->`` and ``<!-- end of results -->``; what is between them is replaced.
"""

import argparse
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from run import HEADLINE
from scipy.optimize import nnls

from spectral_ext.benchmark.models import SHAPES
from spectral_ext.benchmark.results import Row, read

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "bench" / "data"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MODES = ("forward", "forward+backward")
COLORS = {
    "stock": "#8c8c8c",
    "compiled": "#d08a3e",
    "foreach": "#b8b04a",
    "biggan": "#9a6fb0",
    "ours": "#2a6fb0",
    "copy_": "#c9dcee",
}
PLAIN = {
    "dtype": "float32",
    "order": "u_first",
    "n_power_iterations": "1",
    "training": "True",
    "update": "forward",
    "passes": "1",
}


@dataclass(frozen=True)
class Results:
    """The lines of one machine and its versions."""

    rows: list[Row]
    device: str
    torch: str
    threads: str

    @classmethod
    def of(cls, rows: list[Row]) -> "Results":
        """Take the machine, versions and threads with most lines."""
        kinds = Counter((row["device"], row["torch"], row["threads"]) for row in rows)
        (device, torch, threads), _ = kinds.most_common(1)[0]
        chosen = [row for row in rows if (row["device"], row["torch"]) == (device, torch)]
        return cls(chosen, device, torch, threads)

    def row(self, model: str, mode: str, provider: str, **settings: str) -> Row | None:
        """Return a line, of a plain setting but for what is given."""
        wanted = {**PLAIN, "threads": self.threads, **settings}
        wanted |= {"model": model, "mode": mode, "provider": provider}
        found = [r for r in self.rows if all(r[name] == value for name, value in wanted.items())]
        return found[0] if found else None

    def ms(self, model: str, mode: str, provider: str, **settings: str) -> float | None:
        """Return a median in milliseconds."""
        row = self.row(model, mode, provider, **settings)
        return None if row is None else float(row["median_ms"])

    def about(self, rows: Sequence[Row | None]) -> str:
        """Return what numbers depend on, with the commits of these lines."""
        commits = sorted({row["commit"] for row in rows if row is not None})
        return (
            f"{self.device}, {self.threads} threads, torch {self.torch}, "
            f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
        )


def number(ms: float | None) -> str:
    """Return milliseconds with three digits."""
    if ms is None:
        return ""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def ratio(a: float | None, b: float | None) -> str:
    """Return how many times a is b."""
    return "" if a is None or b is None else f"{a / b:.2f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def norms_table(results: Results) -> str:
    """Return the times of three models, every peer beside ours, and the peak memory."""
    providers = ("stock", "compiled", "foreach", "biggan", "ours", "copy_")
    rows: list[list[str]] = []
    used: list[Row | None] = []
    for model, mode in itertools.product(HEADLINE, MODES):
        lines = [results.row(model, mode, name) for name in providers]
        if mode != "forward":
            lines[-1] = None  # a copy is no measure of a backward
        used += lines
        times = [number(line and float(line["median_ms"])) for line in lines]
        peaks = [line["peak_mb"] if line else "" for line in (lines[0], lines[4])]
        rows.append([model, mode, *times, " / ".join(filter(None, peaks))])
    columns = ("model", "mode", *providers, "peak MB, stock / ours")
    return f"Median ms, float32; {results.about(used)}.\n\n{markdown(columns, rows)}"


def models_table(results: Results) -> str:
    """Return for all models how many times ours the others take."""
    rows: list[list[str]] = []
    used: list[Row | None] = []
    for model, layers in SHAPES.items():
        numel = sum(math.prod(layer["shape"]) for layer in layers)
        row = [model, str(len(layers)), f"{numel / 1e6:.1f}"]
        for mode in MODES:
            others = ("stock", "foreach", "biggan", *(("copy_",) if mode == "forward" else ()))
            used.append(results.row(model, mode, "ours"))
            ours = results.ms(model, mode, "ours")
            row += [number(ours), *(ratio(results.ms(model, mode, name), ours) for name in others)]
        rows.append(row)
    columns = ("model", "layers", "M parameters", "forward: ours, ms", "stock ×", "foreach ×")
    columns += ("biggan ×", "copy_ ×", "both: ours, ms", "stock ×", "foreach ×", "biggan ×")
    return (
        f"Forward, and forward with backward: ours in ms, and how many times that the others take; "
        f"{results.about(used)}.\n\n{markdown(columns, rows)}"
    )


#: Of the table of settings: what a line is called, and what differs in it from the plain one.
VARIANTS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "1 thread": {"threads": "1"},
    "2 iterations": {"n_power_iterations": "2"},
    "5 iterations": {"n_power_iterations": "5"},
    "the hook's order, v_first": {"order": "v_first"},
    "evaluation": {"training": "False"},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    '3 passes, update="step"': {"update": "step", "passes": "3"},
}


def settings_table(results: Results) -> str:
    """Return one change at a time: ours in ms, and stock's multiple of it."""
    rows: list[list[str]] = []
    used: list[Row | None] = []
    for name, settings in VARIANTS.items():
        row = [name]
        for model, mode in itertools.product(HEADLINE[:2], MODES):
            used.append(results.row(model, mode, "ours", **settings))
            ours = results.ms(model, mode, "ours", **settings)
            stock = results.ms(model, mode, "stock", **settings)
            row.append(f"{number(ours)} ({ratio(stock, ours)} ×)" if ours and stock else "")
        rows.append(row)
    columns = ("", *(f"{model}, {mode}" for model, mode in itertools.product(HEADLINE[:2], MODES)))
    return f"Ours in ms (and stock's time over it); {results.about(used)}.\n\n{markdown(columns, rows)}"


@dataclass(frozen=True)
class Growth:
    """A family of questions in which one number grows."""

    title: str
    unit: str
    xs: Sequence[float]
    model: Callable[[float], str]
    mode: str = "forward"
    setting: str | None = None  # the name of what grows, if it is not in the model

    def points(self, results: Results, provider: str) -> tuple[list[float], list[float]]:
        """Return those numbers that were measured, and the milliseconds."""
        settings = [{self.setting: f"{x:g}"} if self.setting else {} for x in self.xs]
        found = [
            (x, results.ms(self.model(x), self.mode, provider, **each))
            for x, each in zip(self.xs, settings, strict=True)
        ]
        return [x for x, ms in found if ms], [ms for _, ms in found if ms]


LAYERS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SIDES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
GROWTHS = (
    *(
        Growth(f"layers of 8x8, {mode}", "layer", LAYERS, lambda n: f"{n:g} x 8x8", mode)
        for mode in MODES
    ),
    *(
        Growth(
            f"bytes of one layer, {mode}",
            "MB",
            [4 * side**2 / 1e6 for side in SIDES],
            lambda mb: "1 x {0}x{0}".format(round((mb * 1e6 / 4) ** 0.5)),
            mode,
        )
        for mode in MODES
    ),
    Growth(
        f"iterations, {HEADLINE[1]}, forward",
        "iteration",
        (1, 2, 3, 5, 10, 20),
        lambda _: HEADLINE[1],
        setting="n_power_iterations",
    ),
)


def fit(xs: Sequence[float], ms: Sequence[float]) -> tuple[float, float]:
    """Return a and b of ms = a + b·x with the least sum of squares of relative errors, both ≥ 0."""
    design = np.array([[1 / y, x / y] for x, y in zip(xs, ms, strict=True)])
    a, b = nnls(design, np.ones(len(xs)))[0]
    return float(a), float(b)


def growth_table(results: Results) -> str:
    """Return the fitted start and slope of every growth and provider."""
    rows = []
    for growth in GROWTHS:
        for provider in COLORS:
            xs, ms = growth.points(results, provider)
            if len(xs) > 2 and not (provider == "copy_" and growth.mode != "forward"):
                a, b = fit(xs, ms)
                rows.append(
                    [
                        growth.title,
                        provider,
                        f"{1e3 * a:.3g}",
                        f"{1e3 * b:.3g} µs for each {growth.unit}",
                    ]
                )
    used = [
        results.row(growth.model(x), growth.mode, "ours") for growth in GROWTHS for x in growth.xs
    ]
    return (
        "Time = start + slope · number, fitted to the points by relative errors; "
        f"{results.about(used)}.\n\n{markdown(('what grows', 'who', 'start, µs', 'slope'), rows)}"
    )


def draw_growth(results: Results) -> None:
    """Draw times against what grows, with the fitted lines."""
    figure, axes = plt.subplots(1, len(GROWTHS), figsize=(17, 3.9), layout="constrained")
    for axis, growth in zip(axes, GROWTHS, strict=True):
        for provider, color in COLORS.items():
            xs, ms = growth.points(results, provider)
            if len(xs) > 2 and not (provider == "copy_" and growth.mode != "forward"):
                a, b = fit(xs, ms)
                axis.plot(xs, ms, "o", ms=4, color=color, label=provider)
                axis.plot(xs, [a + b * x for x in xs], "-", lw=1.2, color=color)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=growth.unit if growth.unit == "MB" else growth.unit + "s",
            title=growth.title,
        )
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(ROOT / "docs" / "pictures" / "growth.png", dpi=90)


def draw_speed(results: Results) -> None:
    """Draw the times of three models relative to ours, a panel for each mode."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    for panel, mode in zip(panels, MODES, strict=True):
        shown = [name for name in COLORS if not (name == "copy_" and mode != "forward")]
        height = 0.84 / len(shown)
        for (place, name), (y, model) in itertools.product(enumerate(shown), enumerate(HEADLINE)):
            ms, ours = results.ms(model, mode, name), results.ms(model, mode, "ours")
            if ms is None or ours is None:
                continue
            at = y + (place - (len(shown) - 1) / 2) * height
            label = name if y == 0 else None
            panel.barh(at, ms / ours, height * 0.9, color=COLORS[name], label=label)
            panel.text(ms / ours, at, f" {number(ms)} ms", va="center", fontsize=7.5)
        panel.set(title=mode, xlabel="time relative to ours", yticks=range(len(HEADLINE)))
        panel.set_yticklabels(HEADLINE)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.18)
    panels[0].invert_yaxis()  # both: the axis is shared
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"All spectral norms of a model: {results.device}, torch {results.torch}", fontsize=10
    )
    figure.savefig(DATA / "speed.png", dpi=110)


TABLES: dict[str, Callable[[Results], str]] = {
    "spectral_norms": norms_table,
    "models": models_table,
    "settings": settings_table,
    "growth": growth_table,
}
MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.S)


def filled(page: str, results: Results) -> str:
    """Return a page with its tables made anew."""
    return MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](results)}\n\n{m[3]}", page)


def main() -> None:
    """Draw the pictures, and write the tables into the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=DATA / "results.csv")
    results = Results.of(read(parser.parse_args().results))
    draw_speed(results)
    draw_growth(results)
    for page in PAGES:
        page.write_text(filled(page.read_text(), results))


if __name__ == "__main__":
    main()
