"""The GAN of demo.py under Accelerate, with a fused discriminator; a run goes on from its checkpoint.

    python examples/accelerate_gan.py [--steps N] [--out FOLDER] [--resume FOLDER]

Accelerate keeps the states of models, optimizers and random numbers; the run adds how far it has come and the
seed of the order of the data. So a resumed run makes the very steps that an uninterrupted one makes, from the
middle of an epoch too. Needs ``pip install 'spectral-ext[accelerate,demo]'``.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from demo import LATENT, discriminator, generator
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import spectral_ext


class Run:
    """What Accelerate has prepared for a training, and how far it has come."""

    def __init__(self, fused: bool = True, batch: int = 64, **options: Any) -> None:
        order = DataLoaderConfiguration(use_seedable_sampler=True)
        self.accelerator = Accelerator(dataloader_config=order, **options)
        g, d = generator(), discriminator()
        if fused:
            spectral_ext.fuse(d)
        optimizers = [torch.optim.Adam(net.parameters(), 5e-4, (0.0, 0.9)) for net in (g, d)]
        dtype = torch.get_default_dtype()
        digits = torch.tensor(load_digits().images, dtype=dtype)[:, None] / 8 - 1
        own = torch.Generator()  # else an epoch draws from the noise's, and a resumed one once more
        loader = DataLoader(TensorDataset(digits), batch, True, drop_last=True, generator=own)
        prepared = self.accelerator.prepare(g, d, *optimizers, loader)
        self.generator, self.discriminator = prepared[:2]
        self.g_optimizer, self.d_optimizer, self.loader = prepared[2:]
        self.step = 0
        self.accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, int]:
        """Return what Accelerate saves besides; it leaves the seed of the order to us."""
        return {"step": self.step, "order": self.loader.get_sampler().initial_seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the step that was made last."""
        self.step = state["step"]
        self.loader.get_sampler().initial_seed = state["order"]

    def train(self, steps: int) -> Iterator[Tensor]:
        """Train until so many steps are made since the start; yield the loss of each."""
        while self.step < steps:
            epoch, made = divmod(self.step, len(self.loader))
            rest = self.accelerator.skip_first_batches(self.loader, made)
            rest.set_epoch(epoch)
            for (real,) in islice(rest, steps - self.step):
                loss = self.train_step(real)
                self.step += 1
                yield loss

    def train_step(self, real: Tensor) -> Tensor:
        """Make one step of each of both; return the loss of the discriminator."""
        fake = self.generator(torch.randn(len(real), LATENT).to(real))
        scores = self.discriminator(real), self.discriminator(fake.detach())
        d_loss = F.relu(1 - scores[0]).mean() + F.relu(1 + scores[1]).mean()
        self.d_optimizer.zero_grad()
        self.accelerator.backward(d_loss)
        self.d_optimizer.step()
        self.g_optimizer.zero_grad()
        self.accelerator.backward(-self.discriminator(fake).mean())
        self.g_optimizer.step()
        return d_loss.detach()


def main(argv: Sequence[str] | None = None) -> None:
    """Train, from the start or from a checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of the whole run")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/accelerate"))
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="a checkpoint to go on from")
    arguments = parser.parse_args(argv)
    set_seed(arguments.seed)
    run = Run(batch=arguments.batch_size)
    if arguments.resume is not None:
        run.accelerator.load_state(arguments.resume)
    group = spectral_ext.group_of(run.accelerator.unwrap_model(run.discriminator))
    console = Console()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("steps", total=arguments.steps, completed=run.step)
        for loss in run.train(arguments.steps):
            progress.advance(bar)
            if run.step % 100 == 0 or run.step == arguments.steps:
                log = group.log_dict("")
                sigmas = f"{log['sigma_min']:.3f} to {log['sigma_max']:.3f}"
                console.print(f"step {run.step}: loss {loss.item():.4f}, σ from {sigmas}")
    run.accelerator.save_state(arguments.out)
    print(f"Go on with --resume {arguments.out}")


if __name__ == "__main__":
    main()
