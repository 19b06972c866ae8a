"""Train one small GAN on real digits with five kinds of discriminator, and compare.

    python examples/norms.py [--steps N] [--seeds K] [--out FOLDER]

The discriminators differ in what holds their weights: nothing, weight norm (Salimans and Kingma,
2016), spectral norm (Miyato et al., 2018), projection after each step (Gouk et al., 2021) and the
soft bound ``W / max(1, σ)`` (Behrmann et al., 2019). The first weights, the generator, the hinge
loss, the optimizers and the random numbers are the same. Written: ``norms.png``, ``report.md``.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from demo import LATENT, generator
from digits import digits
from gan import hinge_loss, tile
from matplotlib.figure import Figure, SubFigure
from quality import class_coverage, frechet_distance
from report import Report, argument_parser
from rich.progress import Progress
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import spectral_ext
from spectral_ext.nn.projection import SpectralProjection
from spectral_ext.nn.singular_values import singular_values

KINDS = ("none", "weight norm", "spectral norm", "projection", "soft bound")
BATCH = 32
# Three iterations a step: as many as stock makes in its three passes.
POWER: dict[str, Any] = {"n_power_iterations": 3, "init": "svd"}
SIGMA_EVERY = 20
SMOOTH = 50
COMPONENTS = 20
NOTES = f"""\
- Fréchet distance (less is better): between Gaussians fitted to all digits and to as many generated
  images, in the first {COMPONENTS} principal components of the pixels. It is no FID: there is no network
  in it. For real digits: of one half of them from the other.
- classes (10 is best): exp(entropy) of the classes that a logistic regression, trained on the digits,
  finds in the images.
- loss of the discriminator, ‖∇D(x)‖ at generated images: means of the last quarter of the steps.
- largest σ: of any weight in use, looked at every {SIGMA_EVERY} steps. Power iteration finds σ from
  below, so a weight is above its bound of 1 by what is missing: most where one value overtakes another.
- ms a step: the median, with whatever else ran on the machine.
"""


def discriminator(kind: str) -> nn.Sequential:
    """Return a discriminator; projection comes later, since it is a matter of the optimizer."""
    layers: list[nn.Module] = []
    sizes = ((1, 16, 3, 1), (16, 32, 4, 2), (32, 32, 3, 1), (32, 64, 4, 2))
    for before, after, kernel, stride in sizes:
        layers += [nn.Conv2d(before, after, kernel, stride, 1), nn.LeakyReLU(0.1)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 1))
    if kind == "weight norm":
        for layer in (*net[:-2:2], net[-1]):
            weight_norm(layer)
    elif kind in ("spectral norm", "soft bound"):
        bound = 1.0 if kind == "soft bound" else None
        spectral_ext.apply_spectral_norm(net, bound=bound, **POWER)
        spectral_ext.fuse(net, update="step")
    return net


@dataclass
class Run:
    """What is kept of a training: values of each step, and as many images as there are digits.

    ``gradients`` has the mean over the batch of ``‖∇D(x)‖`` at generated images, from which the
    generator learns; ``sigmas``, every ``SIGMA_EVERY`` steps and at the end, the largest singular
    value of each weight in use.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sigmas: list[list[float]] = field(default_factory=list)
    samples: Tensor = field(default_factory=lambda: torch.empty(0))


def train(kind: str, steps: int, seed: int, scans: Tensor, progress: Progress) -> Run:
    """Train a generator and a discriminator of one kind from a seed."""
    torch.manual_seed(seed)
    g = generator()
    average = copy.deepcopy(g).requires_grad_(False)
    g_optimizer = torch.optim.Adam(g.parameters(), 5e-4, (0.0, 0.9))
    with torch.random.fork_rng(devices=[]):  # some norms draw random numbers when they are made
        d = discriminator(kind)
    d_optimizer = torch.optim.Adam(d.parameters(), 5e-4, (0.0, 0.9))
    if kind == "projection":  # at once, too, so that the first step starts within the bound
        SpectralProjection(d, bound=1.0, **POWER).attach(d_optimizer).project()
    run = Run()
    for step in progress.track(range(steps), description=f"{kind}, seed {seed}"):
        start = time.perf_counter()
        real = scans[torch.randint(len(scans), (BATCH,))]
        fake = g(torch.randn(BATCH, LATENT))
        d_loss = hinge_loss(d(real), d(fake.detach()))
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        fake.retain_grad()
        g_optimizer.zero_grad()
        (-d(fake).mean()).backward()
        g_optimizer.step()
        for slow, new in zip(average.parameters(), g.parameters(), strict=True):
            slow.lerp_(new.detach(), 0.005)
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(d_loss.item())
        run.gradients.append(BATCH * fake.grad.flatten(1).norm(dim=1).mean().item())
        if step % SIGMA_EVERY == 0 or step == steps - 1:
            run.sigmas.append([s.item() for s in singular_values(d, normalized=True).values()])
    with torch.no_grad():  # batch norm takes statistics of all images
        run.samples = average(torch.randn(len(scans), LATENT))
    return run


class Quality:
    """How near images are to the digits; ``NOTES`` says what is measured."""

    def __init__(self, scans: Tensor, labels: Tensor) -> None:
        self.real = scans.flatten(1).double()
        self.axes = torch.linalg.eigh(self.real.T.cov())[1][:, -COMPONENTS:]
        self.classifier = LogisticRegression(C=0.1, tol=1e-3).fit(self.real, labels)

    def distance(self, images: Tensor, others: Tensor | None = None) -> float:
        """Return the Fréchet distance between the components of images and of others: of the digits."""
        pair = (images, self.real if others is None else others)
        return frechet_distance(*(part.flatten(1).double() @ self.axes for part in pair))

    def classes(self, images: Tensor) -> float:
        """Return the effective number of classes."""
        return class_coverage(torch.tensor(self.classifier.predict(images.flatten(1).double())))


def draw_lines(figure: SubFigure, runs: dict[str, list[Run]]) -> None:
    """Draw loss and gradient over the steps, a line for each seed."""
    shades = plt.get_cmap("inferno")(torch.linspace(0.0, 0.82, len(KINDS)).numpy())
    titles = {
        "losses": "hinge loss of the discriminator",
        "gradients": "‖∇D(x)‖ at generated images",
    }
    for axis, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for i, kind in enumerate(KINDS):
            lines = torch.tensor([getattr(run, name) for run in runs[kind]])
            smooth = F.avg_pool1d(lines, min(SMOOTH, lines.shape[1]), 1)
            at = torch.arange(smooth.shape[1]) + (lines.shape[1] - smooth.shape[1]) // 2
            drawn = axis.plot(at, smooth.T, "--" if i % 2 else "-", color=shades[i], lw=1.6)
            drawn[0].set_label(kind)
        axis.set(title=f"{title} (mean of {SMOOTH} steps)", xlabel="step")
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def draw_sigmas(figure: SubFigure, runs: dict[str, list[Run]], steps: int) -> None:
    """Draw σ of the weights in use in the first seed's run, a panel for each kind."""
    figure.suptitle("largest singular value of each weight in use: first layer darkest, 1 in grey")
    for axis, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        sigmas = torch.tensor(runs[kind][0].sigmas)
        at = sorted({*range(0, steps, SIGMA_EVERY), steps - 1})
        shades = plt.get_cmap("viridis")(torch.linspace(0.0, 0.85, sigmas.shape[1]).numpy())
        axis.axhline(1, color="0.85", lw=7, zorder=0)
        for shade, line in zip(shades, sigmas.T, strict=True):
            axis.plot(at, line, color=shade, lw=1.6)
        axis.set(title=kind, xlabel="step", xticks=[0, steps // 2, steps])
        axis.grid(alpha=0.3)


def draw_samples(figure: SubFigure, images: dict[str, Tensor], count: int = 24) -> None:
    """Draw a row of images for each kind."""
    for axis, (name, row) in zip(figure.subplots(len(images), 1), images.items(), strict=True):
        axis.imshow(tile(row[:count], count), cmap="gray_r", interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def rows_of(runs: dict[str, list[Run]], quality: Quality) -> list[list[str]]:
    """Return a heading, and a row for each kind; the seeds stand side by side."""

    def late(values: list[float]) -> float:
        return torch.tensor(values[-max(1, len(values) // 4) :]).mean().item()

    measures: dict[str, tuple[str, Callable[[Run], float]]] = {
        "Fréchet distance": (".2f", lambda run: quality.distance(run.samples)),
        "classes": (".1f", lambda run: quality.classes(run.samples)),
        "loss": (".2f", lambda run: late(run.losses)),
        "‖∇D(x)‖": (".2f", lambda run: late(run.gradients)),
        "largest σ": (".2f", lambda run: max(map(max, run.sigmas))),
        "ms a step": (".1f", lambda run: 1e3 * torch.tensor(run.seconds).median().item()),
    }
    halves = quality.distance(quality.real[::2], quality.real[1::2])
    real = ["real digits", f"{halves:.2f}", f"{quality.classes(quality.real):.1f}", *[""] * 4]
    rows = [["", *measures], real]
    for kind, seeds in runs.items():
        values = ([f"{get(run):{form}}" for run in seeds] for form, get in measures.values())
        rows.append([kind, *map(" / ".join, values)])
    return rows


def draw(runs: dict[str, list[Run]], scans: Tensor, steps: int) -> Figure:
    """Draw what the runs did, and some of their images."""
    figure = plt.figure(figsize=(12, 11), layout="constrained")
    lines, sigmas, samples = figure.subfigures(3, 1, height_ratios=(4, 3.1, 3.7), hspace=0.03)
    draw_lines(lines, runs)
    draw_sigmas(sigmas, runs, steps)
    draw_samples(samples, {"real": scans} | {kind: runs[kind][0].samples for kind in KINDS})
    return figure


def main() -> None:
    """Train all kinds and write what they gave."""
    parser = argument_parser(__doc__, "norms", steps=1000, seeds=1)
    parser.set_defaults(threads=1)  # the networks are small
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    title = f"A GAN on digits with five discriminators, {arguments.steps} steps"
    report = Report(title, arguments.out)
    scans, labels = digits()
    quality = Quality(scans, labels)
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    with Progress() as progress:
        for seed in range(arguments.seeds):
            for kind in KINDS:
                runs[kind].append(train(kind, arguments.steps, seed, scans, progress))
    columns, *rows = rows_of(runs, quality)
    report.table(columns, rows)
    report.text(f"One value for each seed.\n\n{NOTES}")
    report.picture(draw(runs, scans, arguments.steps), "norms", "What the runs did.")
    report.write()


if __name__ == "__main__":
    main()
