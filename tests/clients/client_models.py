"""One small model of each client, made by the package's own classes, with inputs that it takes.

A builder imports its package itself, since a package may be absent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import prepare
import torch
from parts import part
from torch import Tensor, nn

__all__ = ["MODELS", "Model"]


@dataclass(frozen=True)
class Model:
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[object, ...]]
    layout: str
    """Which of stock's spectral norms the package uses."""
    normalized: int
    """How many layers have one."""
    repeats: bool = False
    """Whether a forward reads some weights several times, each of which iterates in stock."""
    unused: str | None = None
    """A normalized layer that no forward uses: stock never iterates it, a fused model always."""
    bypassed: tuple[str, ...] = ()
    """Layers that have the hook and are never called: another module reads their raw weight."""


def audiocraft(lstm: int = 0) -> nn.Module:
    """The encoder of an audio codec: each convolution with its norm is two modules deep."""
    seanet = part("audiocraft.modules.seanet")
    return seanet.SEANetEncoder(
        dimension=8, n_filters=2, ratios=[4, 2], norm="spectral_norm", lstm=lstm
    )


def basicsr() -> nn.Module:
    """The discriminator of Real-ESRGAN."""
    return part("basicsr.archs.discriminator_arch").UNetDiscriminatorSN(3, num_feat=4)


def coqui_tts() -> nn.Module:
    """Both directions of an LSTM have the hook; the convolutions have PyTorch's weight norm."""
    layers = part("TTS.tts.layers.delightful_tts.conv_layers")
    return layers.ConvLSTMLinear(6, 2, n_channels=8)


def deel_torchlip() -> nn.Module:
    """Its Björck iteration is a second parametrization, on top of stock's spectral norm."""
    from deel import torchlip

    return nn.Sequential(
        torchlip.SpectralConv2d(3, 8, 3),
        torchlip.GroupSort2(),
        torchlip.ScaledAvgPool2d(2),
        nn.Flatten(),
        torchlip.SpectralLinear(8 * 3 * 3, 6),
        torchlip.GroupSort2(),
        torchlip.SpectralLinear(6, 1),
    )


def dgmr() -> nn.Module:
    """One of the two discriminators of a precipitation nowcasting GAN; eps is 1e-4."""
    from dgmr import TemporalDiscriminator

    return TemporalDiscriminator(input_channels=1, num_layers=1)


def espnet() -> nn.Module:
    """HiFi-GAN: spectral norm at the first scale, stock's weight norm at the others."""
    from espnet2.gan_tts.hifigan import HiFiGANMultiScaleDiscriminator

    return HiFiGANMultiScaleDiscriminator(**_HIFIGAN)


def miles_credit() -> nn.Module:
    """A weather model. Its package normalizes every linear layer of timm's SwinV2.

    The attention of SwinV2 reads ``qkv.weight`` and does not call ``qkv``.
    """
    fuxi = part("credit.models.fuxi", absent={"credit.postblock.gen1": ("PostBlock",)})
    return fuxi.Fuxi(
        image_height=16,
        image_width=16,
        patch_height=2,
        patch_width=2,
        levels=1,
        dim=8,
        channels=2,
        surface_channels=1,
        num_groups=2,
        num_heads=2,
        depth=2,
        window_size=2,
    )


def parallel_wavegan() -> nn.Module:
    """The same by the package that it comes from."""
    prepare.parallel_wavegan()
    from parallel_wavegan.models import HiFiGANMultiScaleDiscriminator

    return HiFiGANMultiScaleDiscriminator(**_HIFIGAN)


_HIFIGAN = {
    "scales": 2,
    "discriminator_params": {
        "in_channels": 1,
        "out_channels": 1,
        "kernel_sizes": [5, 5, 5, 3],
        "channels": 4,
        "max_downsample_channels": 16,
        "max_groups": 4,
        "bias": True,
        "downsample_scales": [2, 2],
        "nonlinear_activation": "LeakyReLU",
        "nonlinear_activation_params": {"negative_slope": 0.1},
    },
    "follow_official_norm": True,
}


def pytorch_pretrained_biggan() -> nn.Module:
    """BigGAN's generator: convolutions, linear layers, an embedding, attention."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    model = BigGAN(
        BigGANConfig(
            output_dim=32,
            z_dim=8,
            class_embed_dim=8,
            channel_width=4,
            num_classes=5,
            layers=[(False, 16, 8), (True, 8, 4), (True, 4, 2), (True, 2, 1)],
            attention_layer_position=2,
            n_stats=3,
        )
    )
    # The package leaves these to a checkpoint, and the memory as it finds it.
    nn.init.ones_(model.generator.bn.weight)
    nn.init.zeros_(model.generator.bn.bias)
    return model


def sngp() -> nn.Module:
    """The normalized layer has a fixed random weight, which does not require a gradient."""
    from sngp import SNGP

    return SNGP(3, nn.Sequential(nn.Linear(6, 16), nn.ReLU()), 16, 32)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def noise_and_classes() -> tuple[object, ...]:
    return noise(4, 8), torch.eye(5, dtype=torch.float64)[:4], 0.5


MODELS = {
    "audiocraft": Model(audiocraft, lambda: (noise(2, 1, 64),), "hook", 16),
    "basicsr": Model(basicsr, lambda: (noise(2, 3, 16, 16),), "hook", 8),
    "coqui-tts": Model(coqui_tts, lambda: (noise(3, 6, 10), torch.tensor([10, 7, 9])), "hook", 2),
    "deel-torchlip": Model(deel_torchlip, lambda: (noise(4, 3, 8, 8),), "parametrization", 3),
    "dgmr": Model(
        dgmr,
        lambda: (noise(4, 8, 1, 32, 32),),
        "parametrization",
        13,
        repeats=True,
        unused="d_last.conv_1x1",
    ),
    "espnet": Model(espnet, lambda: (noise(2, 1, 256),), "hook", 5),
    "miles-credit": Model(
        miles_credit,
        lambda: (noise(2, 3, 2, 16, 16),),
        "hook",
        19,
        bypassed=tuple(f"u_transformer.layer.blocks.{i}.attn.qkv" for i in range(2)),
    ),
    "parallel-wavegan": Model(parallel_wavegan, lambda: (noise(2, 1, 256),), "hook", 5),
    "pytorch-pretrained-biggan": Model(pytorch_pretrained_biggan, noise_and_classes, "hook", 54),
    "sngp": Model(sngp, lambda: (noise(8, 6),), "hook", 1),
}
