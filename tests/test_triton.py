"""What is the Triton backend's own: its tables, its launches, and where it can run.

Its numbers are in test_numeric.py and test_any_list.py, by Triton's interpreter.
"""

import json
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import samples
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_numeric import ORDERS, gradients, normalize
from test_options import run

from spectral_ext import backends

if backends.unavailable("triton", torch.device("cpu")) is not None:
    pytest.skip(backends.unavailable("triton", torch.device("cpu")), allow_module_level=True)

from spectral_ext.backends import triton
from spectral_ext.backends.triton import launch, tables
from spectral_ext.backends.triton.tables import CHUNK_SIZES, TILE_SIZES, LayerFacts, Shape

KERNELS = ("half_step_kernel", "divide_kernel", "dot_kernel", "gradient_kernel")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# ---- Tables


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_shape_of_any_order_of_dimensions(sizes, data):
    order = data.draw(st.permutations(range(len(sizes))))
    dim = data.draw(st.integers(0, len(sizes) - 1))
    weight = torch.arange(torch.Size(sizes).numel()).reshape([sizes[d] for d in order])
    weight = weight.permute([order.index(d) for d in range(len(sizes))])
    shape = Shape.of(weight.shape, weight.stride(), dim)
    matrix = weight.movedim(dim, 0).reshape(weight.shape[dim], -1)
    row, column = torch.meshgrid(
        torch.arange(shape.rows), torch.arange(shape.columns), indexing="ij"
    )
    place = (column // shape.inner * shape.rows + row) * shape.inner + column % shape.inner
    if shape.order is not None:
        matrix = matrix[:, shape.places_in_v()]
    assert torch.equal(place, matrix)


def facts(rows, columns, lanes=4, **settings):
    shape = Shape(1, rows, columns, None)
    return LayerFacts(shape, 0, 0, lanes, **{"update": True, "n_power_iterations": 1, **settings})


def named(made):
    """Return the rows of a table of layers, by names."""
    return [dict(zip(tables.FIELDS, row, strict=True)) for row in made.layers.tolist()]


SHAPES = [(1, 1), (129, 3), (4096, 64), (33, 65), (64, 2048), (9, 2049), (1536, 13824)]


@pytest.mark.parametrize("v_first", [False, True])
def test_tiles_are_all_of_every_layer(v_first):
    made = tables.forward_tables([facts(*shape, v_first=v_first) for shape in SHAPES])
    of_rows, of_columns = [], []
    for i, (rows, columns) in enumerate(SHAPES):
        kind = 0 if columns <= 64 else 1 if columns <= 2048 else 2
        of_rows += [(i, n) for n in range(-(-rows // TILE_SIZES[kind][0]))]
        of_columns += [(i, n) for n in range(-(-columns // CHUNK_SIZES[kind][1]))]
    first, second = made.turns
    assert sorted(map(tuple, made.row_tiles.tolist())) == of_rows
    assert sorted(map(tuple, (second if v_first else first).tolist())) == of_rows
    assert sorted(map(tuple, (first if v_first else second).tolist())) == of_columns


def test_workspaces_do_not_overlap():
    made = tables.forward_tables([facts(*shape) for shape in SHAPES])
    spans = []
    for of in named(made):
        spans += [
            (of["t"], of["rows"]),
            (of["y"], of["columns"]),
            (of["shares"], of["row_tiles"] * of["columns"]),
            (of["scales"], of["row_tiles"]),
        ]
    end = 0
    for begin, size in sorted(spans):
        assert begin >= end
        end = begin + size
    assert end <= made.vectors


def check_sums(made, sizes):
    """Raise unless the sums of all layers, of so many entries, are one after the other."""
    sums = [(of[name], size) for of in named(made) for name, size in sizes(of).items()]
    assert all(a + n == b for (a, n), (b, _) in pairwise([(0, 0), *sums, (made.sums, 0)]))


def test_norms_have_a_slot_for_even_iterations_and_one_for_odd_ones():
    made = tables.forward_tables([facts(*shape) for shape in SHAPES])
    check_sums(
        made,
        lambda of: {"row_sums": 2 * of["row_tiles"], "column_sums": 2 * of["chunks"], "made": 1},
    )


def test_without_an_update_there_is_room_for_the_norms_of_u_and_v():
    made = tables.forward_tables([facts(*shape, update=False) for shape in SHAPES])
    check_sums(made, lambda of: {"row_sums": 3 * of["row_tiles"]})


def test_float64_facts_keep_their_bits():
    made = tables.forward_tables([facts(5, 7, eps=1e-305, tol=-0.0, scale=0.1)])
    bits = torch.tensor([[named(made)[0][name] for name in ("eps", "tol", "target")]])
    expected = torch.tensor([[1e-305, -0.0, 0.1]], dtype=torch.float64)
    assert torch.equal(bits, expected.view(torch.int64))


@pytest.mark.parametrize(
    ("lanes", "wide", "slack"),
    [(4, False, 1e-4), (2, False, 1e-4), (8, True, 1e-4), (8, False, 2**-5)],
)
def test_vectors_of_half_precision_may_be_off_by_more(lanes, wide, slack):
    made = tables.forward_tables([facts(5, 7, lanes, wide_vectors=wide)])
    assert struct.pack("<q", named(made)[0]["slack"]) == struct.pack("<d", slack)


def test_13824_columns_do_not_pay_for_16384():
    assert 13824 % TILE_SIZES[2][1] == 0


# ---- Launches


class Noting:
    """A kernel that notes its launches."""

    def __init__(self, name, names):
        self.kernel, self.name, self.names = getattr(launch, name), name, names

    def __getitem__(self, grid):
        self.names.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names = []
    for name in KERNELS:
        monkeypatch.setattr(launch, name, Noting(name, names))
    return names


def small(count, order="u_first", **settings):
    return [samples.layer((3, 4 + i % 5), order=order, **settings) for i in range(count)]


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize(
    ("orders", "iterations", "update", "expected"),
    [
        (["u_first"], 1, True, 3),
        (["v_first"], 1, True, 3),
        (["u_first", "v_first"], 1, True, 3),
        (["u_first", "v_first"], 3, True, 7),
        (["u_first", "v_first"], 1, False, 2),
    ],
)
def test_launches_do_not_grow_with_layers(launches, orders, iterations, update, expected, count):
    layers = [
        layer for order in orders for layer in small(count, order, n_power_iterations=iterations)
    ]
    normalize(layers, update, "triton")
    assert launches == ["half_step_kernel"] * (expected - 1) + ["divide_kernel"]


@pytest.mark.parametrize("order", ORDERS)
def test_a_tolerance_costs_no_launch(launches, order):
    layers = small(4, order, n_power_iterations=4, tol=0.5) + small(3, order, scale=2.0)
    layers += small(2, order, bound=1.0)
    report = torch.empty(2, len(layers))
    run(layers, backend="triton", convergence=report)
    assert launches == ["half_step_kernel"] * 8 + ["divide_kernel"]
    assert (report[1, :4] < 4).all()  # whatever was left to do


def test_a_backward_is_two_launches(launches):
    layers = small(38) + small(1, scale=2.0, detach_sigma=True) + small(1, bound=1.0)
    weights = [layer.weight.requires_grad_() for layer in layers]
    normalized, _ = run(layers, backend="triton")
    torch.autograd.grad(normalized, weights, [torch.ones_like(weight) for weight in weights])
    assert launches[-2:] == ["dot_kernel", "gradient_kernel"] and len(launches) == 5


def test_tables_are_made_once():
    layers = small(7, n_power_iterations=2)
    grads = [torch.ones_like(layer.weight) for layer in layers]
    gradients(layers, grads, backend="triton")
    before = dict(launch._tables)
    gradients(layers, grads, backend="triton")
    copies = small(7, n_power_iterations=2)  # other tensors
    gradients(copies, grads, backend="triton")
    assert launch._tables == before


@pytest.mark.parametrize("order", ORDERS)
def test_bits_do_not_depend_on_the_other_layers(order):
    def results(layers):
        torch.manual_seed(5)
        grads = [torch.randn(layer.weight.shape) for layer in layers]
        return [
            *normalize(layers, backend="triton")[0],
            *gradients(layers, grads, backend="triton"),
        ]

    torch.manual_seed(1)
    shapes = [((300, 40), 0), ((40, 70), 1), ((5, 2100), 0)]
    layers = [samples.layer(shape, dim, order=order) for shape, dim in shapes]
    alone = [layers[0].to(torch.float32)]
    together = results(layers)
    first, gradient = results(alone)
    assert torch.equal(first, together[0]) and torch.equal(gradient, together[3])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("exponent", [-30, 18, 30])
def test_extreme_scales(order, exponent):
    """Here t·row leaves the range of float: shares are multiples of a power of two near t."""
    layer = samples.layer((150, 70), dtype=torch.float64, eps=1e-305, order=order)
    layer.weight[:128] = 0  # a tile of rows without a scale of its own
    scaled = layer.to(torch.float32)
    scaled.weight = (layer.weight * 10.0**exponent).float()
    normalized, _ = normalize([scaled], backend="triton")
    truth = normalize([layer], backend="reference")[0][0]
    assert (normalized[0].double() - truth).norm() < 1e-6 * truth.norm()
    assert (scaled.v.double() - layer.v).norm() < 1e-5
    assert (scaled.u.double() - layer.u).norm() < 1e-5


# ---- Where it can run


def test_the_interpreter_computes_on_cpu_tensors_only():
    assert triton.unavailable(CPU) is None and triton.unavailable(None) is None
    assert "not on cuda" in triton.unavailable(CUDA)


@pytest.fixture
def with_gpu(monkeypatch):
    """As if there were a GPU and no interpreter; returns a function that sets what it is."""
    monkeypatch.setattr(triton, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    triton._why_not_started.cache_clear()

    def gpu(capability, start=lambda: None):
        class Driver:
            get_current_target = staticmethod(start)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(triton.triton.runtime.driver, "_active", Driver(), raising=False)
        monkeypatch.setattr(type(triton.triton.runtime.driver), "active", Driver())

    yield gpu
    triton._why_not_started.cache_clear()


def no_compiler():
    raise RuntimeError("Failed to find C compiler")


def test_auto_takes_it_where_cuda_was_not_compiled(with_gpu, monkeypatch):
    with_gpu((9, 0))
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends._load("cuda"), "unavailable", lambda device: "not compiled")
    assert backends.select(None, CUDA) is triton
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends._load("cuda"), "unavailable", lambda device: None)
    assert backends.select(None, CUDA) is backends._load("cuda")


def test_reasons(with_gpu, monkeypatch):
    with_gpu((9, 0))
    assert triton.unavailable(CUDA) is None and triton.unavailable(None) is None
    assert "TRITON_INTERPRET=1" in triton.unavailable(CPU)
    with_gpu((7, 5))
    assert "and here is 7.5" in triton.unavailable(CUDA)
    with_gpu((9, 0), no_compiler)
    triton._why_not_started.cache_clear()
    assert "Failed to find C compiler" in triton.unavailable(CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in triton.unavailable(None)


def test_rocm_and_old_versions(with_gpu, monkeypatch):
    with_gpu((9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in triton.unavailable(CUDA)
    monkeypatch.setattr(triton.triton, "__version__", "3.5.1")
    assert "here is 3.5.1" in triton.unavailable(CUDA)


def test_an_interpreter_that_is_broken(monkeypatch):
    monkeypatch.setattr(triton.triton, "__version__", "3.6.0")
    monkeypatch.setattr(triton.metadata, "version", lambda name: "2.4.1")
    assert "wants numpy<2.4" in triton.unavailable(CPU)
    monkeypatch.setattr(triton.metadata, "version", lambda name: "2.3.5")
    assert triton.unavailable(CPU) is None


def test_zero_weight_with_the_smallest_eps():
    """The scale of a tile of zeros is divided by eps."""
    layer = samples.layer((6, 4), eps=1e-40)
    layer.weight.zero_()
    (normalized,), sigmas = normalize([layer], backend="triton")
    assert normalized.eq(0).all() and sigmas.eq(0).all()


def test_without_triton():
    script = """
import sys
sys.modules["triton"] = None
import torch
from spectral_ext import backends
print(backends.unavailable("triton"))
torch.cuda.is_available = lambda: False
print(backends.select(None, torch.device("cuda", 0)).__name__)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reason, chosen = run.stdout.splitlines()
    assert "triton cannot be imported" in reason and "pip install" in reason
    assert chosen == "spectral_ext.backends.reference"


PARTS = 6


@pytest.mark.first
@pytest.mark.parametrize("part", range(PARTS))
def test_planted_bugs_are_noticed(part):
    """Every store, every mask and every partial result is needed; see triton_bugs.py."""
    script = Path(__file__).parent / "triton_bugs.py"
    command = [sys.executable, script, "--part", str(part), "--of", str(PARTS)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert outcomes.pop("as it is", "unnoticed") == "unnoticed"
    assert len(outcomes) > 60 / PARTS
    assert [bug for bug, outcome in outcomes.items() if outcome == "unnoticed"] == []
