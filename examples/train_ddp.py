"""Train a small SNGAN on several processes, with one group of spectral norms.

    torchrun --nproc-per-node 2 examples/train_ddp.py [--steps N] [--fsdp]
    python examples/train_ddp.py                        # the same in one process

Every process takes its part of each batch of scikit-learn's digits: gloo on CPUs, nccl on CUDA devices.
Without ``--fsdp`` the weights are whole everywhere (``DistributedDataParallel``), and all ranks compute the
same ``u``, ``v`` and σ. With it they are sharded (``fully_shard``): ranks have rows of them, and one
all-reduce sums what the power iteration needs of all layers. The losses are those of one process.
"""

import argparse
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import spectral_ext

LATENT = 32


def generator() -> nn.Module:
    """Return a generator of 8×8 images in [−1, 1], whose images do not depend on each other."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(LATENT, 64 * 4), nn.Unflatten(1, (64, 2, 2)), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.GroupNorm(4, 32), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Tanh()),
    )


def discriminator() -> nn.Module:
    """Return a discriminator of blocks, with a spectral norm on every layer."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1), nn.LeakyReLU(0.1)),
        nn.Sequential(nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.1)),
        nn.Sequential(nn.Conv2d(64, 64, 4, 2, 1), nn.LeakyReLU(0.1)),
        nn.Sequential(nn.Flatten(), nn.Linear(64 * 4, 1)),
    )
    spectral_ext.apply_spectral_norm(model)
    return model


def distribute(model: nn.Module, sharded: bool) -> nn.Module:
    """Prepare a model for training by all processes."""
    if not dist.is_initialized():
        return model
    if not sharded:
        return DistributedDataParallel(model)
    for block in model.children():
        fully_shard(block)
    return fully_shard(model)


def share(batch: Tensor) -> Tensor:
    """Return the part of a batch that is this process's."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else batch


def train(
    g: nn.Module, d: nn.Module, digits: Tensor, steps: int, batch: int, progress: Progress
) -> Iterable[tuple[Tensor, Tensor]]:
    """Train, and yield the losses of this process: those of discriminator and generator."""
    optimizers = [torch.optim.Adam(model.parameters(), 5e-4, (0.0, 0.9)) for model in (d, g)]
    for _ in progress.track(range(steps), description="training"):
        # All processes draw the same numbers, and each takes its part.
        real = share(digits[torch.randint(len(digits), (batch,))])
        fake = g(share(torch.randn(batch, LATENT)).to(real.device))
        d_loss = F.relu(1 - d(real)).mean() + F.relu(1 + d(fake.detach())).mean()
        optimizers[0].zero_grad()  # of what the generator's loss has left there, too
        d_loss.backward()
        optimizers[0].step()
        g_loss = -d(fake).mean()
        optimizers[1].zero_grad()
        g_loss.backward()
        optimizers[1].step()
        yield d_loss.detach(), g_loss.detach()


def averaged(losses: tuple[Tensor, Tensor]) -> list[float]:
    """Return losses of the whole batch."""
    values = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


def vectors_are_equal(model: nn.Module) -> bool:
    """Return whether all processes have the same bits in ``u`` and ``v`` of all layers."""
    if not dist.is_initialized():
        return True
    ours = torch.cat([buffer.flatten() for buffer in model.buffers()])
    all_of_them = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, ours)
    return all(torch.equal(ours, theirs) for theirs in all_of_them)


def start() -> torch.device:
    """Join the processes that torchrun has started, if it has; return the device of this one."""
    has_cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if has_cuda
        else torch.device("cpu")
    )
    if has_cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if has_cuda else "gloo")
    return device


def main() -> None:
    """Train, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fsdp", action="store_true", help="shard the weights")
    arguments = parser.parse_args()
    device = start()
    is_first = not dist.is_initialized() or dist.get_rank() == 0

    torch.manual_seed(arguments.seed)
    digits = torch.tensor(load_digits().images, dtype=torch.float32, device=device)[:, None] / 8 - 1
    d = discriminator().to(device)
    group = spectral_ext.fuse(d, bucket_mb=1)
    models: list[Any] = [distribute(m, arguments.fsdp) for m in (generator().to(device), d)]
    losses = []
    with Progress(console=Console(stderr=True), disable=not is_first) as progress:
        for pair in train(*models, digits, arguments.steps, arguments.batch_size, progress):
            losses.append(averaged(pair))
    equal, sigmas = (
        vectors_are_equal(d),
        group.sigmas,
    )  # of all processes: rank 0 cannot do it alone
    if is_first:
        for name, loss in zip(("discriminator", "generator"), losses[-1], strict=True):
            print(f"loss of the {name}: {loss:.6f}")
        print(f"σ: {', '.join(f'{sigma:.4f}' for sigma in sigmas.tolist())}")
        print(f"u and v are the same on all processes: {'yes' if equal else 'no'}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
