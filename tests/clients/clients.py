"""Packages of other people whose models use spectral norm, and what pip has to install for each.

The versions are pinned: a new release of one of them is no news about this package.
"""

from dataclasses import dataclass

__all__ = ["CLIENTS", "Client"]


@dataclass(frozen=True)
class Client:
    """One package.

    Many ask for far more than their models need, or for an old torch: ``alone`` are requirements
    that are installed without their dependencies, ``whole`` those that come with them.
    """

    alone: tuple[str, ...]
    whole: tuple[str, ...] = ()
    native: bool = False
    """Whether something in it was compiled for the build of torch that the registry has."""


CLIENTS = {
    "deel-torchlip": Client(("deel-torchlip==1.0.5",)),
    "dgmr": Client(
        ("dgmr==1.4.4", "pytorch-msssim==1.0.0"),
        ("einops", "huggingface-hub", "pytorch-lightning", "safetensors", "torchvision"),
        native=True,
    ),
    "espnet": Client(("espnet==202511",)),
    "normflows": Client(("normflows==1.7.3",)),
    # Its set-up imports pip, which an isolated build does not have, and the package a name that scipy has
    # no longer. The discriminators are the same as espnet's, which are by the same author.
    "parallel-wavegan": Client(("parallel-wavegan==0.6.1",)),
    "pytorch-pretrained-biggan": Client(
        ("pytorch-pretrained-biggan==0.1.1",),
        ("boto3", "requests", "tqdm"),
    ),
    "sngp": Client(("SNGP==0.7",)),
}
