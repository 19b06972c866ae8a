"""Mistakes planted in a copy of the device code, each of which the emulator must notice.

A check that cannot fail is no check: these show which mistakes the other tests here would not let
pass, and by which sign.
"""

import shutil
from typing import NamedTuple

import emulator
import lists
import options
import pytest
import samples
import torch
from test_numeric import check_backward, check_forward
from test_vectors import check_like_reference, without_sigma

NUMBERS = r"error .*, allowed"
REPORT = r"(residual|iterations) of .*: "
BITS = r"other bits under Schedule"
WRONG = f"({NUMBERS})|({BITS})"  # whichever run is wrong: it depends on who runs first
VECTORS = f"({NUMBERS})|not close|not equal"
OUTSIDE = r"wrote beyond its results"
ALIGNMENT = r"misaligned address"
RACE = r"ThreadSanitizer: data race"
OVERFLOW = r"AddressSanitizer: "


class Bug(NamedTuple):
    """A mistake: ``old`` text of a file in csrc/cuda that becomes ``new``, and the sign it gives."""

    name: str
    file: str
    old: str
    new: str
    sign: str
    variant: str = "plain"
    only: str = "float"  # the type that is compiled


ONLY = {"float": torch.float32, "BFloat16": torch.bfloat16}

BUGS = [
    Bug(
        "half output of a float weight made of its first vector alone",
        "scale.cuh",
        "load_once(w + j + first)",
        "load_once(w + j)",
        "half output: " + NUMBERS,
    ),
    Bug(
        "float gradient of a half output made of its first vector alone",
        "backward.cuh",
        "scale * to_compute(x.lane[first + e])",
        "scale * to_compute(x.lane[e])",
        "half output: " + NUMBERS,
        only="BFloat16",
    ),
    Bug(
        "missing barrier in a sum over the CTA",
        "device.cuh",
        "  __syncthreads();\n  double total = 0;",
        "  double total = 0;",
        f"{WRONG}|deadlock",  # a wrong sum may send some of the threads to restart the vectors
    ),
    Bug(
        "missing barrier before the shared sums of groups are used again",
        "rows.cuh",
        "turn ^= 1;",
        "",
        RACE,
        "thread",
    ),
    Bug(
        "missing barrier of a warp before it reads what it has staged",
        "layer.cuh",
        "__syncwarp();\n      x[k] =",
        "x[k] =",
        WRONG,
    ),
    Bug(
        "missing barrier between a piece and its signal",
        "schedule.cuh",
        "__syncthreads();  // all of the piece",
        "// all of the piece",
        RACE,
        "thread",
    ),
    Bug(
        "missing barrier behind the load of v",
        "rows.cuh",
        "    }\n  }\n  __syncthreads();\n}",
        "    }\n  }\n}",
        WRONG,
    ),
    Bug(
        "missing wait",
        "schedule.cuh",
        "while (load_acquire(finished) < piece.required)",
        "while (load_acquire(finished) < 0)",
        WRONG,
    ),
    Bug(
        "wait for one piece too few",
        "plan.cpp",
        "piece.required = finished_[piece.layer];",
        "piece.required = std::max(0, finished_[piece.layer] - 1);",
        RACE,
        "thread",
    ),
    Bug(
        "wait for one piece too many",
        "plan.cpp",
        "piece.required = finished_[piece.layer];",
        "piece.required = finished_[piece.layer] + 1;",
        r"deadlock \(seed \d+\)\n(.*\n)*CTA \d+ waits to do rows \[0, \d+\) of layer 0, piece 0: "
        r"0 of the 1 pieces before it are finished",
    ),
    Bug(
        "missing signal",
        "schedule.cuh",
        "if (progress.finished != nullptr && thread_index() == 0)",
        "if (progress.finished != nullptr && thread_index() == 0 && piece.kind != Kind::kColumns)",
        r"deadlock \(seed \d+\)\n(.*\n)*CTA \d+ waits to do (rows|vectors|scale) \[\d+, \d+\) of "
        r"layer \d, piece \d+: \d+ of the \d+ pieces before it are finished",
    ),
    Bug(
        "signal that releases nothing",
        "device.cuh",
        '#define SPECTRAL_EXT_ADD_ORDER "release"',
        '#define SPECTRAL_EXT_ADD_ORDER "relaxed"',
        RACE,
        "thread",
    ),
    Bug(
        "wait that acquires nothing",
        "device.cuh",
        '#define SPECTRAL_EXT_LOAD_ORDER "acquire"',
        '#define SPECTRAL_EXT_LOAD_ORDER "relaxed"',
        RACE,
        "thread",
    ),
    Bug(
        "rows one too far",
        "rows.cuh",
        "if (row < count) {\n        rows.template load",
        "if (row <= count) {\n        rows.template load",
        NUMBERS,
    ),
    Bug(
        "rows one too far, beyond the weight",
        "rows.cuh",
        "if (row < count) {\n        rows.template load",
        "if (row <= count) {\n        rows.template load",
        OVERFLOW,
        "address",
    ),
    Bug(
        "elements one too far",
        "scale.cuh",
        "for (; i < piece.end; i += kThreads) store(y + i",
        "for (; i <= piece.end; i += kThreads) store(y + i",
        OUTSIDE,
    ),
    Bug(
        "columns one too few",
        "rows.cuh",
        "k * kWidth + c < columns; c += kThreads",
        "k * kWidth + c < columns - 1; c += kThreads",
        NUMBERS,
    ),
    Bug(
        "unaligned vectors in the forward",
        "layer.cuh",
        "vectors(shape.inner % Vector<T>::kLanes == 0 && is_aligned(layer.weight))",
        "vectors(shape.inner % Vector<T>::kLanes == 0)",
        ALIGNMENT,
        "alignment",
    ),
    Bug(
        "unaligned vectors in the backward",
        "backward.cuh",
        "is_aligned(out) && (g == nullptr || is_aligned(g))",
        "is_aligned(out)",
        ALIGNMENT,
        "alignment",
    ),
    Bug(
        "uninitialised partial sums",
        "schedule.cuh",
        "if (thread_index() == 0) layer.block_sums(piece.iteration)",
        "if (thread_index() == 0 && piece.index > 0) layer.block_sums(piece.iteration)",
        NUMBERS,
    ),
    Bug(
        "order of a sum that depends on the CTA",
        "rows.cuh",
        "sum += shared[g * kWidth + c];",
        "sum += shared[(g + blockIdx.x) % kGroups * kWidth + c];",
        BITS,
    ),
    Bug(
        "v of the first iteration in the second",
        "rows.cuh",
        "} else if (initial) {",
        "} else if (initial || layer.table.update) {",
        NUMBERS,
    ),
    Bug(
        "v in the wrong order",
        "backward.cuh",
        "shape.column_order.count > 0 ? layer.ordered_v : layer.v",
        "layer.v",
        NUMBERS,
    ),
    Bug(
        "one slot for the sums of blocks",
        "layer.cuh",
        "(iteration & 1) * table.blocks",
        "(table.update ? 0 : iteration & 1) * table.blocks",
        f"({WRONG})|({REPORT})",
    ),
    Bug(
        "one slot for the sums of chunks",
        "layer.cuh",
        "(iteration & 1) * table.chunks",
        "(table.update ? 0 : iteration & 1) * table.chunks",
        RACE,
        "thread",
    ),
    Bug(
        "columns that are skipped and hand nothing on",
        "columns.cuh",
        "layer.chunk_sums(iteration)[piece.index] = layer.chunk_sums(iteration - 1)[piece.index];",
        "",
        f"({NUMBERS})|({REPORT})",
    ),
    Bug(
        "rows that are skipped and hand nothing on",
        "schedule.cuh",
        "layer.block_sums(iteration)[piece.index] = layer.block_sums(iteration - 1)[piece.index];",
        "",
        f"({NUMBERS})|({REPORT})",
    ),
    Bug(
        "rows that go on after the last iteration",
        "schedule.cuh",
        "if (layer.is_over(iteration)) {",
        "if (false) {",
        f"({NUMBERS})|({REPORT})",
    ),
    Bug(
        "norm of the v_first columns from the wrong iteration",
        "columns.cuh",
        "layer.norm_of_t(iteration - table.v_first)",
        "layer.norm_of_t(iteration)",
        NUMBERS,
    ),
    Bug(
        "norms of an iteration exchanged",
        "layer.cuh",
        "table.v_first ? Squares{y, t} : Squares{t, y}",
        "Squares{t, y}",
        REPORT,
    ),
    Bug(
        "report in the place of another layer",
        "layer.cuh",
        "static_cast<A*>(arguments.residuals)) + table.sigma",
        "static_cast<A*>(arguments.residuals))",
        REPORT,
    ),
    Bug(
        "weight within its bound divided",
        "device.cuh",
        "table.soft ? sigma <= table.target : sigma == 0",
        "table.soft ? sigma == 0 : sigma == 0",
        NUMBERS,
    ),
    Bug(
        "vectors of a weight within its bound kept",
        "scale.cuh",
        "const bool keep = !table.update;",
        "const bool keep = !table.update || is_left_alone(table, sigma);",
        NUMBERS,
    ),
    Bug(
        "gradient by sigma of a weight within its bound",
        "backward.cuh",
        "left_alone ? 0 : along / sigma",
        "sigma == 0 ? 0 : along / sigma",
        NUMBERS,
    ),
    Bug(
        "gradient by a sigma that is a constant",
        "backward.cuh",
        "g != nullptr && !layer.table.detach_sigma",
        "g != nullptr",
        NUMBERS,
    ),
    Bug(
        "averaged vectors taken for unit vectors",
        "layer.cuh",
        "off ? sqrt(square) : 1",
        "off ? 1 : 1",
        NUMBERS,
    ),
    Bug(
        "weight of zeros taken for another",
        "scale.cuh",
        "return block_sum(is_zero ? 0 : 1) == 0;",
        "return block_sum(is_zero ? 0 : 1) > 0;",
        VECTORS,
    ),
    Bug(
        "vectors kept that are orthogonal to the weight",
        "scale.cuh",
        "if (!restart && sigma == 0)",
        "if (restart && sigma == 0)",
        VECTORS,
    ),
    Bug(
        "restart from the vector that was orthogonal to the weight",
        "device.cuh",
        "return alternating && i % 2 == 0 ? -x : x;",
        "return alternating && i % 2 > 1 ? -x : x;",
        VECTORS,
    ),
    Bug(
        "v without a use kept",
        "scale.cuh",
        "!layer.is_usable(square_of(layer, layer.v, table.v_stride, columns))",
        "!layer.is_usable(square_of(layer, layer.u, table.u_stride, rows))",
        VECTORS,
    ),
    Bug(
        "wide vectors read as elements of the weight",
        "layer.cuh",
        "if (!table.wide_vectors) return",
        "return",
        f"({NUMBERS})|({REPORT})",
        only="BFloat16",
    ),
    Bug(
        "wide vectors written as elements of the weight",
        "layer.cuh",
        "sizeof(T) == sizeof(A) || table.wide_vectors",
        "sizeof(T) == sizeof(A)",
        NUMBERS,
        only="BFloat16",
    ),
]


def check_all(emulate, variant, command, dtype=torch.float32):
    """Run forward and backward of tiny layers in every way that the bugs above need."""
    emulated = emulate(command)
    emulated.tickets = 4
    if variant == "thread":
        emulated.schedules = emulator.ALL_RESIDENT
    check_forward(lists.layers(lists.TINY, dtype, n_power_iterations=2), True, "emulated")
    grads = [
        samples.in_layout(
            torch.randn(shape).to(dtype), "contiguous" if layout == "offset" else "offset"
        )
        for shape, _, layout in lists.TINY
    ]
    check_backward(lists.layers(lists.TINY, dtype), grads, False, "emulated")
    for order in ("u_first", "v_first"):
        layers = lists.layers(lists.TINY, dtype, order=order, n_power_iterations=3)
        options.check(emulated, options.mixed(layers, True), True)
    options.check(emulated, options.mixed(lists.layers(lists.TINY, dtype), False), False)
    for order in ("u_first", "v_first"):
        check_like_reference(
            without_sigma(lists.layers(lists.TINY, dtype, order=order)), "emulated"
        )
    dense = [la for la in lists.layers(lists.TINY, dtype) if la.weight.is_contiguous()]
    options.check_half_outputs(emulated, dense)


@pytest.mark.parametrize("variant", ["alignment", "address", "thread"])
def test_without_a_bug(programs, emulate, variant):
    check_all(emulate, variant, emulator.build(programs, variant))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_bug_is_noticed(programs, tmp_path, emulate, bug):
    shutil.copytree(emulator.ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc/cuda" / bug.file
    code = file.read_text()
    assert code.count(bug.old) == 1, f"{bug.file} has changed; plant the bug anew"
    file.write_text(code.replace(bug.old, bug.new))
    flags = ["-O0", f"-DEMULATOR_ONLY={bug.only}"]  # what compiles fastest
    command = emulator.build(tmp_path, bug.variant, tmp_path / "csrc", flags)
    with pytest.raises(AssertionError, match=bug.sign):
        check_all(emulate, bug.variant, command, ONLY[bug.only])
