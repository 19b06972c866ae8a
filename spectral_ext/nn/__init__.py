"""Modules with spectral normalization: one layer, or all layers of a model together."""

from .apply import AppliedSpectralNorm, apply_spectral_norm
from .convert import stock_state_dict
from .fuse import fuse, unfuse
from .group import SpectralGroup, group_of
from .parametrization import SpectralNorm, spectral_norm
from .plan import Layer

__all__ = [
    "AppliedSpectralNorm",
    "Layer",
    "SpectralGroup",
    "SpectralNorm",
    "apply_spectral_norm",
    "fuse",
    "group_of",
    "spectral_norm",
    "stock_state_dict",
    "unfuse",
]
