"""What layers may have beyond stock, by the emulated CUDA kernels, all of it beside all of it."""

import emulator
import lists
import options
import pytest
import samples
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_half_outputs import (  # noqa: F401  tests of every backend are collected here once more
    test_half_outputs_are_the_float_ones_rounded_once,
    test_weights_of_several_dtypes,
)
from test_numeric import DTYPES, ORDERS
from test_options import (  # noqa: F401  and these
    test_a_weight_within_its_bound_is_left_alone,
    test_a_zero_weight_stays_zero_whatever_the_target,
    test_averaged_vectors_count_as_unit_vectors_in_evaluation,
    test_evaluation_reports_no_iterations,
    test_non_finite_weights_propagate,
    test_plain_layers_keep_their_bits_beside_others,
    test_project_writes_the_weights,
    test_tolerance_of_weights_without_a_direction,
)


@pytest.mark.parametrize("max_columns", [1 << 30, 24], ids=["registers", "wide"])
@pytest.mark.parametrize("n_power_iterations", [1, 4, None], ids=["1", "4", "eval"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_options(emulated, dtype, order, n_power_iterations, max_columns):
    emulated.max_columns = max_columns
    kinds = lists.TINY if max_columns == 24 else lists.ALL
    layers = lists.layers(kinds, dtype, 2, order, n_power_iterations=n_power_iterations or 1)
    update = n_power_iterations is not None
    options.check(emulated, options.mixed(layers, update), update)


@pytest.mark.parametrize("order", ORDERS)
def test_stopping_is_the_same_as_fewer_iterations(emulated, order):
    """To the bit, beside layers that go on."""
    layers = [
        options.restarted(samples.layer((33, 300), order=order, n_power_iterations=6, tol=tol))
        for tol in (0.6, 0.3, 0.2, 0.1, 1e-9)
    ]
    plain = [layer.plain() for layer in layers]
    results = options.forward(emulated, layers, True)
    made = results.iterations.tolist()
    assert len(set(made)) > 2  # or there is nothing to see
    for layer, count in zip(plain, made, strict=True):
        layer.n_power_iterations = int(count)
    expected = options.forward(emulated, plain, True)
    assert all(map(torch.equal, results.outputs, expected.outputs))
    assert torch.equal(results.saved, expected.saved)
    assert torch.equal(results.sigmas, expected.sigmas)
    assert all(torch.equal(a.u, b.u) for a, b in zip(layers, plain, strict=True))


@st.composite
def calls(draw):
    """Layers of one compute dtype with any options, and whether to update their vectors."""
    update = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtypes = draw(st.sampled_from([[torch.float64], [torch.float32, *options.HALF]]))
    result = []
    for _ in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
        layer = samples.layer(
            shape,
            draw(st.integers(0, len(shape) - 1)),
            draw(st.sampled_from(dtypes)),
            draw(st.sampled_from(samples.LAYOUTS)),
            order=draw(st.sampled_from(ORDERS)),
            n_power_iterations=draw(st.integers(1, 5)),
        )
        layer = options.with_options(layer, **draw(st.sampled_from(options.OPTIONS)))
        layer.tol = draw(st.sampled_from([0.0, 0.02, 0.1, 0.3]))
        if update and draw(st.booleans()):
            layer = options.restarted(layer)
        if draw(st.booleans()):
            layer = options.with_wide_vectors(layer)
        if not update and draw(st.booleans()):
            layer.u, layer.v = layer.u / 2, layer.v * 1.5
        result.append(layer)
    return result, update


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    call=calls(),
    in_place=st.booleans(),
    with_grad_sigmas=st.booleans(),
    tickets=st.sampled_from([1, 3, 264]),
    max_columns=st.sampled_from([1, 100, 1 << 30]),
    seed=st.integers(1, 1000),
)
def test_any_options(
    emulated,
    call,
    in_place,
    with_grad_sigmas,
    tickets,
    max_columns,
    seed,
):
    layers, update = call
    emulated.tickets, emulated.max_columns = tickets, max_columns
    emulated.schedules = (*emulator.SCHEDULES, emulator.Schedule(True, 9, 4, seed))
    dtype = torch.promote_types(layers[0].weight.dtype, torch.float32)
    grad_sigmas = torch.randn(len(layers), dtype=dtype) if with_grad_sigmas else None
    options.check(emulated, layers, update, in_place, grad_sigmas=grad_sigmas)
