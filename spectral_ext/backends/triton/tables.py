"""What a launch is told about its layers: the table of their facts, and the tiles of its programs.

A layer is seen as outer × rows × inner, as in ``csrc/layer.h``: column ``c = o * inner + i`` counts in
the order of memory, and ``orders`` says where it stands in ``v`` where that is another order.

A program works on one tile of one layer: whole rows, or a chunk of columns from the first row to the
last. Tiles have fixed sizes, so that partial sums, and with them the bits of a result, depend on the
layer alone: its shape, its strides, and whether its memory begins at a multiple of 16 bytes. A launch
of the CUDA backend cuts its work into tickets of equal bytes instead, because its CTAs stay; here the
device hands out programs, and evens out what is unequal.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CHUNK_SIZES",
    "FIELDS",
    "TILE_SIZES",
    "LayerFacts",
    "Shape",
    "Tables",
    "backward_tables",
    "forward_tables",
]

# Rows and columns that a program holds at once, for narrow, middling and wide layers: 4096 elements. It
# walks along its rows in steps of so many columns, and only the last step may be partly empty: 13824
# columns are 27 steps. The fewer rows, the sooner a row is read again, and the better a cache has it.
TILE_SIZES = ((128, 32), (32, 128), (8, 512))
WIDEST = (64, 2048, 2**62)
# The same where columns are added up: rows of shares, or of the weight itself.
CHUNK_SIZES = ((64, 32), (16, 128), (16, 128))

# One row of the table of layers; places are in elements.
FIELDS = (
    "rows",
    "columns",
    "inner",
    "tile",  # which of TILE_SIZES
    "contiguous",  # whether a row is one piece of memory
    "eps",  # the bits of a float64, and so are tol, target and slack
    "tol",  # 0: all iterations are made
    "target",  # c of W·c/σ
    "soft",  # whether a weight is left alone whose σ is at most c
    "detach_sigma",  # whether σ is a constant of the gradient
    "wide_vectors",  # whether u and v have the dtype to compute in, and not the weight's
    "slack",  # how far (‖u‖·‖v‖)² of vectors that were given may be off 1 from rounding
    "u_stride",
    "v_stride",
    "order",  # where its columns begin in `orders`; -1: they stand in the order of v
    "saved",  # of u in the saved vectors; v follows
    "sigma",
    "half_steps",  # half-iterations of the forward
    "update",
    "v_first",
    "t",  # in the workspace of vectors: M v
    "y",  # Mᵀ u
    "shares",  # for each tile of rows its share of Mᵀ t
    "scales",  # for each tile of rows what its share is a multiple of
    "row_sums",  # in the workspace of sums, in slots: each tile of rows' share of ‖t‖², or of ⟨G, Y⟩
    "row_tiles",
    "column_sums",  # in slots: each chunk of columns' share of ‖y‖²
    "chunks",
    "made",  # how many iterations were made
)


class Shape(NamedTuple):
    """A dense weight in memory, its rows those of dimension ``dim``."""

    outer: int
    rows: int
    inner: int
    order: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Sizes of the columns' dimensions, and their order in memory; None if that is the order of v."""

    @property
    def columns(self) -> int:
        """The size of v."""
        return self.outer * self.inner

    @classmethod
    def of(cls, size: Sequence[int], stride: Sequence[int], dim: int) -> "Shape":
        """Describe a tensor whose elements fill one block of memory, in any order of dimensions."""
        in_memory = [d for d in range(len(size)) if d == dim or size[d] > 1]
        if size[dim] == 1:  # its stride means nothing
            in_memory.sort(key=lambda d: (d != dim, -stride[d]))
        else:
            in_memory.sort(key=lambda d: -stride[d])
        place = in_memory.index(dim)
        outer = inner = 1
        for d in in_memory[:place]:
            outer *= size[d]
        for d in in_memory[place + 1 :]:
            inner *= size[d]
        columns = [d for d in in_memory if d != dim]
        if columns == sorted(columns):
            return cls(outer, size[dim], inner, None)
        dims = sorted(columns)
        return cls(
            outer,
            size[dim],
            inner,
            (tuple(size[d] for d in dims), tuple(dims.index(d) for d in columns)),
        )

    def places_in_v(self) -> Tensor:
        """Return for each column in the order of memory its place in v."""
        assert self.order is not None
        sizes, order = self.order
        return torch.arange(self.columns).reshape(sizes).permute(order).reshape(-1)


class LayerFacts(NamedTuple):
    """All that a table depends on of one layer; the backward needs only the first seven."""

    shape: Shape
    saved: int
    sigma: int
    lanes: int
    """Elements in 16 bytes."""
    scale: float = 1.0
    soft: bool = False
    detach_sigma: bool = False
    eps: float = 1.0
    tol: float = 0.0
    wide_vectors: bool = False
    u_stride: int = 1
    v_stride: int = 1
    n_power_iterations: int = 0
    v_first: bool = False
    update: bool = False


@dataclass(frozen=True)
class Tables:
    """The tables of one launch or of several, on one device."""

    layers: Tensor
    """int64, of shape (layers, len(FIELDS))."""
    orders: Tensor
    """int64; the places in v of the columns of layers that are permuted."""
    row_tiles: Tensor
    """int32, of shape (tiles, 2): layer and number."""
    turns: tuple[Tensor, ...]
    """The same for half-steps, which take turns: of the layers' rows or columns, whichever is due."""
    half_steps: int
    vectors: int
    """Elements of the workspace in the dtype to compute in."""
    sums: int
    """Elements of the workspace in float64."""

    def moved_by(self, move: Callable[[Tensor], Tensor]) -> "Tables":
        """Return the same tables elsewhere."""
        return replace(
            self,
            layers=move(self.layers),
            orders=move(self.orders),
            row_tiles=move(self.row_tiles),
            turns=tuple(move(tiles) for tiles in self.turns),
        )


def forward_tables(layers: Sequence[LayerFacts]) -> Tables:
    """Return the tables of a forward, on the CPU."""
    rows = [_Row.of(layer) for layer in layers]
    vectors = sums = 0
    for row, layer in zip(rows, layers, strict=True):
        for name, size in (
            ("t", layer.shape.rows),
            ("y", layer.shape.columns),
            ("shares", row["row_tiles"] * layer.shape.columns),
            ("scales", row["row_tiles"]),
        ):
            row[name] = vectors
            vectors += _aligned(size)
        for name, size in _sums_of(row).items():
            row[name] = sums
            sums += size
    # u_first begins with rows, v_first with columns.
    half_steps = max(row["half_steps"] for row in rows)
    turns = []
    for turn in range(min(2, half_steps)):
        counts = [
            0
            if row["half_steps"] <= turn
            else row["row_tiles" if (turn + row["v_first"]) % 2 == 0 else "chunks"]
            for row in rows
        ]
        turns.append(_tile_table(counts))
    return _tables(layers, rows, tuple(turns), half_steps, vectors, sums)


def _sums_of(row: dict[str, int]) -> dict[str, int]:
    """Return how many sums a layer has in the forward's workspace.

    Norms have a slot for even iterations and one for odd ones: what an iteration looks at is not what
    it writes. Without an update the slots are those of uᵀt, ‖u‖² and ‖v‖².
    """
    if not row["update"]:
        return {"row_sums": 3 * row["row_tiles"]}
    return {"row_sums": 2 * row["row_tiles"], "column_sums": 2 * row["chunks"], "made": 1}


def backward_tables(layers: Sequence[LayerFacts]) -> Tables:
    """Return the tables of a backward, on the CPU."""
    rows = [_Row.of(layer) for layer in layers]
    sums = 0
    for row in rows:
        row["row_sums"] = sums
        sums += row["row_tiles"]
    return _tables(layers, rows, (), 0, 0, sums)


class _Row(dict[str, int]):
    """A row of the table of layers, by names."""

    @classmethod
    def of(cls, layer: LayerFacts) -> "_Row":
        outer, rows, inner, _ = layer.shape
        columns = layer.shape.columns
        tile = next(i for i, widest in enumerate(WIDEST) if columns <= widest)
        return cls(
            dict.fromkeys(FIELDS, 0),
            rows=rows,
            columns=columns,
            inner=inner,
            tile=tile,
            contiguous=outer == 1 and inner % layer.lanes == 0 and columns < 2**30,
            eps=_bits(layer.eps),
            tol=_bits(layer.tol),
            target=_bits(layer.scale),
            soft=layer.soft,
            detach_sigma=layer.detach_sigma,
            wide_vectors=layer.wide_vectors,
            slack=_bits(2**-5 if layer.lanes == 8 and not layer.wide_vectors else 1e-4),
            u_stride=layer.u_stride,
            v_stride=layer.v_stride,
            saved=layer.saved,
            sigma=layer.sigma,
            half_steps=2 * layer.n_power_iterations if layer.update else 1,
            update=layer.update,
            v_first=layer.v_first and layer.update,
            row_tiles=-(-rows // TILE_SIZES[tile][0]),
            chunks=-(-columns // CHUNK_SIZES[tile][1]),
        )


def _tables(
    layers: Sequence[LayerFacts],
    rows: Sequence[_Row],
    turns: tuple[Tensor, ...],
    half_steps: int,
    vectors: int,
    sums: int,
) -> Tables:
    orders = [torch.zeros(1, dtype=torch.int64)]  # never empty
    count = 1
    for row, layer in zip(rows, layers, strict=True):
        row["order"] = -1
        if layer.shape.order is not None:
            row["order"] = count
            orders.append(layer.shape.places_in_v())
            count += layer.shape.columns
    return Tables(
        torch.tensor([[row[name] for name in FIELDS] for row in rows], dtype=torch.int64),
        torch.cat(orders),
        _tile_table([row["row_tiles"] for row in rows]),
        turns,
        half_steps,
        vectors,
        sums,
    )


def _tile_table(counts: Sequence[int]) -> Tensor:
    """Return layer and number of so many tiles of each layer."""
    count = torch.tensor(counts)
    layer = torch.arange(len(counts)).repeat_interleave(count)
    number = torch.arange(len(layer)) - (count.cumsum(0) - count)[layer]
    return torch.stack([layer, number], dim=1).to(torch.int32)


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


def _aligned(size: int) -> int:
    return -(-size // 32) * 32  # whole cache lines
