"""What the Triton kernels share: the facts of a layer, exact division, norms, the places of elements.

``T`` is the dtype of what is read of a layer, ``RESULT_T`` of what is written, and ``A`` the one to compute
in: float64 for float64, else float32. They differ where float32 weights have outputs of half precision.
``facts`` points to the row of a layer in the table of :mod:`.tables`.
"""

import triton
import triton.language as tl

from .tables import FIELDS

WIDTH = tl.constexpr(len(FIELDS))
ROWS = tl.constexpr(FIELDS.index("rows"))
COLUMNS = tl.constexpr(FIELDS.index("columns"))
INNER = tl.constexpr(FIELDS.index("inner"))
TILE = tl.constexpr(FIELDS.index("tile"))
CONTIGUOUS = tl.constexpr(FIELDS.index("contiguous"))
EPS = tl.constexpr(FIELDS.index("eps"))
TOL = tl.constexpr(FIELDS.index("tol"))
TARGET = tl.constexpr(FIELDS.index("target"))
SOFT = tl.constexpr(FIELDS.index("soft"))
DETACH_SIGMA = tl.constexpr(FIELDS.index("detach_sigma"))
WIDE_VECTORS = tl.constexpr(FIELDS.index("wide_vectors"))
SLACK = tl.constexpr(FIELDS.index("slack"))
U_STRIDE = tl.constexpr(FIELDS.index("u_stride"))
V_STRIDE = tl.constexpr(FIELDS.index("v_stride"))
ORDER = tl.constexpr(FIELDS.index("order"))
SAVED = tl.constexpr(FIELDS.index("saved"))
SIGMA = tl.constexpr(FIELDS.index("sigma"))
HALF_STEPS = tl.constexpr(FIELDS.index("half_steps"))
UPDATE = tl.constexpr(FIELDS.index("update"))
V_FIRST = tl.constexpr(FIELDS.index("v_first"))
T_PLACE = tl.constexpr(FIELDS.index("t"))
Y_PLACE = tl.constexpr(FIELDS.index("y"))
SHARES = tl.constexpr(FIELDS.index("shares"))
SCALES = tl.constexpr(FIELDS.index("scales"))
ROW_SUMS = tl.constexpr(FIELDS.index("row_sums"))
ROW_TILES = tl.constexpr(FIELDS.index("row_tiles"))
COLUMN_SUMS = tl.constexpr(FIELDS.index("column_sums"))
CHUNKS = tl.constexpr(FIELDS.index("chunks"))
MADE = tl.constexpr(FIELDS.index("made"))


@triton.jit
def as_pointer(address, dtype: tl.constexpr, VECTORS: tl.constexpr = False):
    """Return the pointer to elements of ``dtype`` that is kept as a number at ``address``.

    The compiler is told here that it points to vectors: of what a function returns it forgets that.
    """
    result = tl.load(address).to(tl.pointer_type(dtype))
    if VECTORS:
        result = tl.multiple_of(result, 16)
    return result


@triton.jit
def are_vectors(facts, addresses, COUNT: tl.constexpr):
    """Return whether the rows of a layer's first ``COUNT`` tensors are whole vectors of 16 bytes."""
    bits = tl.load(addresses)
    for i in tl.static_range(1, COUNT):
        bits |= tl.load(addresses + i)
    return (bits % 16 == 0) & (tl.load(facts + CONTIGUOUS) != 0)


@triton.jit
def divide(x, y, A: tl.constexpr):
    """Return ``x / y`` rounded as IEEE wants it; Triton's own division of float32 is not."""
    if A == tl.float32:
        quotient = tl.div_rn(x, y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def number(facts, PLACE: tl.constexpr):
    """Return a fact that is a number in float64."""
    return tl.load(facts + PLACE).to(tl.float64, bitcast=True)


@triton.jit
def is_left_alone(facts, sigma):
    """Return whether a weight is its output: where σ, as the caller sees it, is zero or within a bound."""
    is_within = (tl.load(facts + SOFT) != 0) & (sigma.to(tl.float64) <= number(facts, TARGET))
    return (sigma == 0) | is_within


@triton.jit
def total(sums, count):
    """Return the sum of what programs of earlier launches have left, always in one order."""
    result = tl.zeros([128], tl.float64)
    for begin in range(0, count, 128):
        i = begin + tl.arange(0, 128)
        exist = i < count
        result += tl.load(sums + i, mask=exist, other=0.0)
    return tl.sum(result, axis=0)


@triton.jit
def at_least(x, bound):
    """Return the larger one; a NaN stays."""
    return tl.where(x < bound, bound, x)


@triton.jit
def total_of(facts, sums, slot, PLACE: tl.constexpr, COUNT: tl.constexpr):
    """Return the sum of what programs have left in a slot, such as ‖t‖²."""
    count = tl.load(facts + COUNT)
    return total(sums + tl.load(facts + PLACE) + slot * count, count)


@triton.jit
def divisor(facts, sums, slot, PLACE: tl.constexpr, COUNT: tl.constexpr):
    """Return ``max(‖t‖, eps)`` or ``max(‖y‖, eps)`` in float64."""
    return at_least(tl.sqrt(total_of(facts, sums, slot, PLACE, COUNT)), number(facts, EPS))


@triton.jit
def in_memory(column, rows, inner, VECTORS: tl.constexpr):
    """Return how far a column's element in the first row is from the first element of all."""
    if VECTORS:
        offset = column
    else:
        offset = column // inner * (rows * inner) + column % inner
    return offset


@triton.jit
def load_vector(address, place, is_wide, mask, T: tl.constexpr, A: tl.constexpr):
    """Return elements of u or v as they were given: in ``A`` where ``is_wide``, else in ``T``."""
    if T == A:
        x = tl.load(address.to(tl.pointer_type(T)) + place, mask=mask, other=0.0)
    elif is_wide != 0:
        x = tl.load(address.to(tl.pointer_type(A)) + place, mask=mask, other=0.0)
    else:
        x = tl.load(address.to(tl.pointer_type(T)) + place, mask=mask, other=0.0).to(A)
    return x


@triton.jit
def store_vector(address, place, x, is_wide, mask, T: tl.constexpr, A: tl.constexpr):
    """Write elements of u or v into their buffer."""
    if T == A:
        tl.store(address.to(tl.pointer_type(T)) + place, x, mask=mask)
    elif is_wide != 0:
        tl.store(address.to(tl.pointer_type(A)) + place, x, mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(T)) + place, x.to(T), mask=mask)


@triton.jit
def in_v(facts, orders, column, mask):
    """Return the places of columns in v."""
    place = column.to(tl.int64)
    order = tl.load(facts + ORDER)
    if order >= 0:
        place = tl.load(orders + order + column, mask=mask, other=0)
    return place
