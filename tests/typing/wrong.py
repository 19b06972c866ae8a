"""Wrong uses, which mypy must find: each line that it does not complain about is an error itself."""

import torch
from torch import nn

import spectral_ext

model = nn.Sequential(nn.Linear(4, 3))
weights = [torch.randn(3, 4)]

conv: nn.Conv2d = spectral_ext.spectral_norm(nn.Linear(3, 2))  # type: ignore[assignment]
spectral_ext.spectral_norm(nn.Linear(3, 2), order="w_first")  # type: ignore[arg-type]
spectral_ext.spectral_norm(nn.Linear(3, 2), gain="two")  # type: ignore[arg-type]
spectral_ext.spectral_norm(nn.Linear(3, 2), iterations=2)  # type: ignore[call-arg]
spectral_ext.spectral_norm(weights[0])  # type: ignore[type-var]
spectral_ext.fuse(model, update="sometimes")  # type: ignore[arg-type]
spectral_ext.fuse(model, include=3)  # type: ignore[arg-type]
spectral_ext.fuse(model)(weights[0])  # type: ignore[operator]
spectral_ext.stock_state_dict(model, layout="mine")  # type: ignore[arg-type]
spectral_ext.SpectralProjection(model, bounds=1.0)  # type: ignore[call-arg]
spectral_ext.project_(model, bounds=1.0)  # type: ignore[call-arg]
spectral_ext.project_(model, init="zeros")  # type: ignore[arg-type]
spectral_ext.functional.spectral_normalize(weights, weights)  # type: ignore[call-arg]
spectral_ext.functional.spectral_normalize(
    weights,
    weights,
    weights,
    bound="1",  # type: ignore[arg-type]
)
spectral_ext.spectrum.Convolution((8, 8), padding="full")  # type: ignore[arg-type]
plain: nn.Conv2d = spectral_ext.bake(nn.Linear(3, 2))  # type: ignore[assignment]
spectral_ext.report(model).rows[0].sigma = 1.0  # type: ignore[misc]
