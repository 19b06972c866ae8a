"""The GAN of demo.py under Lightning, with a fused discriminator; a run goes on from its checkpoint.

    python examples/lightning_gan.py [--epochs N] [--out FOLDER] [--resume FILE]

Every step draws its batch and its noise from a generator that is seeded with the number of the step, so
that a resumed run makes the very steps that an uninterrupted one makes. σ of every layer is logged. Needs
``pip install 'spectral-ext[demo,lightning]'``.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from demo import LATENT, discriminator, generator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

import spectral_ext

STEPS = 25  # of an epoch


class DigitsGAN(lightning.LightningModule):
    """Generator and discriminator with the hinge loss, optimized by hand, as Lightning wants it of GANs."""

    def __init__(self, fused: bool = True, batch: int = 64) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.batch = batch
        self.generator, self.discriminator = generator(), discriminator()
        self.group = spectral_ext.fuse(self.discriminator) if fused else None
        digits = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
        self.register_buffer("digits", digits, persistent=False)

    def training_step(self, number: int, index: int) -> None:
        """Make one step of each of both; ``number`` is that of the step in its epoch."""
        g_optimizer, d_optimizer = self.optimizers()
        real, noise = self.draw(self.current_epoch * STEPS + number)
        fake = self.generator(noise)
        scores = self.discriminator(real), self.discriminator(fake.detach())
        d_loss = F.relu(1 - scores[0]).mean() + F.relu(1 + scores[1]).mean()
        d_optimizer.zero_grad()
        self.manual_backward(d_loss)
        d_optimizer.step()
        g_loss = -self.discriminator(fake).mean()
        g_optimizer.zero_grad()
        self.manual_backward(g_loss)
        g_optimizer.step()
        self.log_dict({"d_loss": d_loss, "g_loss": g_loss}, prog_bar=True)

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a batch of digits and noise for a step."""
        random = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(self.digits), (self.batch,), generator=random)
        noise = torch.randn(self.batch, LATENT, generator=random)
        return self.digits[chosen.to(self.device)], noise.to(self.digits)

    def on_train_epoch_end(self) -> None:
        """Log σ of every layer, in one transfer from the device."""
        if self.group is not None:
            self.log_dict(self.group.log_dict())

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the numbers of an epoch's steps."""
        return DataLoader(range(STEPS), batch_size=None)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam for both."""
        nets = self.generator, self.discriminator
        return [torch.optim.Adam(net.parameters(), 5e-4, (0.0, 0.9)) for net in nets]


def trainer_of(epochs: int, out: Path, **options: Any) -> lightning.Trainer:
    """Return a trainer that ends after so many epochs; ``out/last.ckpt`` is where it was last."""
    saved = ModelCheckpoint(out, save_last=True, enable_version_counter=False)
    return lightning.Trainer(
        max_epochs=epochs, callbacks=[saved], devices=1, default_root_dir=out, **options
    )


def main() -> None:
    """Train, from the start or from a checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help=f"of {STEPS} steps")
    parser.add_argument("--out", type=Path, default=Path("out/lightning"))
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a checkpoint to go on from")
    args = parser.parse_args()
    lightning.seed_everything(0)
    logger = CSVLogger(args.out)
    trainer = trainer_of(args.epochs, args.out, logger=logger, log_every_n_steps=STEPS)
    trainer.fit(DigitsGAN(), ckpt_path=args.resume)
    print(f"losses and σ: {logger.log_dir}; go on with --resume {args.out / 'last.ckpt'}")


if __name__ == "__main__":
    main()
