"""Modules with spectral normalization: one layer, or all layers of a model together."""

from .apply import AppliedSpectralNorm, apply_spectral_norm
from .bake import bake
from .convert import stock_state_dict
from .fuse import fuse, unfuse
from .group import SpectralGroup, group_of
from .operator_norm import OperatorNorm, operator_norm
from .parametrization import SpectralNorm
from .plan import Layer
from .projection import SpectralProjection, project_
from .register import spectral_norm
from .report import Report, report
from .singular_values import singular_values

__all__ = [
    "AppliedSpectralNorm",
    "Layer",
    "OperatorNorm",
    "Report",
    "SpectralGroup",
    "SpectralNorm",
    "SpectralProjection",
    "apply_spectral_norm",
    "bake",
    "fuse",
    "group_of",
    "operator_norm",
    "project_",
    "report",
    "singular_values",
    "spectral_norm",
    "stock_state_dict",
    "unfuse",
]
