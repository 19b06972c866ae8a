"""Train a small SNGAN on real digits twice from one seed, stock and fused, and compare.

    python examples/demo.py [--steps N] [--out FOLDER]

The discriminator has spectral normalization on every layer (Miyato et al., 2018) and is trained with
the hinge loss on the 8×8 digits that scikit-learn ships. The two runs differ in one line: the second
calls ``spectral_ext.fuse(discriminator)``. Written to the folder: ``samples.png``, ``sigma.png`` and
``report.md``.
"""

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from digits import digits
from gan import COMPARED, hinge_loss, tile
from matplotlib.figure import Figure
from report import Report, argument_parser
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import spectral_ext

LATENT = 32
EARLY = 50
WEIGHTS_EVERY = 25
NOTES = f"""\
Spectral norm is timed alone, forward and backward of all layers of the trained discriminator in the three
passes of a step (median of 100, in turns). With `update="step"` the two passes before the discriminator's
update share one computation, and the one after it makes another. The whole step is the median of each
training; the trainings run one after the other, so other load on the machine shows in their ratio. Training
a GAN is chaotic: roundings that differ in the last digit grow, so the runs part in time. Weights are compared
in the first {EARLY} steps, then at every {WEIGHTS_EVERY}th.
"""


def generator() -> nn.Module:
    """Return a generator of 8×8 images in [−1, 1] from ``LATENT`` normal numbers."""
    layers: list[nn.Module] = [nn.Linear(LATENT, 128 * 4), nn.Unflatten(1, (128, 2, 2))]
    for channels, after in ((128, 64), (64, 32)):
        layers += [
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, after, 4, 2, 1),
        ]
    layers += [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 1, 3, 1, 1), nn.Tanh()]
    return nn.Sequential(*layers)


def discriminator() -> nn.Sequential:
    """Return a discriminator with stock spectral normalization on every layer."""
    layers: list[nn.Module] = []
    sizes = ((1, 32, 3, 1), (32, 64, 4, 2), (64, 64, 3, 1), (64, 128, 4, 2))
    for before, after, kernel, stride in sizes:
        layers += [spectral_norm(nn.Conv2d(before, after, kernel, stride, 1)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(128 * 4, 1)))


def originals(net: nn.Sequential) -> list[Tensor]:
    """Return the raw weights of all layers."""
    return [p.parametrizations.weight.original for p in net if hasattr(p, "parametrizations")]


class Weights(nn.Module):
    """The spectral normalization of a discriminator alone: a forward that only takes its weights."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self) -> list[Tensor]:
        """Return the normalized weights."""
        return [part.weight for part in self.net if hasattr(part, "parametrizations")]


def seconds_in_spectral_norm(net: nn.Sequential, repeats: int = 100) -> list[float]:
    """Return median times of the norms in one GAN step: stock, fused, and fused with update="step".

    A step has two passes, forward and backward, a change of the weights, and a third pass. With
    ``update="step"`` the second takes the weights of the first. The three are timed in turns.
    """
    timed: list[tuple[Weights, list[Tensor], list[float]]] = []
    for update in (None, "forward", "step"):
        alone = Weights(spectral_ext.unfuse(copy.deepcopy(net)))
        if update is not None:
            spectral_ext.fuse(alone, update=update)
        timed.append((alone, originals(alone.net), []))
    grads = [torch.randn_like(weight) for weight in timed[0][1]]
    for _ in range(repeats):
        for alone, weights, times in timed:
            seconds = 0.0
            for passes in (2, 1):
                with torch.no_grad():
                    torch._foreach_mul_(weights, 1.0)  # an optimizer's step, which is not timed
                start = time.perf_counter()
                for _ in range(passes):
                    torch.autograd.grad(alone(), weights, grads)
                seconds += time.perf_counter() - start
            times.append(seconds)
    return [sorted(times)[repeats // 2] for _, _, times in timed]


@dataclass
class Run:
    """What is kept of a training run; weights of the first ``EARLY`` steps, then of some."""

    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    samples: Tensor = field(default_factory=lambda: torch.empty(0))
    norm_seconds: float = 0.0
    norm_seconds_by_step: float = 0.0


def sigmas_of(net: nn.Module) -> Tensor:
    """Return σ = uᵀWv of every layer from its raw weight and vectors."""
    with torch.no_grad():
        lists = [p.parametrizations.weight for p in net if hasattr(p, "parametrizations")]
        return torch.stack([pl[0]._u @ pl.original.flatten(1) @ pl[0]._v for pl in lists])


def train(
    fused: bool, steps: int, batch: int, seed: int, scans: Tensor, progress: Progress
) -> tuple[Run, nn.Sequential]:
    """Train; three discriminator passes, so three times all spectral norms, in each step."""
    torch.manual_seed(seed)
    g, d = generator(), discriminator()
    if fused:
        spectral_ext.fuse(d)
    average = copy.deepcopy(g).requires_grad_(False)
    g_optimizer = torch.optim.Adam(g.parameters(), 5e-4, (0.0, 0.9))
    d_optimizer = torch.optim.Adam(d.parameters(), 5e-4, (0.0, 0.9))
    run = Run()
    bar = progress.add_task("fused" if fused else "stock", total=steps)
    for step in range(steps):
        start = time.perf_counter()
        real = scans[torch.randint(len(scans), (batch,))]
        fake = g(torch.randn(batch, LATENT))
        d_loss = hinge_loss(d(real), d(fake.detach()))
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        (-d(fake).mean()).backward()
        g_optimizer.step()
        for slow, new in zip(average.parameters(), g.parameters(), strict=True):
            slow.lerp_(new.detach(), 0.005)
        run.step_seconds.append(time.perf_counter() - start)
        run.losses.append(d_loss.item())
        run.sigmas.append(sigmas_of(d))
        if step < EARLY or step % WEIGHTS_EVERY == 0 or step == steps - 1:
            run.weights.append(torch.cat([w.detach().flatten() for w in originals(d)]))
        progress.advance(bar)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        run.samples = average(torch.randn(256, LATENT))[
            :40
        ]  # batch norm takes statistics of all 256
    return run, d


def draw_samples(stock: Run, fused: Run, scans: Tensor) -> Figure:
    """Draw real digits and those of both trainings."""
    figure, axes = plt.subplots(3, 1, figsize=(8, 9), layout="constrained")
    shown = {"real": scans[:40], "stock": stock.samples, "fused": fused.samples}
    for axis, (name, images) in zip(axes, shown.items(), strict=True):
        axis.imshow(tile(images, 10), cmap="gray_r", interpolation="nearest")
        axis.set_title(name)
        axis.axis("off")
    return figure


def draw_sigmas(stock: Run, fused: Run) -> Figure:
    """Draw σ of each layer, and the loss, in the course of both trainings."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for run, style, name in ((stock, "-", "stock"), (fused, ":", "fused")):
        for i, line in enumerate(torch.stack(run.sigmas).T):
            left.plot(line, style, color=f"C{i}", lw=2 if style == ":" else 1, label=f"{i} {name}")
        smooth = F.avg_pool1d(torch.tensor(run.losses)[None], min(25, len(run.losses)), 1)[0]
        right.plot(smooth, style, color="k" if style == "-" else "C1", label=name)
    left.set(title="σ of each layer of the discriminator", xlabel="step")
    right.set(title="hinge loss of the discriminator (mean of 25 steps)", xlabel="step")
    left.legend(fontsize=7, ncols=2)
    right.legend()
    return figure


def rows_of(stock: Run, fused: Run) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table, with the columns ``COMPARED``."""

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.2f}"

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    def difference(a: list[Any], b: list[Any], count: int) -> str:
        pairs = zip(a[:count], b[:count], strict=True)
        gaps = [(torch.as_tensor(x) - torch.as_tensor(y)).abs().max().item() for x, y in pairs]
        return f"{max(gaps):.1e}"

    step = median(stock.step_seconds), median(fused.step_seconds)
    norm = stock.norm_seconds, fused.norm_seconds
    rows = [
        ("spectral norm, ms a step", *map(ms, norm), f"{norm[0] / norm[1]:.1f}×"),
        (
            'the same with update="step"',
            "",
            ms(fused.norm_seconds_by_step),
            f"{norm[0] / fused.norm_seconds_by_step:.1f}×",
        ),
        ("its share of the step", *(f"{n / s:.0%}" for n, s in zip(norm, step, strict=True)), ""),
        ("whole step, ms", *map(ms, step), f"{step[0] / step[1]:.2f}×"),
    ]
    for name in ("losses", "weights", "sigmas"):
        a, b = getattr(stock, name), getattr(fused, name)
        for count, when in ((1, "step 1"), (EARLY, f"first {EARLY} steps"), (len(a), "whole run")):
            rows.append((f"largest difference of {name}, {when}", "", "", difference(a, b, count)))
    return rows


def main() -> None:
    """Run both trainings and write what they gave."""
    arguments = argument_parser(__doc__, "demo", steps=1000, batch_size=64, seed=0).parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report(f"SNGAN on digits, {arguments.steps} steps, stock and fused", arguments.out)
    scans, _ = digits()
    with Progress() as progress:
        (stock, net), (fused, _) = (
            train(f, arguments.steps, arguments.batch_size, arguments.seed, scans, progress)
            for f in (False, True)
        )
    seconds = seconds_in_spectral_norm(net)
    stock.norm_seconds, fused.norm_seconds, fused.norm_seconds_by_step = seconds
    report.table(COMPARED, rows_of(stock, fused))
    report.text(NOTES)
    report.picture(draw_samples(stock, fused, scans), "samples", "Digits, real and generated.")
    report.picture(draw_sigmas(stock, fused), "sigma", "Both trainings, step by step.")
    report.write()


if __name__ == "__main__":
    main()
