"""The backward of many layers: ``gW = (c·G − a·u vᵀ) / σ + gσ·u vᵀ`` with ``a = ⟨G, Y⟩``.

u and v are constants. One launch leaves each tile's share of ``a``, a second one the gradients. Where σ
counts as a constant, there is no term of ``a``; where the forward has left the weight alone,
``gW = G + gσ·u vᵀ``. A missing ``G`` is zero.
"""

import triton
import triton.language as tl

from .device import (
    COLUMNS,
    DETACH_SIGMA,
    INNER,
    ROW_SUMS,
    ROW_TILES,
    ROWS,
    SAVED,
    SIGMA,
    TARGET,
    TILE,
    WIDTH,
    are_vectors,
    as_pointer,
    in_memory,
    in_v,
    is_left_alone,
    number,
    total_of,
)
from .tables import TILE_SIZES

KINDS = tl.constexpr(len(TILE_SIZES))
TILES = tl.constexpr(TILE_SIZES)

# The addresses of a layer in a call; that of a missing gradient is 0.
POINTERS = tl.constexpr(3)
GRAD, OUTPUT, RESULT = (tl.constexpr(place) for place in range(3))


@triton.jit
def write_dot(
    facts, addresses, sums, tile,
    T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """⟨G, Y⟩ of a tile of rows; zero where there is no G, and where σ counts as a constant."""
    rows = tl.load(facts + ROWS)
    columns = tl.load(facts + COLUMNS)
    inner = tl.load(facts + INNER)
    grad = as_pointer(addresses + GRAD, T, VECTORS)
    output = as_pointer(addresses + OUTPUT, T, VECTORS)
    is_zero = (tl.load(addresses + GRAD) == 0) | (tl.load(facts + DETACH_SIGMA) != 0)
    given = tl.where(is_zero, 0, rows)
    if VECTORS:
        inner = tl.multiple_of(inner, LANES)
        columns = tl.multiple_of(columns.to(tl.int32), LANES)
    r = tl.cast(tile, tl.int64) * R + tl.arange(0, R)
    there = r < given
    first = r * inner
    products = tl.zeros([R, C], A)
    for begin in range(0, columns, C):
        c = begin + tl.arange(0, C)
        mask = there[:, None] & (c < columns)[None, :]
        offset = first[:, None] + in_memory(c, rows, inner, VECTORS)[None, :]
        g = tl.load(grad + offset, mask=mask, other=0.0).to(A)
        products += g * tl.load(output + offset, mask=mask, other=0.0).to(A)
    dot = tl.sum(tl.sum(products, axis=1).to(tl.float64), axis=0)
    tl.store(sums + tl.load(facts + ROW_SUMS) + tile, dot)


@triton.jit
def dot_kernel(
    layers, tiles, pointers, sums, T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr
):
    """Each tile's share of ⟨G, Y⟩."""
    layer = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    facts = layers + layer * WIDTH
    addresses = pointers + layer * POINTERS
    as_vectors = are_vectors(facts, addresses, 2)
    kind = tl.load(facts + TILE)
    for K in tl.static_range(KINDS):
        if kind == K:
            if as_vectors:
                write_dot(facts, addresses, sums, tile,
                          T, A, LANES, TILES[K][0], TILES[K][1], True)  # fmt: skip
            else:
                write_dot(facts, addresses, sums, tile,
                          T, A, LANES, TILES[K][0], TILES[K][1] // 2, False)  # fmt: skip


@triton.jit
def write_gradient(
    facts, addresses, orders, saved, tile, factor, coefficient,
    T: tl.constexpr, RESULT_T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """``gW = factor·G − coefficient·u vᵀ`` of a tile of rows."""
    rows = tl.load(facts + ROWS)
    columns = tl.load(facts + COLUMNS)
    inner = tl.load(facts + INNER)
    grad = as_pointer(addresses + GRAD, T, VECTORS)
    result = as_pointer(addresses + RESULT, RESULT_T, VECTORS)
    given = tl.where(tl.load(addresses + GRAD) == 0, 0, rows)
    saved_u = saved + tl.load(facts + SAVED)
    if VECTORS:
        inner = tl.multiple_of(inner, LANES)
        columns = tl.multiple_of(columns.to(tl.int32), LANES)
    r = tl.cast(tile, tl.int64) * R + tl.arange(0, R)
    there = r < rows
    first = r * inner
    along_u = coefficient * tl.load(saved_u + r, mask=there, other=0.0)
    for begin in range(0, columns, C):
        c = begin + tl.arange(0, C)
        exist = c < columns
        mask = there[:, None] & exist[None, :]
        offset = first[:, None] + in_memory(c, rows, inner, VECTORS)[None, :]
        v = tl.load(saved_u + rows + in_v(facts, orders, c, exist), mask=exist, other=0.0)
        mask_g = (r < given)[:, None] & exist[None, :]
        g = tl.load(grad + offset, mask=mask_g, other=0.0, eviction_policy="evict_first").to(A)
        value = factor * g - along_u[:, None] * v[None, :]
        tl.store(result + offset, value.to(RESULT_T), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["saved", "sigmas", "grad_sigmas"])
def gradient_kernel(
    layers, orders, tiles, pointers, sums, saved, sigmas, grad_sigmas,
    T: tl.constexpr, RESULT_T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
    HAS_GRAD_SIGMAS: tl.constexpr,
):  # fmt: skip
    """The gradients of all layers."""
    layer = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    facts = layers + layer * WIDTH
    addresses = pointers + layer * POINTERS
    sigma = tl.load(sigmas + tl.load(facts + SIGMA)).to(tl.float64)
    along = total_of(facts, sums, 0, ROW_SUMS, ROW_TILES)
    left_alone = is_left_alone(facts, sigma)
    inverse = 1.0 / sigma
    factor = tl.where(left_alone, 1.0, number(facts, TARGET) * inverse)
    coefficient = tl.where(left_alone, 0.0, along * inverse)
    if HAS_GRAD_SIGMAS:
        coefficient -= tl.load(grad_sigmas + tl.load(facts + SIGMA)).to(tl.float64)
    as_vectors = are_vectors(facts, addresses, 3)
    kind = tl.load(facts + TILE)
    for K in tl.static_range(KINDS):
        if kind == K:
            if as_vectors:
                write_gradient(facts, addresses, orders, saved, tile,
                               factor.to(A), coefficient.to(A),
                               T, RESULT_T, A, LANES,
                               TILES[K][0], TILES[K][1], True)  # fmt: skip
            else:
                write_gradient(facts, addresses, orders, saved, tile,
                               factor.to(A), coefficient.to(A),
                               T, RESULT_T, A, LANES,
                               TILES[K][0], TILES[K][1] // 2, False)  # fmt: skip
