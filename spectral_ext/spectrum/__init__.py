"""Singular values of matrices and of convolutions, estimated and bounded, on plain tensors."""

from .certified import certified_matrix_norm, certified_operator_norm
from .convolution import Convolution, operator_norm
from .matrix import singular_values

__all__ = [
    "Convolution",
    "certified_matrix_norm",
    "certified_operator_norm",
    "operator_norm",
    "singular_values",
]
