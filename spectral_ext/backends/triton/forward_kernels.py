"""The forward of many layers: half-steps of the power iteration, and then ``Y = W / σ``.

With ``t = M v`` an iteration of ``u_first`` is ``u = t/‖t‖``, ``y = Mᵀu``, ``v = y/‖y‖``, and σ = ‖y‖. One
half-step reads tiles of rows: ``t``, and while the rows are in a cache the tile's share of ``Mᵀt``. The
other one adds the shares up to ``y``. ``v_first`` begins with the second kind, which then adds up the
weight's own rows with ``u`` as factors, and ends with ``t``: σ = ‖t‖. All layers take each half-step in
one launch, so that one iteration is two launches, and the division the third.

A share is a multiple of a power of two near the tile's largest ``|t|``, so that no product leaves the
range of float where stock's do not. Norms are in float64.

Alternatives: rows that stay in registers between ``t`` and their share are read once from the caches
too, and what the CUDA kernels do, but the widest rows take half of a register file; ``y`` added up by
the last program of a layer saves a launch and makes one program do it alone.
"""

import triton
import triton.language as tl

from .device import (
    CHUNKS,
    COLUMN_SUMS,
    COLUMNS,
    HALF_STEPS,
    INNER,
    ROW_SUMS,
    ROW_TILES,
    ROWS,
    SAVED,
    SCALES,
    SHARES,
    SIGMA,
    T_PLACE,
    TILE,
    U_STRIDE,
    UPDATE,
    V_FIRST,
    V_STRIDE,
    WIDTH,
    Y_PLACE,
    are_vectors,
    as_pointer,
    divide,
    divisor,
    in_memory,
    in_v,
    norm,
    total,
)
from .tables import CHUNK_SIZES, TILE_SIZES

KINDS = tl.constexpr(len(TILE_SIZES))
TILES = tl.constexpr(TILE_SIZES)
CHUNK = tl.constexpr(CHUNK_SIZES)

# The addresses of a layer in a call.
POINTERS = tl.constexpr(4)
WEIGHT, OUTPUT, LEFT, RIGHT = (tl.constexpr(place) for place in range(4))


@triton.jit
def power_of_two(x, A: tl.constexpr):
    """Return the power of two at or below ``x ≥ 0``, its exponent alone; at least the smallest normal one."""
    if A == tl.float32:
        bits = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)
    else:
        bits = tl.maximum(x.to(tl.int64, bitcast=True) & 0x7FF0000000000000, 0x0010000000000000)
    return bits.to(A, bitcast=True)


@triton.jit
def read_rows(
    facts, addresses, orders, vectors, sums, tile, step,
    T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """``t = M v`` of a tile of rows, its share of ‖t‖² (of ⟨u, t⟩ without an update) and of ``Mᵀt``."""
    rows = tl.load(facts + ROWS)
    columns = tl.load(facts + COLUMNS)
    inner = tl.load(facts + INNER)
    weight = as_pointer(addresses + WEIGHT, T, VECTORS)
    if VECTORS:
        inner = tl.multiple_of(inner, LANES)
        columns = tl.multiple_of(columns.to(tl.int32), LANES)
    r = tl.cast(tile, tl.int64) * R + tl.arange(0, R)
    there = r < rows
    first = weight + r * inner
    initial = step == 0
    v_given = as_pointer(addresses + RIGHT, T)
    v_stride = tl.load(facts + V_STRIDE)
    y = vectors + tl.load(facts + Y_PLACE)
    length = tl.full([], 1.0, A)
    if not initial:
        length = divisor(facts, sums, COLUMN_SUMS, CHUNKS).to(A)

    products = tl.zeros([R, C], A)
    for begin in range(0, columns, C):
        c = begin + tl.arange(0, C)
        exist = c < columns
        mask = there[:, None] & exist[None, :]
        offset = in_memory(c, rows, inner, VECTORS)
        x = tl.load(first[:, None] + offset[None, :], mask=mask, other=0.0).to(A)
        if initial:
            place = in_v(facts, orders, c, exist)
            v = tl.load(v_given + place * v_stride, mask=exist, other=0.0).to(A)
        else:
            v = divide(tl.load(y + c, mask=exist, other=0.0), length, A)
        products += x * v[None, :]
    t = tl.sum(products, axis=1)
    tl.store(vectors + tl.load(facts + T_PLACE) + r, t, mask=there)

    other = t
    if tl.load(facts + UPDATE) == 0:
        u = as_pointer(addresses + LEFT, T) + r * tl.load(facts + U_STRIDE)
        other = tl.load(u, mask=there, other=0.0).to(A)
    square = tl.sum(t.to(tl.float64) * other.to(tl.float64), axis=0)
    tl.store(sums + tl.load(facts + ROW_SUMS) + tile, square)

    # The last half-step of v_first, and the only one without an update, need no shares.
    if step + 1 < tl.load(facts + HALF_STEPS):
        scale = power_of_two(tl.max(tl.abs(t), axis=0), A)
        tl.store(vectors + tl.load(facts + SCALES) + tile, scale)
        factor = divide(t, scale, A)
        share = vectors + tl.load(facts + SHARES) + tile * tl.load(facts + COLUMNS)
        last = (columns - 1) // C * C
        for back in range(0, columns, C):  # backwards: what was read last is the nearest
            c = last - back + tl.arange(0, C)
            exist = c < columns
            mask = there[:, None] & exist[None, :]
            offset = in_memory(c, rows, inner, VECTORS)
            x = tl.load(first[:, None] + offset[None, :], mask=mask, other=0.0).to(A)
            tl.store(share + c, tl.sum(x * factor[:, None], axis=0), mask=exist)


@triton.jit
def add_rows(
    facts, addresses, c, exist, T: tl.constexpr, A: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Return ``Mᵀu`` of columns ``c``, with u as it was given."""
    rows = tl.load(facts + ROWS)
    inner = tl.load(facts + INNER)
    u = as_pointer(addresses + LEFT, T)
    u_stride = tl.load(facts + U_STRIDE)
    column = as_pointer(addresses + WEIGHT, T) + in_memory(c, rows, inner, False)
    products = tl.zeros([R, C], A)
    for begin in range(0, rows, R):
        r = begin + tl.arange(0, R).to(tl.int64)
        there = r < rows
        factor = tl.load(u + r * u_stride, mask=there, other=0.0).to(A)
        mask = there[:, None] & exist[None, :]
        x = tl.load(column[None, :] + (r * inner)[:, None], mask=mask, other=0.0).to(A)
        products += factor[:, None] * x
    return tl.sum(products, axis=0)


@triton.jit
def add_shares(facts, vectors, sums, c, exist, A: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Return ``Mᵀu`` of columns ``c``, from the shares of the tiles of rows."""
    tiles = tl.load(facts + ROW_TILES)
    columns = tl.load(facts + COLUMNS)
    scales = vectors + tl.load(facts + SCALES)
    column = vectors + tl.load(facts + SHARES) + c
    length = divisor(facts, sums, ROW_SUMS, ROW_TILES)
    products = tl.zeros([R, C], A)
    for begin in range(0, tiles, R):
        r = begin + tl.arange(0, R).to(tl.int64)
        there = r < tiles
        scale = tl.load(scales + r, mask=there, other=0.0)
        factor = (scale.to(tl.float64) / length).to(A)
        mask = there[:, None] & exist[None, :]
        x = tl.load(column[None, :] + (r * columns)[:, None], mask=mask, other=0.0)
        products += factor[:, None] * x
    return tl.sum(products, axis=0)


@triton.jit
def add_columns(
    facts, addresses, vectors, sums, chunk, step,
    T: tl.constexpr, A: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """``y = Mᵀu`` of a chunk of columns, and its share of ‖y‖²."""
    c = tl.cast(chunk, tl.int64) * C + tl.arange(0, C)
    exist = c < tl.load(facts + COLUMNS)
    if step == 0:  # v_first begins
        y = add_rows(facts, addresses, c, exist, T, A, R, C)
    else:
        y = add_shares(facts, vectors, sums, c, exist, A, R, C)
    tl.store(vectors + tl.load(facts + Y_PLACE) + c, y, mask=exist)
    square = tl.sum(y.to(tl.float64) * y.to(tl.float64), axis=0)
    tl.store(sums + tl.load(facts + COLUMN_SUMS) + chunk, square)


@triton.jit(do_not_specialize=["step"])
def half_step_kernel(
    layers, orders, tiles, pointers, vectors, sums, step,
    T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One half-step of all layers whose iterations are not over."""
    layer = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    facts = layers + layer * WIDTH
    addresses = pointers + layer * POINTERS
    if step < tl.load(facts + HALF_STEPS):
        is_of_rows = (step + tl.load(facts + V_FIRST)) % 2 == 0
        as_vectors = are_vectors(facts, addresses, 1)
        kind = tl.load(facts + TILE)
        for K in tl.static_range(KINDS):
            if kind == K:
                if not is_of_rows:
                    add_columns(facts, addresses, vectors, sums, tile, step,
                                T, A, CHUNK[K][0], CHUNK[K][1])  # fmt: skip
                elif as_vectors:
                    read_rows(facts, addresses, orders, vectors, sums, tile, step,
                              T, A, LANES, TILES[K][0], TILES[K][1], True)  # fmt: skip
                else:
                    read_rows(facts, addresses, orders, vectors, sums, tile, step,
                              T, A, LANES, TILES[K][0], TILES[K][1] // 2, False)  # fmt: skip


@triton.jit
def find_sigma(facts, sums):
    """Return σ: ``n·n / max(n, eps)`` of the norm that the last half-step has left, or ⟨u, t⟩."""
    if tl.load(facts + UPDATE) == 0:
        sigma = total(sums + tl.load(facts + ROW_SUMS), tl.load(facts + ROW_TILES))
    elif tl.load(facts + V_FIRST) != 0:
        n = norm(facts, sums, ROW_SUMS, ROW_TILES)
        sigma = n * n / divisor(facts, sums, ROW_SUMS, ROW_TILES)
    else:
        n = norm(facts, sums, COLUMN_SUMS, CHUNKS)
        sigma = n * n / divisor(facts, sums, COLUMN_SUMS, CHUNKS)
    return sigma


@triton.jit
def divide_rows(
    facts, addresses, tile, sigma,
    T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """``Y = W / σ`` of a tile of rows, or ``Y = W`` where σ is zero."""
    rows = tl.load(facts + ROWS)
    columns = tl.load(facts + COLUMNS)
    inner = tl.load(facts + INNER)
    weight = as_pointer(addresses + WEIGHT, T, VECTORS)
    output = as_pointer(addresses + OUTPUT, T, VECTORS)
    if VECTORS:
        inner = tl.multiple_of(inner, LANES)
        columns = tl.multiple_of(columns.to(tl.int32), LANES)
    by = tl.where(sigma == 0, 1.0, sigma).to(A)
    r = tl.cast(tile, tl.int64) * R + tl.arange(0, R)
    there = r < rows
    first = r * inner
    for begin in range(0, columns, C):
        c = begin + tl.arange(0, C)
        mask = there[:, None] & (c < columns)[None, :]
        offset = first[:, None] + in_memory(c, rows, inner, VECTORS)[None, :]
        x = tl.load(weight + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(A)
        tl.store(output + offset, divide(x, by, A).to(T), mask=mask)


@triton.jit
def write_vectors(
    facts, addresses, orders, vectors, sums, saved, tile, sigma,
    T: tl.constexpr, A: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The u of a tile of rows and, of n tiles, every n-th part of v: saved, and into their buffers.

    Where σ is zero there is nothing to divide by, and the vectors stay as they were.
    """
    rows = tl.load(facts + ROWS)
    columns = tl.load(facts + COLUMNS)
    saved_u = saved + tl.load(facts + SAVED)
    keep = (tl.load(facts + UPDATE) == 0) | (sigma == 0)

    r = tl.cast(tile, tl.int64) * R + tl.arange(0, R)
    there = r < rows
    buffer = as_pointer(addresses + LEFT, T) + r * tl.load(facts + U_STRIDE)
    if keep:
        u = tl.load(buffer, mask=there, other=0.0).to(A)
    else:
        t = tl.load(vectors + tl.load(facts + T_PLACE) + r, mask=there, other=0.0)
        u = divide(t, divisor(facts, sums, ROW_SUMS, ROW_TILES).to(A), A)
        tl.store(buffer, u.to(T), mask=there)
    tl.store(saved_u + r, u, mask=there)

    v_buffer = as_pointer(addresses + RIGHT, T)
    v_stride = tl.load(facts + V_STRIDE)
    y = vectors + tl.load(facts + Y_PLACE)
    for begin in range(tl.cast(tile, tl.int64) * C, columns, tl.load(facts + ROW_TILES) * C):
        c = begin + tl.arange(0, C)
        exist = c < columns
        place = in_v(facts, orders, c, exist)
        if keep:
            v = tl.load(v_buffer + place * v_stride, mask=exist, other=0.0).to(A)
        else:
            length = divisor(facts, sums, COLUMN_SUMS, CHUNKS).to(A)
            v = divide(tl.load(y + c, mask=exist, other=0.0), length, A)
            tl.store(v_buffer + place * v_stride, v.to(T), mask=exist)
        tl.store(saved_u + rows + place, v, mask=exist)


@triton.jit(do_not_specialize_on_alignment=["saved", "sigmas"])
def divide_kernel(
    layers, orders, tiles, pointers, vectors, sums, saved, sigmas,
    T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``Y = W / σ`` of all layers, their σ, and u and v as they were when it was taken."""
    layer = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    facts = layers + layer * WIDTH
    addresses = pointers + layer * POINTERS
    sigma = find_sigma(facts, sums).to(A)
    if tile == 0:
        tl.store(sigmas + tl.load(facts + SIGMA), sigma)
    as_vectors = are_vectors(facts, addresses, 2)
    kind = tl.load(facts + TILE)
    for K in tl.static_range(KINDS):
        if kind == K:
            if as_vectors:
                divide_rows(facts, addresses, tile, sigma,
                            T, A, LANES, TILES[K][0], TILES[K][1], True)  # fmt: skip
            else:
                divide_rows(facts, addresses, tile, sigma,
                            T, A, LANES, TILES[K][0], TILES[K][1] // 2, False)  # fmt: skip
            write_vectors(facts, addresses, orders, vectors, sums, saved, tile, sigma,
                          T, A, TILES[K][0], TILES[K][1])  # fmt: skip
