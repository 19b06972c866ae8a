"""The names that a checkpoint of stock's hook uses, and reading one into a parametrized module.

=============== ============================== ================================================
tensor          ``torch.nn.utils``, the hook   ``torch.nn.utils.parametrizations``, and ours
=============== ============================== ================================================
weight          ``weight_orig``                ``parametrizations.weight.original``
``u``           ``weight_u``                   ``parametrizations.weight.0._u``
``v``           ``weight_v``                   ``parametrizations.weight.0._v``
=============== ============================== ================================================

A 1-D weight has no ``u`` and ``v`` as a parametrization.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook

__all__ = ["keys", "read_hook_layout", "vectors_of_1d"]


def keys(prefix: str, tensor_name: str) -> list[tuple[str, str]]:
    """Return the keys of weight, ``u`` and ``v``, each as the hook and as the other names it.

    Args:
        prefix: of the module, with its dot.
        tensor_name: of the normalized tensor.
    """
    hook, parametrization = f"{prefix}{tensor_name}", f"{prefix}parametrizations.{tensor_name}"
    return [
        (f"{hook}_orig", f"{parametrization}.original"),
        (f"{hook}_u", f"{parametrization}.0._u"),
        (f"{hook}_v", f"{parametrization}.0._v"),
    ]


def vectors_of_1d(weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the ``u`` and ``v`` with which a 1-D weight, as a column, has its norm for σ."""
    with torch.no_grad():
        return F.normalize(weight, dim=0, eps=eps), torch.ones_like(weight[:1])


def read_hook_layout(
    norm: _SpectralNorm,
    tensor_name: str,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
) -> None:
    """Rename, in place, what a checkpoint of the hook has for a tensor that ``norm`` normalizes."""
    renamed = keys(prefix, tensor_name)
    if renamed[0][0] in state_dict:
        # Checkpoints of torch before 1.1 have no v; stock's hook knows how to find it.
        iterations = getattr(norm, "n_power_iterations", 1)
        hook = StockHook(tensor_name, iterations, norm.dim, norm.eps)
        old_versions = SpectralNormLoadStateDictPreHook(hook)
        old_versions(state_dict, prefix, local_metadata, False, [], [], [])
        for hook_key, key in renamed:
            if hook_key in state_dict:
                state_dict[key] = state_dict.pop(hook_key)
    weight = state_dict.get(renamed[0][1])
    if weight is None or weight.ndim != 1:
        return
    vectors = vectors_of_1d(weight, norm.eps)
    for name, (_, key), vector in zip(("_u", "_v"), renamed[1:], vectors, strict=True):
        if name not in norm._buffers:
            state_dict.pop(key, None)
        elif key not in state_dict:
            state_dict[key] = vector
