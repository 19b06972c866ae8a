"""The weights that every backend is tested with."""

import itertools
import math

import torch
from stock import Layer
from torch import Tensor

from spectral_ext.benchmark import models

MODELS = models.SHAPES

# (shape, dim): odd, prime, 1×1, one row, one column, tall, wide, several blocks of work, every dim.
SHAPES = [
    ((5, 7), 0),
    ((5, 7), 1),
    ((1, 1), 0),
    ((1, 9), 0),
    ((9, 1), 0),
    ((1, 1, 1, 1), 1),
    ((31, 17, 3), 0),
    ((31, 17, 3), 1),
    ((31, 17, 3), 2),
    ((6, 1, 5, 1, 3), 4),
    ((64, 3, 3, 3), 0),
    ((37, 13, 4, 4), 1),
    ((1, 20011), 0),
    ((20011, 1), 0),
    ((3001, 19), 0),
    ((19, 3001), 1),
    ((600, 701), 0),
    ((600, 701), 1),
    ((520, 64, 3, 3), 0),
    ((64, 130, 5, 5), 1),
    ((14, 2503), 0),
    ((3, 2503), 0),
]
# The same for kernels that are interpreted: what takes another path or tile, but few of each.
SMALL_SHAPES = [
    ((5, 7), 0),
    ((5, 7), 1),
    ((1, 1), 0),
    ((9, 1), 0),
    ((6, 1, 5, 1, 3), 4),
    ((8, 3, 3, 4), 0),
    ((137, 40), 0),  # two narrow tiles, each of two steps
    ((37, 20, 2, 4), 1),
    ((41, 144), 0),  # two tiles of middling width
    ((9, 2056), 0),  # two wide ones
]
LAYOUTS = ("contiguous", "channels_last", "reversed", "strided", "expanded", "offset")


def in_layout(weight: Tensor, layout: str) -> Tensor:
    """Return a tensor with the same values (save for `expanded`) in another layout of memory."""
    if layout == "channels_last":
        format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
        return weight if format is None else weight.contiguous(memory_format=format)
    if layout == "reversed":
        reversed_dims = tuple(reversed(range(weight.ndim)))
        return weight.permute(reversed_dims).contiguous().permute(reversed_dims)
    if layout == "strided":
        return torch.stack([weight, torch.full_like(weight, math.nan)], -1)[..., 0]
    if layout == "expanded":
        return weight[..., :1].expand(weight.shape)
    if layout == "offset":  # not aligned to any vector
        flat = torch.empty(weight.numel() + 1, dtype=weight.dtype)
        flat[1:] = weight.reshape(-1)
        return flat[1:].view(weight.shape)
    return weight


def unit(size: int, dtype: torch.dtype) -> Tensor:
    vector = torch.randn(size, dtype=torch.float64)
    return (vector / vector.norm()).to(dtype)


def layer(shape, dim=0, dtype=torch.float32, layout="contiguous", scale=0.1, **settings) -> Layer:
    """Return a random layer whose vectors have gone some way towards the singular vectors."""
    weight = in_layout((torch.randn(shape, dtype=torch.float64) * scale).to(dtype), layout)
    matrix = weight.double().movedim(dim, 0).reshape(weight.shape[dim], -1)
    v = unit(matrix.shape[1], torch.float64)
    for _ in range(3):
        u = matrix @ v
        u /= u.norm()
        v = matrix.mT @ u
        v /= v.norm()
    return Layer(weight, u.to(dtype), v.to(dtype), dim, **settings)


def layers(dtype=torch.float32, layout="contiguous", **settings) -> list[Layer]:
    """Return one layer of each shape."""
    return [layer(shape, dim, dtype, layout, **settings) for shape, dim in SHAPES]


def model(name: str, limit: int = 10**9) -> list[Layer]:
    """Return the layers of a real model that have at most `limit` elements."""
    small = itertools.filterfalse(lambda entry: math.prod(entry["shape"]) > limit, MODELS[name])
    return [layer(entry["shape"], entry["dim"], scale=0.02) for entry in small]


def options_of(layers: list[Layer]) -> dict[str, list]:
    """Return the settings of layers as the list API takes them."""
    names = (
        "n_power_iterations", "eps", "order", "tol", "scale", "bound", "detach_sigma",
    )  # fmt: skip
    columns = {name: [getattr(layer, name) for layer in layers] for name in names}
    return {"dims": [layer.dim for layer in layers], **columns}
