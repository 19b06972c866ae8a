"""Modules with spectral normalization: one layer, or all layers of a model together."""

from .fuse import fuse, unfuse
from .group import SpectralGroup, group_of
from .parametrization import SpectralNorm, spectral_norm
from .plan import Layer

__all__ = ["Layer", "SpectralGroup", "SpectralNorm", "fuse", "group_of", "spectral_norm", "unfuse"]
