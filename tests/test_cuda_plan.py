"""How the CUDA backend cuts its work. The plan is host code: no GPU and no CUDA toolkit is needed."""

import itertools
import math
from collections import Counter, defaultdict

import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st

_C = pytest.importorskip("spectral_ext._C")

ELEMENT_SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def model_shapes(name):
    """Return (outer, rows, inner) of a model's contiguous weights."""
    shapes = []
    for entry in samples.MODELS[name]:
        shape, dim = entry["shape"], entry["dim"]
        shapes.append((math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])))
    return shapes


def tickets_of(plan):
    """Return the pieces of each ticket, and of each phase its tickets."""
    starts = plan["tickets"]
    tickets = [plan["pieces"][a:b] for a, b in itertools.pairwise(starts)]
    starts = plan["phases"]
    return tickets, [tickets[a:b] for a, b in itertools.pairwise(starts)]


def check_covered(pieces, size):
    """Assert that the pieces cover [0, size) exactly once, each with an index of its own."""
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece["begin"]):
        assert piece["begin"] == end < piece["end"]
        end = piece["end"]
    assert end == size
    assert sorted(piece["index"] for piece in pieces) == list(range(len(pieces)))


def check_order(plan):
    """Assert that pieces wait for all of their layer's earlier phases, and for nothing later."""
    tickets, phases = tickets_of(plan)
    assert sum(len(ticket) for ticket in tickets) == len(plan["pieces"])
    assert sum(len(phase) for phase in phases) == len(tickets)
    assert all(tickets)
    before = Counter()
    for phase in phases:
        pieces = [piece for ticket in phase for piece in ticket]
        for piece in pieces:
            # What it waits for has been counted, so it stands in an earlier phase.
            assert piece["required"] == before[piece["layer"]]
        before.update(piece["layer"] for piece in pieces)


def check_forward(plan, shapes, v_first, n_power_iterations, update):
    check_order(plan)
    found = defaultdict(list)
    _, phases = tickets_of(plan)
    for number, phase in enumerate(phases):
        for ticket in phase:
            for piece in ticket:
                found[piece["layer"], number, piece["kind"]].append(piece)
    for i, (outer, rows, inner) in enumerate(shapes):
        layer = plan["layers"][i]
        dots = sums = 0
        for (index, _, kind), pieces in sorted(found.items()):
            if index != i:
                continue
            columns = outer * inner
            size = {"rows": rows, "columns": columns, "vectors": rows + columns}
            check_covered(pieces, size.get(kind, rows * columns))
            if kind in ("rows", "columns"):
                # The how manieth product with M, and with Mᵀ, it is.
                of_columns = kind == "columns" or not pieces[0]["dots"]
                done = sums - (kind == "columns") if of_columns else dots
                assert {piece["iteration"] for piece in pieces} == {done}
            if kind == "rows":
                assert len(pieces) == layer["blocks"]
                dots += pieces[0]["dots"]
                sums += pieces[0]["sums"]
            if kind == "columns":
                assert len(pieces) == layer["chunks"]
        assert dots == (n_power_iterations if update else 1)
        assert sums == (n_power_iterations if update else 0)
        initial = {p["kind"] for p in plan["pieces"] if p["layer"] == i and p["initial"]}
        assert initial == ({"rows", "columns"} if initial - {"rows"} else {"rows"})
        last = max(number for index, number, _ in found if index == i)
        assert last == len(phases) - 1
        assert {kind for index, number, kind in found if (index, number) == (i, last)} == {
            "scale",
            "vectors",
        }


@pytest.mark.parametrize("dtype", ELEMENT_SIZE)
@pytest.mark.parametrize("v_first", [False, True], ids=["u_first", "v_first"])
@pytest.mark.parametrize("name", samples.MODELS)
def test_models(name, v_first, dtype):
    shapes = model_shapes(name)
    for n_power_iterations, update in ((1, True), (3, True), (1, False)):
        plan = _C.plan_forward(shapes, dtype, v_first, n_power_iterations, update)
        check_forward(plan, shapes, v_first, n_power_iterations, update)
    plan = _C.plan_backward(shapes, dtype)
    check_backward(plan, shapes)


def check_backward(plan, shapes):
    check_order(plan)
    for i, (outer, rows, inner) in enumerate(shapes):
        pieces = [piece for piece in plan["pieces"] if piece["layer"] == i]
        for kind in ("dot", "update"):
            check_covered([p for p in pieces if p["kind"] == kind], outer * rows * inner)
        assert sum(p["kind"] == "dot" for p in pieces) == plan["layers"][i]["blocks"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", samples.MODELS)
def test_one_pass_over_the_weights_has_three_phases(name, dtype):
    assert len(_C.plan_forward(model_shapes(name), dtype)["phases"]) == 4


def spread(tickets, bytes_of):
    """Return by how much the work of tickets differs from the mean, at most."""
    work = [sum(bytes_of(piece) for piece in ticket) for ticket in tickets]
    mean = sum(work) / len(work)
    return max(abs(w - mean) for w in work) / mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", samples.MODELS)
def test_tickets_are_equal(name, dtype):
    shapes = model_shapes(name)

    def row_bytes(piece):
        outer, _, inner = shapes[piece["layer"]]
        return (piece["end"] - piece["begin"]) * outer * inner * ELEMENT_SIZE[dtype]

    _, phases = tickets_of(_C.plan_forward(shapes, dtype))
    assert spread(phases[0], row_bytes) < 0.05
    for phase in tickets_of(_C.plan_backward(shapes, dtype))[1]:
        assert spread(phase, lambda piece: piece["end"] - piece["begin"]) < 0.05


@pytest.mark.parametrize("name", ["biggan128_D_ch96", "sngp_wrn28_10", "sagan_imagenet128_G"])
def test_large_models_fill_a_large_device(name):
    _, phases = tickets_of(_C.plan_forward(model_shapes(name)))
    assert all(len(phase) > 132 for phase in (phases[0], phases[-1]))


sizes = st.one_of(st.integers(1, 40), st.integers(1, 3000))
layer_shapes = st.tuples(st.integers(1, 9), sizes, sizes)


@given(
    shapes=st.lists(layer_shapes, min_size=1, max_size=12),
    dtype=st.sampled_from(list(ELEMENT_SIZE)),
    v_first=st.booleans(),
    n_power_iterations=st.integers(1, 3),
    update=st.booleans(),
    tickets=st.integers(1, 300),
    max_columns=st.sampled_from([1, 64, 1 << 30]),
)
def test_any_list(shapes, dtype, v_first, n_power_iterations, update, tickets, max_columns):
    plan = _C.plan_forward(shapes, dtype, v_first, n_power_iterations, update, tickets, max_columns)
    check_forward(plan, shapes, v_first, n_power_iterations, update)
    check_backward(_C.plan_backward(shapes, dtype, tickets), shapes)
    assert len(tickets_of(plan)[1][0]) <= 2 * tickets


def test_more_than_two_to_the_31_elements():
    plan = _C.plan_forward([(1, 70_000, 40_000), (3, 5, 7)])
    check_forward(plan, [(1, 70_000, 40_000), (3, 5, 7)], False, 1, True)


def test_impossible_launches_are_refused():
    with pytest.raises(ValueError, match="between 1 and"):
        _C.plan_forward([])
    with pytest.raises(ValueError, match="at least 1"):
        _C.plan_backward([(1, 0, 3)])
    with pytest.raises(ValueError, match="expected float32"):
        _C.plan_forward([(1, 2, 3)], "int8")
    with pytest.raises(ValueError, match="at most 68719476736 elements"):
        _C.plan_forward([(2**40, 2**40, 2**40)])


@pytest.mark.parametrize("value", [0, -5])
@pytest.mark.parametrize("name", ["tickets", "max_columns", "n_power_iterations"])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least 1"):
        _C.plan_forward([(1, 20, 30)], **{name: value})
    if name == "tickets":
        with pytest.raises(ValueError, match=f"{name} is {value}, expected at least 1"):
            _C.plan_backward([(1, 20, 30)], tickets=value)


def test_description_of_too_many_iterations_is_refused():
    with pytest.raises(ValueError, match="n_power_iterations is 2147483647, expected at most"):
        _C.plan_forward([(1, 2, 3)], n_power_iterations=2**31 - 1)
