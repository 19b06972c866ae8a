"""Spectral normalization for all layers of a model in one native call."""

from importlib.metadata import version as _version

from . import functional, reference

__all__ = ["functional", "reference"]
__version__ = _version("spectral-ext")
