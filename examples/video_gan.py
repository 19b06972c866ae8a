"""Generate videos of moving digits with a discriminator of 3-D convolutions, with spectral norms and without.

    python examples/video_gan.py [--steps N] [--seeds K] [--out FOLDER]

A scan of a digit moves over a canvas in a straight line, its direction and speed random. One generator makes
all frames of a video at once, and one discriminator sees them all, by convolutions over time and space, as in
TGAN (Saito et al., 2017) and MoCoGAN (Tulyakov et al., 2018), trained with the hinge loss. What makes it a
video is measured: whether the ink moves steadily, and whether the frames show the same digit.
Written: ``strips.png``, ``training.png``, ``report.md``.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from digits import digits
from gan import hinge_loss
from matplotlib.figure import Figure
from report import Report, argument_parser
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as stock_spectral_norm
from turns import compare

import spectral_ext
from spectral_ext import plot

FRAMES, SIZE, LATENT, BATCH = 8, 16, 48, 16
SHOWN = 3
NORMS = ("stock", "fused", "none")
NOTES = """\
Means over 256 videos, then over the seeds ± standard deviation. Real videos are the goal. Two rows are real
frames in a wrong order, to show what the measures see: those of each video shuffled, and those of all videos
exchanged, so that each has several digits.

- off the line: how far the centre of the ink is from a motion in a straight line at constant speed, fitted
  by least squares; root mean square over the frames, in pixels. Less is better.
- speed: of the fitted motion, in pixels a frame. A video that stands still is on its line, too.
- change: of a frame from the one before, both with the ink in the middle: mean square, in units of the mean
  square of the frames. Less is better.
- one digit: the share of frames in which a logistic regression, trained on real frames with the ink in the
  middle, sees the most frequent digit of the video. More is better.
- digits: exp(entropy) of the most frequent digits. 10 is best.
"""


def videos(scans: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return moving digits in [−1, 1], ``(count, 1, FRAMES, SIZE, SIZE)``, which scans, and their velocities.

    A velocity is in pixels a frame, horizontal first, at most 1 in each direction; the scan, of half the
    canvas's size, starts anywhere from where it stays on the canvas.
    """
    chosen = torch.randint(len(scans), (count,))
    velocity = 2 * torch.rand(count, 2) - 1
    room = SIZE / 4  # between the scan and the border, if the scan is in the middle
    path = velocity[:, None] * (torch.arange(FRAMES) - (FRAMES - 1) / 2)[None, :, None]
    free = room - path.abs().amax(1)
    centre = (2 * torch.rand(count, 2) - 1) * free
    shift = (path + centre[:, None]).flatten(0, 1)
    canvas = F.pad(scans[chosen], [SIZE // 4] * 4, value=-1).repeat_interleave(FRAMES, 0)
    frames = moved(canvas, shift)
    return frames.unflatten(0, (count, FRAMES)).transpose(1, 2), chosen, velocity


def moved(images: Tensor, shift: Tensor) -> Tensor:
    """Return images moved by ``(n, 2)`` pixels, horizontal first, by bilinear interpolation."""
    size = images.shape[-1]
    affine = torch.eye(2, 3).repeat(len(images), 1, 1)
    affine[:, :, 2] = -2 * shift / size
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def generator() -> nn.Module:
    """Return a generator of videos from ``LATENT`` normal numbers."""
    return nn.Sequential(
        # Without biases before batch norm: their gradients are roundings, which Adam turns into steps.
        nn.Linear(LATENT, 96 * 64, bias=False),
        nn.Unflatten(1, (96, 4, 4, 4)),
        nn.BatchNorm3d(96),
        nn.ReLU(),
        nn.ConvTranspose3d(96, 48, (3, 4, 4), (1, 2, 2), 1, bias=False),  # 4×8×8
        nn.BatchNorm3d(48),
        nn.ReLU(),
        nn.ConvTranspose3d(48, 1, 4, 2, 1),  # 8×16×16
        nn.Tanh(),
    )


def discriminator(norm: str) -> nn.Sequential:
    """Return a discriminator of videos with stock's spectral norms, which can be fused, or with none."""
    layers: list[nn.Module] = []
    for before, after, kernel, stride in ((1, 24, 4, 2), (24, 48, 4, 2), (48, 96, 3, 1)):
        layers += [nn.Conv3d(before, after, kernel, stride, 1), nn.LeakyReLU(0.1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 32, 1))
    if norm != "none":
        for layer in (*model[:-2:2], model[-1]):
            stock_spectral_norm(layer)
    return model


class Training:
    """A GAN of videos; its generator's weights are averaged over the steps."""

    def __init__(self, norm: str, seed: int, scans: Tensor) -> None:
        torch.manual_seed(seed)
        self.scans = scans
        self.generator = generator()
        self.discriminator = discriminator(norm)
        self.group = spectral_ext.fuse(self.discriminator) if norm == "fused" else None
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.sigmas: list[Tensor] = []

    def steps(self, count: int) -> Iterator[float]:
        """Train; gives the loss of the discriminator after each step."""
        g, d = self.generator, self.discriminator
        g_optimizer = torch.optim.Adam(g.parameters(), 5e-4, (0.0, 0.9))
        d_optimizer = torch.optim.Adam(d.parameters(), 5e-4, (0.0, 0.9))
        for _ in range(count):
            real, *_ = videos(self.scans, BATCH)
            fake = g(torch.randn(BATCH, LATENT))
            d_loss = hinge_loss(d(real), d(fake.detach()))
            d_optimizer.zero_grad()
            d_loss.backward()
            d_optimizer.step()
            g_optimizer.zero_grad()
            (-d(fake).mean()).backward()
            g_optimizer.step()
            for slow, new in zip(self.average.parameters(), g.parameters(), strict=True):
                slow.lerp_(new.detach(), 0.01)
            if self.group is not None:
                self.sigmas.append(self.group.sigmas)
            yield d_loss.item()

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        """Return videos of the averaged generator, whose batch norm takes statistics of all of them."""
        return self.average(torch.randn(count, LATENT))


def centres(video: Tensor) -> Tensor:
    """Return where the ink is, in pixels from the middle: ``(n, FRAMES, 2)``, horizontal first.

    Less than a tenth of the range is no ink, so that a haze over the canvas does not count.
    """
    ink = F.relu((video[:, 0] + 1) / 2 - 0.1)
    at = torch.arange(SIZE) - (SIZE - 1) / 2
    total = ink.sum((2, 3)).clamp(min=1e-6)
    return torch.stack([(ink.sum(2) @ at) / total, (ink.sum(3) @ at) / total], dim=2)


def straight_motion(path: Tensor) -> tuple[Tensor, Tensor]:
    """Fit ``a + bt`` to paths ``(n, FRAMES, 2)``; return what is left (root mean square), and ``b``."""
    time = torch.arange(path.shape[1]) - (path.shape[1] - 1) / 2
    velocity = torch.einsum("t,ntk->nk", time, path) / time.square().sum()
    line = path.mean(1, keepdim=True) + velocity[:, None] * time[:, None]
    return (path - line).square().sum(2).mean(1).sqrt(), velocity


def in_the_middle(video: Tensor) -> Tensor:
    """Return the frames moved so that their ink is in the middle: ``(n, FRAMES, SIZE, SIZE)``."""
    frames = video.transpose(1, 2).flatten(0, 1)
    return moved(frames, -centres(video).flatten(0, 1))[:, 0].unflatten(0, video.shape[::2][:2])


@dataclass
class Eye:
    """Sees which digit a frame shows."""

    scans: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        seen, chosen, _ = videos(self.scans, len(self.scans))
        frames = in_the_middle(seen)[:, FRAMES // 2].flatten(1)
        self.classifier = LogisticRegression(C=0.1, max_iter=300).fit(frames, self.labels[chosen])

    def measure(self, video: Tensor) -> dict[str, float]:
        """Return all columns of the table; ``NOTES`` says what they are."""
        left, velocity = straight_motion(centres(video))
        middle = in_the_middle(video)
        ink = middle + 1
        change = (ink[:, 1:] - ink[:, :-1]).square().mean() / ink.square().mean()
        seen = torch.tensor(self.classifier.predict(middle.flatten(0, 1).flatten(1)))
        counts = F.one_hot(seen.view(-1, FRAMES), 10).sum(1)
        shares = counts.argmax(1).bincount(minlength=10) / len(video)
        return {
            "off the line": left.mean().item(),
            "speed": velocity.norm(dim=1).mean().item(),
            "change": change.item(),
            "one digit": (counts.amax(1) / FRAMES).mean().item(),
            "digits": torch.special.entr(shares).sum().exp().item(),
        }


def rows_of(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Return a row for each kind of videos."""
    rows = []
    for name, seeds in found.items():
        values = torch.tensor([list(measures.values()) for measures in seeds])
        spread = [f" ± {s:.2f}" if len(seeds) > 1 else "" for s in values.std(0, correction=0)]
        rows.append([name, *(f"{v:.2f}{s}" for v, s in zip(values.mean(0), spread, strict=True))])
    return rows


def draw_strips(shown: dict[str, Tensor]) -> Figure:
    """Draw some videos of each kind, their frames side by side."""
    figure, axes = plt.subplots(len(shown), 1, figsize=(7, 2.5 * len(shown)), layout="constrained")
    for axis, (name, video) in zip(axes, shown.items(), strict=True):
        frames = F.pad(video[:SHOWN, 0], (1, 1, 1, 1), value=0)  # grey lines between them
        axis.imshow(frames.permute(0, 2, 1, 3).flatten(2).flatten(0, 1), cmap="gray_r", vmin=-1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name)
    return figure


def draw_training(losses: dict[str, list[float]], sigmas: list[Tensor]) -> Figure:
    """Draw the losses, and σ of the layers of the fused discriminator."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    styles = zip(("#4a9d77", "#2a6fb0", "#d98c5f"), ("-", ":", "-"), strict=True)
    for (name, line), (color, style) in zip(losses.items(), styles, strict=True):
        width = min(25, len(line))
        smooth = F.avg_pool1d(torch.tensor(line)[None], width, 1)[0]
        left.plot(range(width - 1, len(line)), smooth, style, color=color, label=name)
    left.set(title="hinge loss of the discriminator (mean of 25 steps)", xlabel="step")
    left.grid(alpha=0.3)
    left.legend()
    plot.sigmas(sigmas, names=["conv 1", "conv 2", "conv 3", "linear"], ax=right)
    right.set_title("σ of the raw weights, fused")
    return figure


def main() -> None:
    """Train all kinds for all seeds, and write what came out."""
    parser = argument_parser(__doc__, "video_gan", steps=1000, seeds=2, videos=256)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("Videos of moving digits, with spectral norms and without", arguments.out)
    scans, labels = digits()
    torch.manual_seed(0)
    eye = Eye(scans, labels)
    real, *_ = videos(scans, arguments.videos)
    shuffled = torch.stack([video[:, torch.randperm(FRAMES)] for video in real])
    exchanged = torch.stack([real[torch.randperm(len(real)), :, t] for t in range(FRAMES)], dim=2)
    references = {"real": real, "real, shuffled": shuffled, "real, exchanged": exchanged}
    found = {name: [eye.measure(video)] for name, video in references.items()}
    found |= {norm: [] for norm in NORMS}
    for seed in range(arguments.seeds):
        trainings = {norm: Training(norm, seed, scans) for norm in NORMS}
        steps = {norm: training.steps(arguments.steps) for norm, training in trainings.items()}
        compared = compare(arguments.steps, **steps)
        samples = {}
        for norm, training in trainings.items():
            torch.manual_seed(seed)
            samples[norm] = training.samples(arguments.videos)
            found[norm].append(eye.measure(samples[norm]))
    report.text(NOTES)
    report.table(["", *found["real"][0]], rows_of(found))
    caption = "Three videos of each kind, the frames from left to right; of the last seed"
    report.picture(draw_strips({"real": real} | samples), "strips", caption)
    compared.add_to(report)
    caption = "The last seed's training"
    report.picture(draw_training(compared.losses, trainings["fused"].sigmas), "training", caption)
    report.write()


if __name__ == "__main__":
    main()
