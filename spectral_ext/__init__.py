"""Spectral normalization for all layers of a model in one native call."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from . import functional, nn, reference, spectrum
from .backends.cpu import empty_cache
from .nn import (
    SpectralGroup,
    SpectralProjection,
    apply_spectral_norm,
    bake,
    fuse,
    group_of,
    project_,
    report,
    singular_values,
    spectral_norm,
    stock_state_dict,
    unfuse,
)

__all__ = [
    "SpectralGroup",
    "SpectralProjection",
    "apply_spectral_norm",
    "bake",
    "empty_cache",
    "functional",
    "fuse",
    "group_of",
    "nn",
    "project_",
    "reference",
    "report",
    "singular_values",
    "spectral_norm",
    "spectrum",
    "stock_state_dict",
    "unfuse",
]

try:
    __version__ = _version("spectral-ext")
except _PackageNotFoundError:  # a checkout on the path that is not installed
    __version__ = "0+unknown"
