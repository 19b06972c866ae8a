"""Mistakes planted in the Triton kernels, one at a time; prints what became of each as JSON.

Every store is left out, every mask, and what makes a partial sum or a place right. Each mistake has a
process of its own, forked from this one. There all tensors and all parts of a workspace end where the
memory ends, so that one element too many is a crash.
"""

import argparse
import ctypes
import json
import linecache
import mmap
import os
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import triton_interpreter

triton_interpreter.ask_for()

import samples  # noqa: E402
import torch  # noqa: E402
from stock import Layer, iterate  # noqa: E402
from test_numeric import check_backward, check_forward, gradients, normalize  # noqa: E402
from test_options import run  # noqa: E402
from test_vectors import check_like_reference as check_restarts  # noqa: E402
from test_vectors import without_sigma  # noqa: E402

from spectral_ext import backends  # noqa: E402
from spectral_ext.backends.triton import (  # noqa: E402
    backward_kernels,
    device,
    forward_kernels,
    launch,
    tables,
)

MODULES = {m.__name__.rpartition(".")[2]: m for m in (device, forward_kernels, backward_kernels)}
SOURCES = {name: Path(module.__file__).read_text() for name, module in MODULES.items()}

# In what is not a store or a mask: module, text, the mistake.
OTHER = [
    ("device", "tl.where(x < bound, bound, x)", "x"),
    ("device", "range(0, count, 128)", "range(0, 1, 128)"),
    ("device", "column // inner * (rows * inner) + column % inner", "column"),
    ("device", "tl.load(orders + order + column, mask=mask, other=0)", "place"),
    ("device", "(tl.load(facts + CONTIGUOUS) != 0)", "True"),
    ("device", "(sigma == 0) | is_within", "is_within"),
    ("device", "(tl.load(facts + SOFT) != 0) & ", ""),
    ("device", "<= number(facts, TARGET)", "< number(facts, TARGET)"),
    ("device", "elif is_wide != 0:", "elif is_wide < 0:"),
    ("device", "tl.load(facts + PLACE) + slot * count", "tl.load(facts + PLACE)"),
    ("forward_kernels", "step // 2 % 2", "step // 2 * 0"),
    ("forward_kernels", "tl.where(starts_with_columns, columns, rows)", "rows"),
    ("forward_kernels", "tl.where(starts_with_columns, rows, columns)", "columns"),
    ("forward_kernels", "tol * tol * after", "tol * after"),
    ("forward_kernels", "(step >= 2) & (tol > 0)", "(step >= 2) & (tol < 0)"),
    ("forward_kernels", "keep_sum(facts, sums, tile, slot_of(step), ROW_SUMS, ROW_TILES)", "pass"),
    ("forward_kernels", "keep_sum(facts, sums, tile, slot_of(step), COLUMN_SUMS, CHUNKS)", "pass"),
    ("forward_kernels", "(step // 2 + 1)", "(step // 2)"),
    ("forward_kernels", "tiles * 128", "128"),
    ("forward_kernels", "own + V_SQUARE * tiles", "own + U_SQUARE * tiles"),
    ("forward_kernels", "sigma /= tl.sqrt(square)", "pass"),
    ("forward_kernels", "u_norm = tl.sqrt(u_square)", "pass"),
    ("forward_kernels", "v_norm = tl.sqrt(v_square)", "pass"),
    ("forward_kernels", '(square > 0) & (square < float("inf"))', "square < 2"),
    ("forward_kernels", "tl.abs(square - 1.0) > number(facts, SLACK)", "square > 0"),
    ("forward_kernels", "40503 * i % 65536", "40503 * i"),
    ("forward_kernels", "first > 0, -1.0, 1.0", "first > 0, 1.0, 1.0"),
    ("forward_kernels", "result = 1 - tl.max", "result = tl.max"),
    ("forward_kernels", "begin += 1024", "begin += count"),
    ("forward_kernels", "is_usable(u_square) & is_usable(v_square)", "is_usable(u_square)"),
    ("forward_kernels", "is_usable(u_square) & is_usable(v_square)", "is_usable(v_square)"),
    ("forward_kernels", "gap <= 0, 0.0", "gap < 0, 0.0"),
    ("forward_kernels", "if number(facts, TOL) > 0:", "if number(facts, TOL) >= 0:"),
    ("forward_kernels", "place + count", "place + 1"),
    ("forward_kernels", "/ number(facts, TARGET)", ""),
    ("backward_kernels", "number(facts, TARGET) * inverse", "inverse"),
    ("backward_kernels", " | (tl.load(facts + DETACH_SIGMA) != 0)", ""),
    ("forward_kernels", "first = weight + r * inner", "first = weight + tile * inner"),
    ("forward_kernels", "factor = divide(t, scale, A)", "factor = t"),
    ("forward_kernels", "(scale.to(tl.float64) / length).to(A)", "scale"),
    ("forward_kernels", "length = divisor(facts, sums, slot_of(step - 1), COLUMN_SUMS, CHUNKS).to(A)",
     "pass"),
    ("forward_kernels", "divisor(facts, sums, slot_of(step - 1)", "divisor(facts, sums, slot_of(step)"),
    ("forward_kernels", "sums, slot_of(step - 1), c", "sums, slot_of(step), c"),
    ("forward_kernels", "other = load_vector", "load_vector"),
    ("forward_kernels", "if step + 1 < tl.load(facts + HALF_STEPS):", "if step < 1:"),
    ("forward_kernels", "if step >= tl.load(facts + HALF_STEPS):", "if step < 0:"),
    ("forward_kernels", "c = last - back + tl.arange(0, C)", "c = last + tl.arange(0, C)"),
    ("forward_kernels", "(sigma == 0) | ~(tl.abs", "~(tl.abs"),
    ("forward_kernels", '(sigma == 0) | ~(tl.abs(sigma) < float("inf"))', "sigma == 0"),
    ("forward_kernels", "restart = restart | (is_zero_weight", "(is_zero_weight"),
    ("forward_kernels", "is_left_alone(facts, sigma), 1.0", "sigma != sigma, 1.0"),
    ("forward_kernels", "tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)",
     "x.to(tl.int32, bitcast=True) & 0x7F800000"),
    ("backward_kernels", "- along_u[:, None] * v[None, :]", ""),
    ("backward_kernels", "coefficient -= tl.load", "coefficient += tl.load"),
    ("backward_kernels", "tl.where(left_alone, 0.0, along * inverse)", "along * inverse"),
    ("backward_kernels", "tl.where(left_alone, 1.0, number", "(number"),
    ("backward_kernels", "along_u = coefficient * tl.load(saved_u + r",
     "along_u = coefficient * tl.load(saved_u + r - r"),
]  # fmt: skip


def bugs():
    """Yield for each mistake its name, a module and its changed source."""
    for name, source in SOURCES.items():
        stores = re.finditer(
            r"^( +)tl\.store\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", source, re.M
        )
        for store in stores:
            line = source.count("\n", 0, store.start()) + 1
            changed = source[: store.start()] + store[1] + "pass" + source[store.end() :]
            yield f"{name}:{line} no store", name, changed
        masks = list(re.finditer(r", mask=\w+(, other=0(\.0)?)?", source))
        assert len(masks) == source.count("mask=")
        assert len(re.findall(r"^ +tl\.store\(", source, re.M)) == source.count("tl.store(")
        for mask in masks:
            line = source.count("\n", 0, mask.start()) + 1
            changed = source[: mask.start()] + source[mask.end() :]
            yield f"{name}:{line} no mask", name, changed
    for name, old, new in OTHER:
        assert old in SOURCES[name], old
        yield f"{name}: {old} -> {new}", name, SOURCES[name].replace(old, new)


def plant(name, source):
    """Let the launches use kernels made of changed source."""
    modules = dict(MODULES)
    for place, module in MODULES.items():
        text = source if place == name else SOURCES[place]
        file = f"<{place} with a bug>"
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
        new = types.ModuleType(module.__name__)
        new.__package__ = module.__package__
        sys.modules[module.__name__] = modules[place] = new
        exec(compile(text, file, "exec"), new.__dict__)
    for kernel in ("half_step_kernel", "divide_kernel"):
        setattr(launch, kernel, getattr(modules["forward_kernels"], kernel))
    for kernel in ("dot_kernel", "gradient_kernel"):
        setattr(launch, kernel, getattr(modules["backward_kernels"], kernel))


# ---- Memory


LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
MAPPINGS = []


def at_the_edge(tensor):
    """Return a copy behind whose last element no memory may be touched."""
    flat = torch.empty_strided((1,), (1,), dtype=tensor.dtype)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    size = count * flat.element_size()
    whole = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, whole + PAGE)
    MAPPINGS.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert LIBC.mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(PAGE), 0) == 0
    if count == 0:
        return tensor
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=whole - size)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def put_at_the_edge():
    """Let all that a call allocates end where the memory ends."""
    empty, empty_like = torch.empty, torch.empty_like
    moved_by, begin = tables.Tables.moved_by, launch._Group.__init__

    def edge_of(make):
        def wrapped(*args, **kwargs):
            made = make(*args, **kwargs)
            fits = made.device.type == "cpu" and made.is_floating_point()
            return at_the_edge(made.fill_(torch.nan)) if fits else made

        return wrapped

    def begin_at_the_edge(group, *args):
        begin(group, *args)
        layers = group.tables.layers.clone()
        for row in layers:
            of = dict(zip(tables.FIELDS, row.tolist(), strict=True))
            parts = {
                "t": (group.vectors, of["rows"]),
                "y": (group.vectors, of["columns"]),
                "shares": (group.vectors, of["row_tiles"] * of["columns"]),
                "scales": (group.vectors, of["row_tiles"]),
            }
            sums = tables._sums_of(of)
            if not len(group.vectors):  # of a backward
                parts, sums = {}, {"row_sums": of["row_tiles"]}
            parts |= {name: (group.sums, size) for name, size in sums.items()}
            for name, (workspace, size) in parts.items():
                part = torch.empty(size, dtype=workspace.dtype)
                distance = part.data_ptr() - workspace.data_ptr()
                row[tables.FIELDS.index(name)] = distance // workspace.element_size()
        group.tables = replace(group.tables, layers=at_the_edge(layers))

    torch.empty, torch.empty_like = edge_of(empty), edge_of(empty_like)
    tables.Tables.moved_by = lambda made, move: moved_by(made, at_the_edge)
    launch._upload = lambda host, device: at_the_edge(host)
    launch._Group.__init__ = begin_at_the_edge


# ---- Numbers


CASES = [((5, 7), 0), ((130, 36), 0), ((33, 132), 0), ((9, 2052), 0), ((4, 6, 3, 2), 1)]


def layer(shape, dim=0, **settings):
    """Return a layer whose tensors end where the memory ends."""
    return moved(samples.layer(shape, dim, **settings))


def moved(one, u_factor=1.0, v_factor=1.0):
    """Return a copy whose tensors end where the memory ends, with other u and v."""
    tensors = one.weight.detach(), one.u * u_factor, one.v * v_factor
    return one.with_tensors(*map(at_the_edge, tensors))


def stopping_after(steps, one):
    """Return a layer with a tolerance that it reaches after so many steps."""
    _, residual = iterate(replace(one.to(torch.float64), n_power_iterations=steps))
    return replace(one, tol=1.01 * residual)


def check_options(order):
    """Raise unless layers that stop, have targets, and float32 or averaged vectors are as specified."""
    iterating = {"order": order, "n_power_iterations": 4}
    layers = [
        *(stopping_after(steps, layer((130, 36), **iterating)) for steps in (1, 2, 3)),
        layer((9, 7), tol=1e-9, **iterating),
        layer((5, 7), dtype=torch.bfloat16, tol=0.1, **iterating),
        layer((5, 7), dtype=torch.bfloat16, order=order),
        layer((6, 4), tol=0.5, **iterating),
        layer((6, 4), scale=2.0, order=order),
        layer((2, 2), bound=2.0, order=order),  # of σ = 2
        layer((6, 4), bound=0.1, detach_sigma=True, order=order),
    ]
    wide, zero, within = layers[4], layers[6], layers[8]
    wide.u, wide.v = at_the_edge(wide.u.float()), at_the_edge(wide.v.float())
    zero.weight.zero_()
    within.weight.copy_(2 * torch.eye(2))
    for vector in (within.u, within.v):
        vector.copy_(torch.tensor([1.0, 0.0]))
    _, iterations = check_like_reference(layers, True)
    assert iterations.tolist() == [1, 2, 3, 4, 1, 1, 1, 1, 1, 1]
    # Averages, but the vectors of half precision are within rounding; and a zero u gives NaN.
    factors = [(0.5, 0.25)] * 5 + [(1 + 2**-7, 1), (0, 1)] + [(0.5, 0.25)] * 3
    check_like_reference([moved(one, *f) for one, f in zip(layers, factors, strict=True)], False)


def check_like_reference(layers, update):
    """Raise unless all results are those of the specification; return how far the layers went."""
    results, reports = [], []
    copies = [one.with_tensors(one.weight.clone(), one.u.clone(), one.v.clone()) for one in layers]
    for part, backend in ((layers, "triton"), (copies, "reference")):
        torch.manual_seed(1)
        report = torch.empty(2, len(part))
        weights = [one.weight.detach().requires_grad_() for one in part]
        normalized, sigmas = run(part, update, backend, weights, convergence=report)
        grads = [*(torch.randn_like(weight) for weight in weights), torch.randn_like(sigmas)]
        gradients = torch.autograd.grad([*normalized, sigmas], weights, grads)
        vectors = [vector for one in part for vector in (one.u, one.v)]
        results.append([sigmas.detach(), *normalized, *gradients, *vectors])
        reports.append(report)
    torch.testing.assert_close(*results, equal_nan=True)
    torch.testing.assert_close(*reports, rtol=0, atol=1e-4, equal_nan=True)
    return reports[0]


def check():
    """Raise if the numbers are wrong, or something was written where nothing should be."""
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    put_at_the_edge()
    for order in ("u_first", "v_first"):
        torch.manual_seed(0)
        layers = [layer(shape, dim, order=order) for shape, dim in CASES]
        layers.append(layer((4, 3, 2, 5), layout="channels_last", order=order))
        layers.append(layer((6, 5), order=order, n_power_iterations=2))
        grads = [at_the_edge(torch.randn(one.weight.shape)) for one in layers]
        grads[2] = None
        check_backward([one.to(torch.float32) for one in layers], grads, True, "triton")
        check_forward(layers, True, "triton")
        check_forward(layers, False, "triton")
        check_options(order)
        shapes = [(37, 20), (5, 7), (9, 7), (6, 4), (40, 30), (4, 3)]
        lost = without_sigma([layer(shape, order=order) for shape in shapes])
        lost.append(layer((4, 3, 2, 5), layout="channels_last", order=order))
        lost[-1].v.zero_()
        check_restarts(lost, "triton")
        check_restarts([moved(layer((5, 7), dtype=torch.bfloat16, order=order), 0, 0)], "triton")
    check_forward([layer((5, 300), eps=100.0), layer((1, 129 * 128))], True, "triton")

    huge = layer((20, 10), scale=1e30, eps=1e-305)
    exact = Layer(huge.weight.double(), huge.u.double(), huge.v.double(), eps=1e-305)
    (found,), (expected,) = normalize([huge], backend="triton")[0], normalize([exact])[0]
    assert (found - expected).norm() < 1e-6 * expected.norm()

    zero, turned, other = layer((6, 4)), layer((2, 2)), layer((5, 4))
    zero.weight.zero_()  # σ is zero, as it is here for a weight that is not
    turned.weight.copy_(torch.eye(2))
    turned.u.copy_(torch.tensor([1.0, 0.0]))
    turned.v.copy_(torch.tensor([0.0, 1.0]))
    for update in (True, False):
        layers = [zero, other] if update else [zero, turned, other]
        copies = [one.to(torch.float32) for one in layers]
        grads = [*(torch.randn(one.weight.shape) for one in layers[:-1]), None]
        grad_sigmas = torch.randn(len(layers))
        found = gradients(layers, grads, update, "triton", grad_sigmas)
        expected = gradients(copies, grads, update, "reference", grad_sigmas)
        torch.testing.assert_close(found, expected)
        assert torch.equal(zero.u, copies[0].u)
        assert normalize([zero], update, "triton")[0][0].eq(0).all()


# ---- Mistakes


def outcome(name, source):
    """Return what a process with a mistake ended with."""
    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        code = 1
        try:
            plant(name, source)
            check()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return "unnoticed" if status == 0 else "noticed" if os.WIFEXITED(status) else "crashed"


def main():
    """Try all mistakes, or a part of them, and none."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--of", type=int, default=1, metavar="PARTS")
    arguments = parser.parse_args()
    assert backends.unavailable("triton", torch.device("cpu")) is None
    triton_interpreter.improve()
    torch.set_num_threads(1)
    plants = [("as it is", "device", SOURCES["device"]), *bugs()]
    chosen = plants[arguments.part :: arguments.of]
    outcomes = {bug: outcome(name, source) for bug, name, source in chosen}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
