"""The forward of many layers: half-steps of the power iteration, and then ``Y = W·c / σ``.

With ``t = M v`` an iteration of ``u_first`` is ``u = t/‖t‖``, ``y = Mᵀu``, ``v = y/‖y‖``, and σ = ‖y‖. One
half-step reads tiles of rows: ``t``, and while the rows are in a cache the tile's share of ``Mᵀt``. The
other one adds the shares up to ``y``. ``v_first`` begins with the second kind, which then adds up the
weight's own rows with ``u`` as factors, and ends with ``t``: σ = ‖t‖. All layers take each half-step in
one launch, so that one iteration is two launches, and the division the third.

A layer with a tolerance stops where the two norms of an iteration say so: the programs of later ones
find that in the sums of the iteration before theirs, pass them on, and leave all else as it is. Sums
have a slot for even iterations and one for odd ones, so that none is written where one looks.

A share is a multiple of a power of two near the tile's largest ``|t|``, so that no product leaves the
range of float where stock's do not. Norms are in float64.

Where σ comes out zero or not finite, the program of a layer's first tile alone decides what becomes of u
and v, by the rules of ``reference.py``. Only then is the weight read once more.

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
    EPS,
    HALF_STEPS,
    INNER,
    MADE,
    ROW_SUMS,
    ROW_TILES,
    ROWS,
    SAVED,
    SCALES,
    SHARES,
    SIGMA,
    SLACK,
    T_PLACE,
    TARGET,
    TILE,
    TOL,
    U_STRIDE,
    UPDATE,
    V_FIRST,
    V_STRIDE,
    WIDE_VECTORS,
    WIDTH,
    Y_PLACE,
    are_vectors,
    as_pointer,
    at_least,
    divide,
    divisor,
    in_memory,
    in_v,
    is_left_alone,
    load_vector,
    number,
    store_vector,
    total_of,
)
from .tables import CHUNK_SIZES, TILE_SIZES

KINDS = tl.constexpr(len(TILE_SIZES))
TILES = tl.constexpr(TILE_SIZES)
CHUNK = tl.constexpr(CHUNK_SIZES)

# The addresses of a layer in a call.
POINTERS = tl.constexpr(4)
WEIGHT, OUTPUT, LEFT, RIGHT = (tl.constexpr(place) for place in range(4))
# Without an update the slots of the sums over rows.
DOT, U_SQUARE, V_SQUARE = (tl.constexpr(slot) for slot in range(3))


@triton.jit
def slot_of(step):
    """Return the slot of the sums that a half-step leaves."""
    return step // 2 % 2


@triton.jit
def find_gap(facts, sums, slot):
    """Return ``after² − before²`` and ``after²`` of the two norms of an iteration, ``before`` the first."""
    rows = total_of(facts, sums, slot, ROW_SUMS, ROW_TILES)
    columns = total_of(facts, sums, slot, COLUMN_SUMS, CHUNKS)
    starts_with_columns = tl.load(facts + V_FIRST) != 0
    before = tl.where(starts_with_columns, columns, rows)
    after = tl.where(starts_with_columns, rows, columns)
    return after - before, after


@triton.jit
def has_converged(facts, sums, step):
    """Return as a number whether the iteration before this half-step's was the last one to make."""
    result = 0
    tol = number(facts, TOL)
    if (step >= 2) & (tol > 0):
        gap, after = find_gap(facts, sums, slot_of(step - 2))
        result = (gap <= tol * tol * after).to(tl.int32)
    return result


@triton.jit
def keep_sum(facts, sums, tile, slot, PLACE: tl.constexpr, COUNT: tl.constexpr):
    """Copy a program's sum from the other slot to this one."""
    count = tl.load(facts + COUNT)
    own = sums + tl.load(facts + PLACE) + tile
    tl.store(own + slot * count, tl.load(own + (1 - slot) * count))


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
    v_given = tl.load(addresses + RIGHT)
    v_stride = tl.load(facts + V_STRIDE)
    is_wide = tl.load(facts + WIDE_VECTORS)
    y = vectors + tl.load(facts + Y_PLACE)
    length = tl.full([], 1.0, A)
    if not initial:
        length = divisor(facts, sums, slot_of(step - 1), COLUMN_SUMS, CHUNKS).to(A)

    products = tl.zeros([R, C], A)
    for begin in range(0, columns, C):
        c = begin + tl.arange(0, C)
        exist = c < columns
        mask = there[:, None] & exist[None, :]
        offset = in_memory(c, rows, inner, VECTORS)
        x = tl.load(first[:, None] + offset[None, :], mask=mask, other=0.0).to(A)
        if initial:
            place = in_v(facts, orders, c, exist)
            v = load_vector(v_given, place * v_stride, is_wide, exist, T, A)
        else:
            v = divide(tl.load(y + c, mask=exist, other=0.0), length, A)
        products += x * v[None, :]
    t = tl.sum(products, axis=1)
    tl.store(vectors + tl.load(facts + T_PLACE) + r, t, mask=there)

    other = t
    if tl.load(facts + UPDATE) == 0:
        place = r * tl.load(facts + U_STRIDE)
        other = load_vector(tl.load(addresses + LEFT), place, is_wide, there, T, A)
    square = tl.sum(t.to(tl.float64) * other.to(tl.float64), axis=0)
    slot = slot_of(step) * tl.load(facts + ROW_TILES)
    tl.store(sums + tl.load(facts + ROW_SUMS) + slot + tile, square)

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
    u = tl.load(addresses + LEFT)
    u_stride = tl.load(facts + U_STRIDE)
    is_wide = tl.load(facts + WIDE_VECTORS)
    column = as_pointer(addresses + WEIGHT, T) + in_memory(c, rows, inner, False)
    products = tl.zeros([R, C], A)
    for begin in range(0, rows, R):
        r = begin + tl.arange(0, R).to(tl.int64)
        there = r < rows
        factor = load_vector(u, r * u_stride, is_wide, there, T, A)
        mask = there[:, None] & exist[None, :]
        x = tl.load(column[None, :] + (r * inner)[:, None], mask=mask, other=0.0).to(A)
        products += factor[:, None] * x
    return tl.sum(products, axis=0)


@triton.jit
def add_shares(
    facts, vectors, sums, slot, c, exist, A: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Return ``Mᵀu`` of columns ``c``, from the shares of the tiles of rows."""
    tiles = tl.load(facts + ROW_TILES)
    columns = tl.load(facts + COLUMNS)
    scales = vectors + tl.load(facts + SCALES)
    column = vectors + tl.load(facts + SHARES) + c
    length = divisor(facts, sums, slot, ROW_SUMS, ROW_TILES)
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
        y = add_shares(facts, vectors, sums, slot_of(step - 1), c, exist, A, R, C)
    tl.store(vectors + tl.load(facts + Y_PLACE) + c, y, mask=exist)
    square = tl.sum(y.to(tl.float64) * y.to(tl.float64), axis=0)
    slot = slot_of(step) * tl.load(facts + CHUNKS)
    tl.store(sums + tl.load(facts + COLUMN_SUMS) + slot + chunk, square)
    if chunk == 0:
        tl.store(sums + tl.load(facts + MADE), (step // 2 + 1).to(tl.float64))


@triton.jit
def square_of(address, stride, count, is_wide, tile, tiles, T: tl.constexpr, A: tl.constexpr):
    """Return of so many tiles one's share of ‖u‖² or ‖v‖², as it was given."""
    square = tl.zeros([128], tl.float64)
    for begin in range(tl.cast(tile, tl.int64) * 128, count, tiles * 128):
        i = begin + tl.arange(0, 128)
        exist = i < count
        x = load_vector(address, i * stride, is_wide, exist, T, A).to(tl.float64)
        square += x * x
    return tl.sum(square, axis=0)


@triton.jit
def add_squares(facts, addresses, sums, tile, T: tl.constexpr, A: tl.constexpr):
    """A tile's shares of ‖u‖² and ‖v‖², which without an update may be off 1."""
    tiles = tl.load(facts + ROW_TILES)
    is_wide = tl.load(facts + WIDE_VECTORS)
    u_stride, v_stride = tl.load(facts + U_STRIDE), tl.load(facts + V_STRIDE)
    rows, columns = tl.load(facts + ROWS), tl.load(facts + COLUMNS)
    u = square_of(tl.load(addresses + LEFT), u_stride, rows, is_wide, tile, tiles, T, A)
    v = square_of(tl.load(addresses + RIGHT), v_stride, columns, is_wide, tile, tiles, T, A)
    own = sums + tl.load(facts + ROW_SUMS) + tile
    tl.store(own + U_SQUARE * tiles, u)
    tl.store(own + V_SQUARE * tiles, v)


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
    is_of_rows = (step + tl.load(facts + V_FIRST)) % 2 == 0
    if step >= tl.load(facts + HALF_STEPS):
        pass
    elif has_converged(facts, sums, step) != 0:
        if is_of_rows:
            keep_sum(facts, sums, tile, slot_of(step), ROW_SUMS, ROW_TILES)
        else:
            keep_sum(facts, sums, tile, slot_of(step), COLUMN_SUMS, CHUNKS)
    else:
        if tl.load(facts + UPDATE) == 0:
            add_squares(facts, addresses, sums, tile, T, A)
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
def is_usable(square):
    """Return whether a vector with this square is neither zero nor has it NaN or infinity."""
    return (square > 0) & (square < float("inf"))


@triton.jit
def find_sigma(facts, sums, A: tl.constexpr):
    """Return σ, and ‖u‖ and ‖v‖ as they were given if these are off 1 by more than rounding, else 1.

    σ is ``n·n / max(n, eps)`` of the norm that the last iteration has ended with. Without an update it is
    ⟨u, t⟩, over the norms that are off; NaN where a vector is zero or not finite.
    """
    u_norm = tl.full([], 1.0, tl.float64)
    v_norm = tl.full([], 1.0, tl.float64)
    if tl.load(facts + UPDATE) == 0:
        sigma = total_of(facts, sums, DOT, ROW_SUMS, ROW_TILES)
        u_square = total_of(facts, sums, U_SQUARE, ROW_SUMS, ROW_TILES)
        v_square = total_of(facts, sums, V_SQUARE, ROW_SUMS, ROW_TILES)
        square = u_square * v_square
        if not is_usable(square):
            sigma = tl.full([], float("nan"), tl.float64)
        elif tl.abs(square - 1.0) > number(facts, SLACK):
            sigma /= tl.sqrt(square)
            u_norm = tl.sqrt(u_square)
            v_norm = tl.sqrt(v_square)
    else:
        slot = slot_of(tl.load(facts + HALF_STEPS) - 1)
        _, square = find_gap(facts, sums, slot)
        n = tl.sqrt(square)
        sigma = n * n / at_least(n, number(facts, EPS))
    return sigma.to(A), u_norm.to(A), v_norm.to(A)


@triton.jit
def start_entries(i, alternating):
    """Return entries of the vector to restart from, before the division by its norm."""
    x = 1.0 + (40503 * i % 65536).to(tl.float64) / 65536
    return tl.where(alternating & (i % 2 == 0), -x, x)


@triton.jit
def is_zero_weight(address, count, T: tl.constexpr):
    """Return as a number whether a weight of so many elements is zero; stops at one that is not.

    Programs that write an output over its weight write what is there: σ is zero.
    """
    result = 1
    begin = tl.zeros([], tl.int64)
    while (begin < count) & (result != 0):
        i = begin + tl.arange(0, 1024)
        x = tl.load(address.to(tl.pointer_type(T)) + i, mask=i < count, other=0.0).to(tl.float64)
        result = 1 - tl.max((x != 0).to(tl.int32), axis=0)
        begin += 1024
    return result


@triton.jit
def leave_vector(address, stride, count, is_wide, restart, saved, T: tl.constexpr, A: tl.constexpr):
    """Save u or v as it is, or put the vector to restart from into it and save that."""
    i = tl.arange(0, 128).to(tl.int64)
    first = tl.max(load_vector(address, i * 0, is_wide, i < 1, T, A), axis=0)
    squares = tl.zeros([128], tl.float64)
    for begin in range(0, count, 128):
        x = start_entries(begin + i, False)
        squares += tl.where(begin + i < count, x * x, 0.0)
    norm = tl.sqrt(tl.sum(squares, axis=0))
    for begin in range(0, count, 128):
        exist = begin + i < count
        place = (begin + i) * stride
        if restart:
            x = (start_entries(begin + i, first > 0) / norm).to(A)
            store_vector(address, place, x, is_wide, exist, T, A)
        else:
            x = load_vector(address, place, is_wide, exist, T, A)
        tl.store(saved + begin + i, x, mask=exist)


@triton.jit
def keep_or_restart(facts, addresses, saved, sigma, T: tl.constexpr, A: tl.constexpr):
    """The vectors after a forward that found no σ: kept where they are of use and the weight has none."""
    is_wide = tl.load(facts + WIDE_VECTORS)
    u_stride, v_stride = tl.load(facts + U_STRIDE), tl.load(facts + V_STRIDE)
    rows, columns = tl.load(facts + ROWS), tl.load(facts + COLUMNS)
    u, v = tl.load(addresses + LEFT), tl.load(addresses + RIGHT)
    u_square = square_of(u, u_stride, rows, is_wide, 0, 1, T, A)
    v_square = square_of(v, v_stride, columns, is_wide, 0, 1, T, A)
    restart = ~(is_usable(u_square) & is_usable(v_square))
    if sigma == 0:
        restart = restart | (is_zero_weight(tl.load(addresses + WEIGHT), rows * columns, T) == 0)
    saved_u = saved + tl.load(facts + SAVED)
    leave_vector(u, u_stride, rows, is_wide, restart, saved_u, T, A)
    leave_vector(v, v_stride, columns, is_wide, restart, saved_u + rows, T, A)


@triton.jit
def write_convergence(facts, sums, convergence, count, A: tl.constexpr):
    """The residual of the last iteration that was made, NaN if none was asked for; how many were made."""
    residual = tl.full([], float("nan"), tl.float64)
    made = tl.full([], 0.0, tl.float64)
    if tl.load(facts + UPDATE) != 0:
        made = tl.load(sums + tl.load(facts + MADE))
        if number(facts, TOL) > 0:
            gap, after = find_gap(facts, sums, slot_of(tl.load(facts + HALF_STEPS) - 1))
            residual = tl.where(gap <= 0, 0.0, tl.sqrt(gap / after))
    place = convergence + tl.load(facts + SIGMA)
    tl.store(place, residual.to(A))
    tl.store(place + count, made.to(A))


@triton.jit
def divide_rows(
    facts, addresses, tile, sigma,
    T: tl.constexpr, RESULT_T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """``Y = W / (σ/c)`` of a tile of rows, or ``Y = W`` where that is left alone."""
    rows = tl.load(facts + ROWS)
    columns = tl.load(facts + COLUMNS)
    inner = tl.load(facts + INNER)
    weight = as_pointer(addresses + WEIGHT, T, VECTORS)
    output = as_pointer(addresses + OUTPUT, RESULT_T, VECTORS)
    if VECTORS:
        inner = tl.multiple_of(inner, LANES)
        columns = tl.multiple_of(columns.to(tl.int32), LANES)
    by = tl.where(
        is_left_alone(facts, sigma), 1.0, sigma.to(tl.float64) / number(facts, TARGET)
    ).to(A)
    r = tl.cast(tile, tl.int64) * R + tl.arange(0, R)
    there = r < rows
    first = r * inner
    for begin in range(0, columns, C):
        c = begin + tl.arange(0, C)
        mask = there[:, None] & (c < columns)[None, :]
        offset = first[:, None] + in_memory(c, rows, inner, VECTORS)[None, :]
        x = tl.load(weight + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(A)
        tl.store(output + offset, divide(x, by, A).to(RESULT_T), mask=mask)


@triton.jit
def write_vectors(
    facts, addresses, orders, vectors, sums, saved, tile, u_norm, v_norm,
    T: tl.constexpr, A: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The u of a tile of rows and, of n tiles, every n-th part of v: saved, and into their buffers."""
    rows = tl.load(facts + ROWS)
    columns = tl.load(facts + COLUMNS)
    is_wide = tl.load(facts + WIDE_VECTORS)
    saved_u = saved + tl.load(facts + SAVED)
    keep = tl.load(facts + UPDATE) == 0
    if not keep:
        slot = slot_of(tl.load(facts + HALF_STEPS) - 1)
        u_norm = divisor(facts, sums, slot, ROW_SUMS, ROW_TILES).to(A)
        v_norm = divisor(facts, sums, slot, COLUMN_SUMS, CHUNKS).to(A)

    r = tl.cast(tile, tl.int64) * R + tl.arange(0, R)
    there = r < rows
    u_buffer = tl.load(addresses + LEFT)
    u_place = r * tl.load(facts + U_STRIDE)
    if keep:
        u = divide(load_vector(u_buffer, u_place, is_wide, there, T, A), u_norm, A)
    else:
        t = tl.load(vectors + tl.load(facts + T_PLACE) + r, mask=there, other=0.0)
        u = divide(t, u_norm, A)
        store_vector(u_buffer, u_place, u, is_wide, there, T, A)
    tl.store(saved_u + r, u, mask=there)

    v_buffer = tl.load(addresses + RIGHT)
    v_stride = tl.load(facts + V_STRIDE)
    y = vectors + tl.load(facts + Y_PLACE)
    for begin in range(tl.cast(tile, tl.int64) * C, columns, tl.load(facts + ROW_TILES) * C):
        c = begin + tl.arange(0, C)
        exist = c < columns
        place = in_v(facts, orders, c, exist)
        if keep:
            v = load_vector(v_buffer, place * v_stride, is_wide, exist, T, A)
            v = divide(v, v_norm, A)
        else:
            v = divide(tl.load(y + c, mask=exist, other=0.0), v_norm, A)
            store_vector(v_buffer, place * v_stride, v, is_wide, exist, T, A)
        tl.store(saved_u + rows + place, v, mask=exist)


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["saved", "sigmas", "convergence"],
)
def divide_kernel(
    layers, orders, tiles, pointers, vectors, sums, saved, sigmas, convergence, count,
    T: tl.constexpr, RESULT_T: tl.constexpr, A: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``Y = W·c / σ`` of all layers, their σ, and u and v as they were when it was taken.

    ``count`` layers of a call tell how far their iterations went; none does if that is 0.
    """
    layer = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    facts = layers + layer * WIDTH
    addresses = pointers + layer * POINTERS
    sigma, u_norm, v_norm = find_sigma(facts, sums, A)
    is_lost = (tl.load(facts + UPDATE) != 0) & ((sigma == 0) | ~(tl.abs(sigma) < float("inf")))
    if tile == 0:
        tl.store(sigmas + tl.load(facts + SIGMA), sigma)
        if count > 0:
            write_convergence(facts, sums, convergence, count, A)
    as_vectors = are_vectors(facts, addresses, 2)
    kind = tl.load(facts + TILE)
    for K in tl.static_range(KINDS):
        if kind == K:
            if as_vectors:
                divide_rows(facts, addresses, tile, sigma,
                            T, RESULT_T, A, LANES, TILES[K][0], TILES[K][1], True)  # fmt: skip
            else:
                divide_rows(facts, addresses, tile, sigma,
                            T, RESULT_T, A, LANES, TILES[K][0], TILES[K][1] // 2, False)  # fmt: skip
            if is_lost:
                if tile == 0:
                    keep_or_restart(facts, addresses, saved, sigma, T, A)
            else:
                write_vectors(facts, addresses, orders, vectors, sums, saved, tile,
                              u_norm, v_norm, T, A, TILES[K][0], TILES[K][1])  # fmt: skip
