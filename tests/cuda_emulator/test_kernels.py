"""The CUDA kernels, emulated, against float64: tests of every backend, and some of their own."""

import math

import lists
import pytest
import samples
import stock
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_any_list import layer_lists
from test_numeric import (  # noqa: F401  tests of every backend are collected here once more
    DTYPES,
    ORDERS,
    check_backward,
    check_forward,
    normalize,
    test_backward_of_odd_gradients,
    test_eps_clamps_as_in_stock,
    test_every_half_is_converted_and_rounded_as_in_torch,
    test_gradient_of_sigma,
    test_non_finite_weights_propagate,
    test_scales,
    test_strides_are_kept,
    test_two_forwards_then_backward_of_the_first,
    test_zero_weight,
)
from test_vectors import (  # noqa: F401  and these
    test_a_weight_without_sigma_leaves_the_vectors,
    test_averaged_vectors_are_rewritten_by_no_rule,
    test_bad_vectors_restart_and_the_layer_is_normalized,
    test_evaluation_with_bad_vectors_is_nan,
    test_large_float32_weights_are_normalized,
    test_one_bad_vector_of_a_zero_weight_restarts,
    test_small_weights_leave_good_vectors_for_when_they_have_grown,
    test_vectors_that_are_orthogonal_to_the_weight_restart,
)

MAX_LAYERS = 120  # kMaxLayers of csrc/cuda/tables.h


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_list_has_rows_of_every_width(dtype):
    native = pytest.importorskip("spectral_ext._C")
    shapes = [(1, shape[0], math.prod(shape[1:])) for shape, _, _ in lists.ALL]
    groups = {layer["row_group"] for layer in native.plan_forward(shapes, dtype)["layers"]}
    assert groups == {-1, *range(8)}  # kWide and kRowGroups of csrc/cuda/tables.h


@pytest.mark.parametrize("n_power_iterations", [1, 2, 3, None], ids=["1", "2", "3", "eval"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_of_all_kinds(backend, dtype, order, n_power_iterations):
    n = n_power_iterations or 1
    stride = 3 if n == 2 else 1
    layers = lists.layers(dtype=dtype, stride=stride, order=order, n_power_iterations=n)
    check_forward(layers, n_power_iterations is not None, backend)


@pytest.mark.parametrize("update", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_of_all_kinds(backend, dtype, update):
    layers = lists.layers(dtype=dtype)
    grads = [
        None if i % 5 == 2 else samples.in_layout(torch.randn(la.weight.shape).to(dtype), layout)
        for i, (la, (_, _, layout)) in enumerate(zip(layers, lists.ALL, strict=True))
    ]
    check_backward(layers, grads, update, backend)


@pytest.mark.parametrize("n_power_iterations", [2, None], ids=["2", "eval"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_wider_than_registers(backend, emulated, dtype, order, n_power_iterations):
    emulated.max_columns = 24
    layers = lists.layers(
        lists.TINY, dtype, stride=2, order=order, n_power_iterations=n_power_iterations or 1
    )
    check_forward(layers, n_power_iterations is not None, backend)


def test_more_layers_than_a_launch_takes(backend):
    layers = [
        samples.layer((1 + i % 7, 1 + i % 11), dtype=(torch.float32, torch.bfloat16)[i % 3 == 0])
        for i in range(2 * MAX_LAYERS + 7)
    ]
    check_backward(layers, [torch.randn_like(la.weight) for la in layers], True, backend)
    check_forward(layers, True, backend)


@pytest.mark.parametrize("max_columns", [1 << 30, 24], ids=["registers", "wide"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("zero_rows", [0, 40], ids=["full", "zero rows first"])
@pytest.mark.parametrize(
    ("dtype", "exponent"), [(torch.float32, -30), (torch.float32, 30), (torch.float64, 140)]
)
def test_extreme_scales(emulated, backend, dtype, exponent, zero_rows, order, max_columns):
    """Products t·w leave the range of float; stock's norms do, too, and cannot be the yardstick."""
    emulated.max_columns = max_columns
    layer = samples.layer((70, 60), dtype=torch.float64, eps=1e-305, order=order)
    layer.weight[:zero_rows] = 0
    truth = stock.forward(layer)
    scaled = layer.to(dtype)
    scaled.weight = (layer.weight * 10.0**exponent).to(dtype)
    normalized, sigmas = normalize([scaled], backend=backend)
    assert stock.error(normalized[0], truth.weight) < 1e-6
    assert abs(sigmas.double().item() / 10.0**exponent / truth.sigma.item() - 1) < 1e-6
    assert stock.error(scaled.u, truth.u) < 1e-5
    assert stock.error(scaled.v, truth.v) < 1e-5


@st.composite
def calls(draw):
    """Lists of layers of one dtype, with gradients for some of them."""
    layers = draw(layer_lists([draw(st.sampled_from(DTYPES))], max_size=5))
    grads = [torch.randn_like(la.weight) if draw(st.booleans()) else None for la in layers]
    return layers, grads


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    call=calls(),
    update=st.booleans(),
    tickets=st.sampled_from([1, 3, 264]),
    max_columns=st.sampled_from([1, 100, 1 << 30]),
)
def test_any_list(emulated, backend, call, update, tickets, max_columns):
    emulated.tickets, emulated.max_columns = tickets, max_columns
    layers, grads = call
    if any(grad is not None for grad in grads):
        check_backward([la.to(la.weight.dtype) for la in layers], grads, update, backend)
    check_forward(layers, update, backend)
