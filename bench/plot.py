"""Draw bench/data/results.csv as the picture of the README: times relative to ours, for each model.

    python bench/plot.py [--results CSV] [--output PNG]

Shown are the rows with the processor, the torch and the threads of the last one.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "bench" / "data"
MODELS = ("sngan_cifar10_D", "sngp_wrn28_10", "biggan128_D_ch96")
PROVIDERS = {"stock": "#8c8c8c", "compiled": "#d08a3e", "ours": "#2a6fb0", "copy_": "#c9dcee"}


def main() -> None:
    """Draw one panel for each mode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=DATA / "results.csv")
    parser.add_argument("--output", type=Path, default=DATA / "speed.png")
    args = parser.parse_args()
    rows = list(csv.DictReader(args.results.read_text().splitlines()))
    machine = rows[-1]
    median = {
        (row["model"], row["mode"], row["provider"]): float(row["median_ms"])
        for row in rows
        if all(row[name] == machine[name] for name in ("cpu", "torch", "threads"))
    }
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, mode in zip(panels, ("forward", "forward+backward"), strict=True):
        shown = [name for name in PROVIDERS if any((m, mode, name) in median for m in MODELS)]
        height = 0.8 / len(shown)
        for place, name in enumerate(shown):
            for y, model in enumerate(MODELS):
                ms = median[model, mode, name]
                ratio = ms / median[model, mode, "ours"]
                at = y + (place - (len(shown) - 1) / 2) * height
                label = name if y == 0 else None
                panel.barh(at, ratio, height * 0.9, color=PROVIDERS[name], label=label)
                time = f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
                panel.text(ratio, at, f" {time} ms", va="center", fontsize=8)
        panel.set_title(mode)
        panel.set_xlabel("time relative to ours")
        panel.set_yticks(range(len(MODELS)), MODELS)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.16)
    panels[0].invert_yaxis()  # both: the axis is shared
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"All spectral norms of a model: {machine['cpu']}, torch {machine['torch']}", fontsize=10
    )
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
