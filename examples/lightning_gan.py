"""The GAN of demo.py under Lightning, with a fused discriminator; a run goes on from its checkpoint.

    python examples/lightning_gan.py [--steps N] [--out FOLDER] [--resume FILE]

Lightning keeps the states of module, optimizers and loops, and of a loader that has one. The module adds
that of the random numbers, so a resumed run makes the very steps that an uninterrupted one makes, from the
middle of an epoch too. Losses and σ of every layer are logged. Needs
``pip install 'spectral-ext[demo,lightning]'``.
"""

import argparse
from collections.abc import Iterator, Sequence
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

import spectral_ext


class Digits:
    """Batches of digits drawn at random, as a loader that Lightning can resume."""

    def __init__(self, seed: int, batch: int = 64) -> None:
        self.images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
        self.batch = batch
        self.random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.batch  # with a length, Lightning takes no batch in advance

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(len(self)):
            yield self.images[torch.randint(len(self.images), (self.batch,), generator=self.random)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what Lightning writes into a checkpoint."""
        return {"random": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the batch after those that were drawn."""
        self.random.set_state(state["random"])


class DigitsGAN(lightning.LightningModule):
    """Generator and discriminator with the hinge loss, optimized by hand, as Lightning wants it of GANs."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = generator(), discriminator()
        if fused:
            spectral_ext.fuse(self.discriminator)

    def training_step(self, real: Tensor) -> None:
        """Make one step of each of both."""
        g_optimizer, d_optimizer = self.optimizers()
        fake = self.generator(torch.randn(len(real), LATENT).to(real))
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

    def on_train_epoch_end(self) -> None:
        """Log σ of every layer, in one transfer from the device."""
        self.log_dict(spectral_ext.group_of(self.discriminator).log_dict())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam for both."""
        nets = self.generator, self.discriminator
        return [torch.optim.Adam(net.parameters(), 5e-4, (0.0, 0.9)) for net in nets]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random numbers, which Lightning leaves to us."""
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the noise that comes next."""
        torch.set_rng_state(checkpoint["random"])


def trainer_of(steps: int, out: Path, save_every: int = 100, **options: Any) -> lightning.Trainer:
    """Return a trainer for so many steps that keeps its last checkpoint in ``out/last.ckpt``."""
    of_both = 2  # Lightning counts the steps of every optimizer
    last = ModelCheckpoint(
        out, "last", every_n_train_steps=of_both * save_every, enable_version_counter=False
    )
    limits = {"max_steps": of_both * steps, "max_epochs": -1, "devices": 1}
    return lightning.Trainer(**limits, callbacks=[last], default_root_dir=out, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, from the start or from a checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of the whole run")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/lightning"))
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a checkpoint to go on from")
    arguments = parser.parse_args(argv)
    lightning.seed_everything(arguments.seed)
    logger = CSVLogger(arguments.out)
    trainer = trainer_of(arguments.steps, arguments.out, logger=logger, log_every_n_steps=10)
    digits = Digits(arguments.seed, arguments.batch_size)
    trainer.fit(DigitsGAN(), digits, ckpt_path=arguments.resume)
    saved = arguments.out / "last.ckpt"
    trainer.save_checkpoint(saved)
    print(f"Losses and σ are in {logger.log_dir}; go on with --resume {saved}")


if __name__ == "__main__":
    main()
