"""Lists of layers that take every path through the CUDA kernels."""

import samples
import torch
from stock import Layer

# (shape, dim, layout): every width of row groups and wider ones, short and tall, one row, one column;
# rows that are one run of memory, several, no whole vectors, single elements; columns in another
# order; weights that are not aligned.
ALL = [
    ((128, 3, 3, 3), 0, "contiguous"),
    ((1, 1), 0, "contiguous"),
    ((1, 128), 0, "contiguous"),
    ((37, 1), 0, "contiguous"),
    ((300, 20), 0, "contiguous"),
    ((21, 300), 0, "contiguous"),
    ((64, 384), 0, "contiguous"),
    ((13, 600), 0, "contiguous"),
    ((40, 1152), 0, "contiguous"),
    ((17, 2304), 0, "contiguous"),
    ((9, 4608), 0, "contiguous"),
    ((5, 9216), 0, "contiguous"),
    ((4, 6001), 0, "contiguous"),
    ((3, 11000), 0, "contiguous"),
    ((3, 13829), 0, "contiguous"),
    ((2, 15013), 0, "contiguous"),
    ((3, 20, 5), 1, "contiguous"),
    ((16, 7, 4, 4), 1, "contiguous"),
    ((5, 3, 7, 2, 3), 2, "contiguous"),
    ((40, 30), 0, "reversed"),
    ((11, 8, 2, 3), 0, "reversed"),
    ((24, 16, 3, 3), 0, "channels_last"),
    ((8, 9, 3, 5), 1, "channels_last"),
    ((31, 24), 0, "offset"),
    ((7, 515), 0, "offset"),
    ((6, 16, 4), 1, "offset"),
]
TINY = [
    ((33, 8), 0, "contiguous"),
    ((3, 130), 0, "contiguous"),
    ((4, 5, 8), 1, "contiguous"),
    ((9, 4, 2, 2), 0, "channels_last"),
    ((5, 12), 0, "offset"),
    ((9, 1201), 0, "contiguous"),
]


def layers(
    kinds=tuple(ALL),
    dtype: torch.dtype = torch.float32,
    stride: int = 1,
    order: str | None = None,
    **settings,
) -> list[Layer]:
    """Return a layer of each kind, with vectors whose elements are ``stride`` apart.

    Without an order the layers take turns.
    """
    result = []
    for i, (shape, dim, layout) in enumerate(kinds):
        of_layer = order or ("u_first", "v_first")[i % 2]
        layer = samples.layer(shape, dim, dtype, layout, order=of_layer, **settings)
        layer.u, layer.v = strided(layer.u, stride), strided(layer.v, stride)
        result.append(layer)
    return result


def strided(vector: torch.Tensor, stride: int) -> torch.Tensor:
    return torch.stack([vector, *[torch.full_like(vector, torch.nan)] * (stride - 1)], -1)[:, 0]
