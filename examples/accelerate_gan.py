"""The GAN of demo.py under Accelerate, with a fused discriminator; a run goes on from its checkpoint.

    python examples/accelerate_gan.py [--epochs N] [--out FOLDER] [--resume FOLDER]
    accelerate launch examples/accelerate_gan.py …

Accelerate keeps the states of models, optimizers, random number generators and the order of the data, so
that a resumed run makes the very steps that an uninterrupted one makes. Needs
``pip install 'spectral-ext[accelerate,demo]'``.
"""

import argparse
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spectral_ext


class Run:
    """What Accelerate has prepared for a training, and how far it has come."""

    def __init__(self, fused: bool = True, batch: int = 64, **options: Any) -> None:
        order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
        self.accelerator = Accelerator(dataloader_config=order, **options)
        g, d = generator(), discriminator()
        self.group = spectral_ext.fuse(d) if fused else None
        nets: list[nn.Module] = [g, d]
        optimizers = [torch.optim.Adam(net.parameters(), 5e-4, (0.0, 0.9)) for net in nets]
        digits = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
        loader = DataLoader(TensorDataset(digits), batch, shuffle=True, drop_last=True)
        prepared = self.accelerator.prepare(*nets, *optimizers, loader)
        self.generator, self.discriminator, self.g_optimizer, self.d_optimizer, self.loader = (
            prepared
        )
        self.epoch = 0
        self.accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, int]:
        """Return what Accelerate saves besides."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where a run was saved."""
        self.epoch = state["epoch"]

    def train_epoch(self) -> Tensor:
        """Train on all digits once; return the last loss of the discriminator."""
        self.loader.set_epoch(self.epoch)
        for (real,) in self.loader:
            d_loss = self.step(real)
        self.epoch += 1
        return d_loss

    def step(self, real: Tensor) -> Tensor:
        """Make one step of each of both."""
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


def main() -> None:
    """Train, from the start or from a checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/accelerate"))
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="a checkpoint to go on from")
    args = parser.parse_args()
    set_seed(0)
    run = Run()
    if args.resume is not None:
        run.accelerator.load_state(args.resume)
    console = Console()
    is_shown = run.accelerator.is_main_process
    with Progress(console=console, transient=True, disable=not is_shown) as progress:
        task = progress.add_task("epochs", total=args.epochs, completed=run.epoch)
        while run.epoch < args.epochs:
            loss = run.train_epoch()
            progress.advance(task)
            if is_shown and run.group is not None:
                largest = max(run.group.log_dict().values())
                console.print(f"epoch {run.epoch}: loss {loss.item():.4f}, largest σ {largest:.2f}")
    run.accelerator.save_state(args.out)
    run.accelerator.print(f"saved; go on with --resume {args.out}")


if __name__ == "__main__":
    main()
