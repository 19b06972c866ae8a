"""What the GANs on digits share: training with the hinge loss, stock beside fused, and pictures."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["CHAOS", "COMPARED", "LATENT", "Training", "compare", "hinge_loss", "tile"]

LATENT = 64
BATCH = 32
EARLY = 10
COMPARED = ("", "stock", "fused", "ratio or difference")
CHAOS = """\
The losses are those of the discriminator; the whole step is the median, stock and fused in turns. Training a
GAN is chaotic: roundings that differ in the last digit grow, and the runs part in time.
"""


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the loss of a discriminator from its scores of real and of generated images."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


class Training:
    """A GAN in training; all its random numbers are its own, so several can train in turns.

    Args:
        generator: Makes images of normal numbers ``(n, LATENT)`` and of what the images are to show.
        discriminator: Scores images, given what they are to show.
        real: Real images, and what each shows, if anything: tensors of one length.
        seed: Of the batches and of the noise. The weights come with the networks.
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, real: Sequence[Tensor], seed: int
    ) -> None:
        self.generator, self.discriminator, self.real = generator, discriminator, real
        self.average = AveragedModel(
            generator, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True
        ).eval()
        self.g_optimizer = torch.optim.Adam(generator.parameters(), 5e-4, (0.0, 0.9))
        self.d_optimizer = torch.optim.Adam(discriminator.parameters(), 5e-4, (0.0, 0.9))
        self.random = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self) -> None:
        """Update the discriminator, then the generator."""
        start = time.perf_counter()
        chosen = torch.randint(len(self.real[0]), (BATCH,), generator=self.random)
        images, *shown = (part[chosen] for part in self.real)
        fake = self.generator(torch.randn(BATCH, LATENT, generator=self.random), *shown)
        scores = self.discriminator(images, *shown), self.discriminator(fake.detach(), *shown)
        d_loss = hinge_loss(*scores)
        self.d_optimizer.zero_grad()
        d_loss.backward()
        self.d_optimizer.step()
        self.g_optimizer.zero_grad()
        (-self.discriminator(fake, *shown).mean()).backward()
        self.g_optimizer.step()
        self.average.update_parameters(self.generator)
        self.losses.append(d_loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def step_seconds(self) -> float:
        """The median time of a step."""
        return statistics.median(self.seconds)

    @property
    def late_loss(self) -> float:
        """The mean loss of the discriminator in the last quarter of the steps."""
        return statistics.mean(self.losses[-math.ceil(len(self.losses) / 4) :])

    @torch.no_grad()
    def sample(self, count: int, *shown: Tensor, seed: int = 0) -> Tensor:
        """Return images of the averaged generator, always from the same noise for one seed."""
        noise = torch.randn(count, LATENT, generator=torch.Generator().manual_seed(seed))
        return self.average(noise, *shown)


def compare(stock: Training, fused: Training) -> list[list[str]]:
    """Return rows of two trainings from one seed: ``COMPARED`` has their columns."""
    ms = [1e3 * training.step_seconds for training in (stock, fused)]
    rows = [["whole step, ms", *(f"{t:.2f}" for t in ms), f"{ms[0] / ms[1]:.2f}×"]]
    gaps = [abs(a - b) for a, b in zip(stock.losses, fused.losses, strict=True)]
    for count, when in ((1, "step 1"), (EARLY, f"first {EARLY} steps"), (None, "whole run")):
        rows.append([f"largest difference of losses, {when}", "", "", f"{max(gaps[:count]):.1e}"])
    return rows


def tile(images: Tensor, columns: int) -> Tensor:
    """Return images ``(n, 1, height, width)`` side by side in rows, as one picture for ``imshow``."""
    padded = F.pad(images[:, 0], (1, 1, 1, 1), value=-1)
    rows = padded.unflatten(0, (-1, columns)).transpose(1, 2)
    return rows.flatten(2).flatten(0, 1)
