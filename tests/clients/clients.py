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
    isolated: bool = True
    """Whether pip may build it in an environment of its own; some set-ups want what is here."""
    native: bool = False
    """Whether something in it was compiled for the build of torch that the registry has."""
    tests: tuple[str, ...] = ()
    """Arguments of pytest: those of its own tests that call normalized layers and take seconds."""
    beside: tuple[tuple[str, str], ...] = ()
    """Files that the source distribution lacks: where, and which file of this folder ("" is an empty one)."""


CLIENTS = {
    "audiocraft": Client(("audiocraft==1.3.0",)),
    "basicsr": Client(("basicsr==1.4.2",), isolated=False),  # an isolated build installs torch
    "coqui-tts": Client(("coqui-tts==0.28.0",)),
    "deel-torchlip": Client(
        ("deel-torchlip==1.0.5",),
        tests=(
            "tests/test_layers.py",
            "tests/test_condense.py",
            "-k",
            # Not those that train large convolutions: two runs of them take minutes.
            "(condense or spectral_linear or conv1d or vanilla or multilayer) and not 150",
        ),
        beside=(
            ("tests/__init__.py", ""),
            ("tests/utils_framework.py", "torchlip_framework.py"),
        ),
    ),
    "dgmr": Client(
        ("dgmr==1.4.4", "pytorch-msssim==1.0.0"),
        ("einops", "huggingface-hub", "pytorch-lightning", "safetensors", "torchvision"),
        native=True,
        tests=tuple(
            f"tests/test_model.py::test_{name}"
            for name in (
                "dblock",
                "gblock",
                "conv_gru_cell",
                "latent_conditioning_stack",
                "context_conditioning_stack",
                "temporal_discriminator",
            )
        ),
    ),
    "espnet": Client(("espnet==202511",)),
    "miles-credit": Client(
        ("miles-credit==2026.2.0", "timm==1.0.22"),
        ("huggingface-hub", "pyyaml", "safetensors", "torchvision"),
        native=True,
    ),
    "normflows": Client(("normflows==1.7.3",)),
    "parallel-wavegan": Client(
        ("parallel-wavegan==0.6.1",),
        isolated=False,  # its setup imports pip
        tests=("test/test_hifigan.py::test_hifigan_trainable[dict_g4-dict_d4-dict_loss4]",),
    ),
    "pytorch-pretrained-biggan": Client(
        ("pytorch-pretrained-biggan==0.1.1",),
        ("boto3", "requests", "tqdm"),
    ),
    "sngp": Client(("SNGP==0.7",)),
}
