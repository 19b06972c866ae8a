"""Draw the pictures of how_it_works.md: `make pictures`.

    python docs/draw.py [--out FOLDER]

The tickets are those of the native plan for a real model, cut for a device of few CTAs.
"""

import argparse
import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from spectral_ext import _C
from spectral_ext.benchmark.models import SHAPES

HERE = Path(__file__).resolve().parent
MODEL, TICKETS = "sngan_cifar10_D", 16
ROWS = 7
BLUE, ORANGE, GREEN, GRAY = "#2a6fb0", "#d9822b", "#3a9a5b", "#d8dde3"
PHASES = (
    ("rows", BLUE, "rows: t = Mv, and shares of Mᵀt"),
    ("columns", ORANGE, "columns: add the shares up"),
    ("scale", GREEN, "divide by σ"),
)


def matrix(ax: Axes, x: float, y: float, title: str, note: str, color: str = GRAY) -> None:
    """Draw a weight as a matrix that is read once."""
    for row in range(ROWS):
        ax.add_patch(Rectangle((x, y + row), 9, 0.86, facecolor=color, edgecolor="none"))
    ax.text(x + 4.5, y - 0.7, title, ha="center", va="bottom", fontsize=11)
    ax.text(x + 4.5, y + ROWS + 0.3, note, ha="center", va="top", fontsize=9, color="0.35")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.3, "color": color}
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def draw_one_read() -> Figure:
    """Return stock's four reads of a weight above our two."""
    figure, ax = plt.subplots(figsize=(9.6, 4.9), layout="constrained")
    ax.set(xlim=(-8.5, 50), ylim=(26, -2.5), aspect="equal")
    ax.axis("off")
    stock = ("u = N(Mv)", "v = N(Mᵀu)", "σ = uᵀMv", "Y = M/σ")
    for place, title in enumerate(stock):
        matrix(ax, 13 * place, 0, title, f"read {place + 1}")
    top = 13.5
    ax.text(-1, 3.5, "stock", ha="right", va="center", fontsize=13, weight="bold")
    ax.text(-1, top + 5, "here", ha="right", va="center", fontsize=13, weight="bold")

    matrix(ax, 0, top, "", "")
    ax.add_patch(Rectangle((0, top - 2.2), 9, 0.86, facecolor=ORANGE))
    ax.text(9.6, top - 1.8, "v", va="center", fontsize=11, color=ORANGE)
    row = top + 2
    ax.add_patch(Rectangle((0, row), 9, 0.86, facecolor=BLUE))
    ax.text(-0.6, row + 0.43, "$M_r$", ha="right", va="center", fontsize=11, color=BLUE)
    bottom = top + ROWS + 1.6
    ax.add_patch(Rectangle((0, bottom), 9, 0.86, facecolor=GREEN))
    ax.text(9.6, bottom + 0.43, "s", va="center", fontsize=11, color=GREEN)
    arrow(ax, (4.5, top - 1.3), (4.5, row - 0.1), ORANGE)
    arrow(ax, (4.5, row + 1), (4.5, bottom - 0.1), BLUE)
    ax.text(4.5, bottom + 1.4, "read 1", ha="center", va="top", fontsize=9, color="0.35")
    steps = (
        "for each row, while it is in cache:\n"
        r"    $t_r = M_r \cdot v$" + "\n"
        r"    $s \leftarrow s + t_r M_r$" + "\n\n"
        "from the sums, without the matrix:\n"
        r"    $d = \max(\|t\|, \epsilon)$,  $u = t/d$,  $y = s/d$" + "\n"
        r"    $v = y/\max(\|y\|, \epsilon)$,  $\sigma = \|y\|^2/\max(\|y\|, \epsilon)$"
    )
    ax.text(13, top + 3.5, steps, va="center", fontsize=11, linespacing=1.5)
    matrix(ax, 39, top, stock[3], "read 2")
    return figure


def cell(ax: Axes, ticket: float, layer: int, color: str) -> None:
    """Draw a piece of a layer in a ticket."""
    ax.add_patch(Rectangle((ticket + 0.06, layer - 0.38), 0.88, 0.76, facecolor=color))


def draw_tickets() -> Figure:
    """Return the plan of a forward: a column for each ticket, a line for each layer."""
    shapes = [
        (math.prod(w["shape"][: w["dim"]]), w["shape"][w["dim"]], math.prod(w["shape"][w["dim"] + 1 :]))
        for w in SHAPES[MODEL]
    ]  # fmt: skip
    plan = _C.plan_forward(shapes, tickets=TICKETS)
    colors = {kind: color for kind, color, _ in PHASES} | {"vectors": GREEN}
    figure, ax = plt.subplots(figsize=(9.6, 4.2), layout="constrained")
    for ticket, (begin, end) in enumerate(itertools.pairwise(plan["tickets"])):
        for piece in plan["pieces"][begin:end]:
            cell(ax, ticket, piece["layer"], colors[piece["kind"]])
    starts = plan["phases"]
    for (begin, end), (_, color, label) in zip(itertools.pairwise(starts), PHASES, strict=True):
        middle = (begin + end) / 2
        ax.text(middle, -1, label, ha="center", va="bottom", fontsize=10, color=color)
        ax.axvline(begin, color="0.7", linewidth=0.8, linestyle=":")
    ax.set(xlim=(0, len(plan["tickets"]) - 1), ylim=(len(shapes) - 0.4, -0.7))
    ax.set_yticks(
        range(len(shapes)), [f"{rows} × {outer * inner}" for outer, rows, inner in shapes]
    )
    ax.set_xlabel(
        f"ticket: what a CTA takes next, in this order ({MODEL}, at most {TICKETS} a phase)"
    )
    ax.set_ylabel("layer, as a matrix")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "pictures", metavar="FOLDER")
    parser.add_argument("--format", default="svg", help="or png, to look at them")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # The same bits for the same picture.
    plt.rcParams["svg.hashsalt"] = "spectral_ext"
    metadata = {"Date": None} if arguments.format == "svg" else None
    for name, draw in (("one_read", draw_one_read), ("tickets", draw_tickets)):
        path = arguments.out / f"{name}.{arguments.format}"
        draw().savefig(path, metadata=metadata, dpi=110)
        print(path)


if __name__ == "__main__":
    main()
