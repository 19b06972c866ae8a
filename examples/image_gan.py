"""Generate images of digits with SNGAN: with and without spectral norm, stock and fused, over seeds.

    python examples/image_gan.py [--steps N] [--seeds K] [--threads T] [--out FOLDER]

A generator and the discriminator of SNGAN (Miyato et al., 2018), made small, learn from scans of handwritten
digits with the hinge loss: without spectral norm; with it on every layer, by ``spectral_ext``; and, from the
first seed, by stock torch. A classifier that was trained on the real digits judges the images. Written to the
folder: ``samples.png``, ``quality.png`` and ``report.md``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from digits import digits, split
from gan import CHAOS, COMPARED, LATENT, Training, compare, tile
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from quality import class_coverage, frechet_distance, train_classifier
from report import Report, argument_parser
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import spectral_ext

SIZE = 16
NORMS = {"none": "no norm", "fused": "spectral norm, fused", "stock": "spectral norm, stock"}
LOOKS = 20
SHOWN = 24
ABOUT = """\
A GAN learns to draw digits. Its discriminator is that of SNGAN, made small, without spectral norm or with
it on every layer. All else is the same: first weights, hinge loss, Adam, learning rate, steps, batches
and noise.
"""
NOTES = """\
- Fréchet distance (less is better): between Gaussians fitted to what the last layer of a classifier of digits
  sees, of the images to train with and of as many generated images as there are test images.
  Its smallest value: as training went on, where the judge looked; stopping then would have given it.
- classes (10 is best): exp(entropy) of the classes that it finds.
- loss: of the discriminator, mean of the last quarter of the steps. At 0 it tells real from generated images
  with ease, and the generator learns little.
- ms a step: the median. The trainings of one seed take their steps in turns.
"""


def generator() -> nn.Sequential:
    """Return a generator of images in [−1, 1] from ``LATENT`` normal numbers."""
    layers: list[nn.Module] = [nn.Linear(LATENT, 64 * 16, bias=False), nn.Unflatten(1, (64, 4, 4))]
    for before, after in ((64, 32), (32, 16)):
        up = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)
        layers += [nn.BatchNorm2d(before), nn.ReLU(), up]
    layers += [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 3, 1, 1), nn.Tanh()]
    return nn.Sequential(*layers)


def discriminator(norm: str) -> nn.Sequential:
    """Return a discriminator; its weights at first do not depend on the norm."""
    layers: list[nn.Module] = []
    sizes = ((1, 16, 3, 1), (16, 32, 4, 2), (32, 32, 3, 1), (32, 64, 4, 2), (64, 64, 3, 1))
    for before, after, kernel, stride in sizes:
        layers += [nn.Conv2d(before, after, kernel, stride, 1), nn.LeakyReLU(0.1)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 1))
    if norm == "fused":
        spectral_ext.apply_spectral_norm(net)
        spectral_ext.fuse(net)
    elif norm == "stock":
        for layer in net:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                spectral_norm(layer)
    return net


class Judge:
    """Compares generated images, as many as there are test images, with those to train with."""

    def __init__(self, images: Tensor, labels: Tensor, count: int) -> None:
        self.classifier = train_classifier(images, labels)
        self.features = self.classifier.features(images)
        self.count = count

    def __call__(self, images: Tensor) -> tuple[float, float]:
        """Return the Fréchet distance of features, and the effective number of classes."""
        distance = frechet_distance(self.classifier.features(images), self.features)
        return distance, class_coverage(self.classifier.classify(images))


@dataclass
class Run:
    """A training, and what the judge said in its course."""

    training: Training
    verdicts: list[tuple[float, float]] = field(default_factory=list)


def train(
    norms: Iterable[str], seed: int, steps: int, real: Tensor, judge: Judge
) -> dict[str, Run]:
    """Train with each norm from one seed, in turns: what slows the machine then slows all alike."""
    runs = {}
    for norm in norms:
        torch.manual_seed(seed)
        runs[norm] = Run(Training(generator(), discriminator(norm), [real], seed))
    for step in track(range(1, steps + 1), f"seed {seed}"):
        for run in runs.values():
            run.training.step()
            if step in looks(steps):
                run.verdicts.append(judge(run.training.sample(judge.count)))
    return runs


def looks(steps: int) -> list[int]:
    """Return the steps after which the judge looks; the last is one of them."""
    return sorted({math.ceil(steps * (i + 1) / LOOKS) for i in range(LOOKS)})


def draw_quality(seeds: list[dict[str, Run]], best: tuple[float, float], steps: int) -> Figure:
    """Draw what the judge said in the course of each training, and for real test images."""
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    titles = ("Fréchet distance to the digits (less is better)", "classes (10 is best)")
    for i, (axis, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
        for (norm, name), style in zip(NORMS.items(), ("C1-", "C0-", "k:"), strict=True):
            lines = [[seen[i] for seen in runs[norm].verdicts] for runs in seeds if norm in runs]
            drawn = axis.plot(looks(steps), torch.tensor(lines).T, style, lw=1.6)
            drawn[0].set_label(name)
        axis.axhline(best[i], color="0.6", lw=4, zorder=0, label="real test images")
        axis.set(title=title, xlabel="step", yscale="linear" if i else "log")
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_samples(seeds: list[dict[str, Run]], test: Tensor) -> Figure:
    """Draw a row of images for each training, always from the same noise."""
    rows = {"real": test[:SHOWN]}
    for seed, runs in enumerate(seeds):
        for norm, run in runs.items():
            rows[f"{NORMS[norm]}, seed {seed}"] = run.training.sample(SHOWN)
    figure = plt.figure(figsize=(12, 0.5 * len(rows) + 0.2), layout="constrained")
    for axis, (name, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        axis.imshow(tile(images, SHOWN), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def rows_of(seeds: list[dict[str, Run]], best: tuple[float, float]) -> list[list[str]]:
    """Return a row for each norm; the seeds stand side by side."""
    rows = [["real test images", f"{best[0]:.1f}", "", f"{best[1]:.2f}", "", ""]]
    for norm, name in NORMS.items():
        runs = [runs[norm] for runs in seeds if norm in runs]
        distances, classes = zip(*(run.verdicts[-1] for run in runs), strict=True)
        smallest = [min(run.verdicts)[0] for run in runs]
        losses = [run.training.late_loss for run in runs]
        ms = [1e3 * run.training.step_seconds for run in runs]
        columns = (
            (distances, ".1f"),
            (smallest, ".1f"),
            (classes, ".2f"),
            (losses, ".2f"),
            (ms, ".1f"),
        )
        cells = (" / ".join(f"{value:{form}}" for value in values) for values, form in columns)
        rows.append([name, *cells])
    return rows


def finding(seeds: list[dict[str, Run]]) -> str:
    """Return a sentence that counts in how many seeds spectral norm was ahead at the end."""
    pairs = [(runs["fused"].verdicts[-1], runs["none"].verdicts[-1]) for runs in seeds]
    nearer = sum(ours[0] < theirs[0] for ours, theirs in pairs)
    wider = sum(ours[1] > theirs[1] for ours, theirs in pairs)
    return (
        f"At the end the Fréchet distance is smaller with spectral norm than without in {nearer} of "
        f"{len(seeds)} seeds, and the number of classes larger in {wider} of {len(seeds)}."
    )


def main() -> None:
    """Train all GANs and write what they gave."""
    arguments = argument_parser(__doc__, "image_gan", steps=3000, seeds=3).parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report(f"SNGAN on digits, {arguments.steps} steps", arguments.out)
    report.text(ABOUT)
    real, labels, test, _ = split(*digits(SIZE))
    judge = Judge(real, labels, len(test))
    best = judge(test)
    seeds = [
        train(NORMS if seed == 0 else ("none", "fused"), seed, arguments.steps, real, judge)
        for seed in range(arguments.seeds)
    ]
    columns = ("", "Fréchet distance", "its smallest", "classes", "loss", "ms a step")
    report.table(columns, rows_of(seeds, best), "One value for each seed.")
    report.text(f"{finding(seeds)}\n\n{NOTES}")
    report.picture(draw_samples(seeds, test), "samples", "One noise for all rows; none was chosen.")
    report.picture(draw_quality(seeds, best, arguments.steps), "quality", "A line for each seed.")
    same = compare(*(seeds[0][norm].training for norm in ("stock", "fused")))
    report.table(COMPARED, same, "Stock and fused from one seed.")
    report.text(CHAOS)
    report.write()


if __name__ == "__main__":
    main()
