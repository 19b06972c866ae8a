"""u and v are never zero and never NaN or infinite, in every backend; see spectral_ext/reference.py."""

import math

import pytest
import samples
import stock
import torch
from test_numeric import DTYPES, ORDERS, check_forward, normalize

from spectral_ext.reference import start_vector

# Several tiles, blocks and pieces of work; rows and columns in other orders of memory.
SHAPES = [((5, 7), 0, "contiguous"), ((37, 20, 2, 4), 1, "channels_last"), ((41, 144), 0, "offset")]
TALL = [((600, 33), 0, "contiguous"), ((300, 70, 3), 2, "reversed"), ((3, 9001), 0, "contiguous")]
BAD = {"zero": 0.0, "NaN": math.nan, "infinite": math.inf}


def layers_of(backend, dtype=torch.float32, **settings):
    shapes = SHAPES + TALL if backend in ("reference", "cpu") else SHAPES  # others are slow here
    return [samples.layer(shape, dim, dtype, layout, **settings) for shape, dim, layout in shapes]


def assert_restarted(found, alternating=False):
    expected = start_vector(found.double(), alternating)
    tolerance = 2 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-9)


def check_like_reference(layers, backend):
    """Raise unless a training forward of layers without σ ends as the specification says."""
    copies = [one.with_tensors(one.weight.clone(), one.u.clone(), one.v.clone()) for one in layers]
    found, expected = (
        [*normalize(part, backend=name), *([v for one in part for v in (one.u, one.v)],)]
        for part, name in ((layers, backend), (copies, "reference"))
    )
    torch.testing.assert_close(found, expected, equal_nan=True)


def without_sigma(layers):
    """Change layers, of which there are at least five, so that each has another reason for no σ."""
    for vector in (layers[0].u, layers[0].v, layers[1].v):
        vector.zero_()
    layers[2].v[-1] = math.nan
    layers[3].weight.zero_()
    past = layers[4]  # orthogonal to all but the last element
    past.weight.zero_()
    past.weight.view(-1)[-1] = 3
    past.u[0] = past.v[0] = 0.5
    past.u[-1] = past.v[-1] = 0
    for one in layers[5:]:
        one.weight.zero_()
        one.u.zero_()
    return layers


@pytest.mark.parametrize("order", ORDERS)
def test_layers_without_sigma_of_all_kinds_in_one_call(backend, order):
    layers = layers_of(backend, order=order) + layers_of(backend, order=order)
    layers[4] = samples.layer((40, 30), order=order)
    check_like_reference(without_sigma(layers), backend)


def assert_usable(layer):
    for vector in (layer.u, layer.v):
        assert vector.isfinite().all() and vector.any()


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 1000, 65537])
def test_start_vectors_are_unit_vectors_of_entries_that_differ(size, alternating):
    vector = start_vector(torch.empty(size), alternating)
    assert abs(vector.double().norm() - 1) < 1e-6
    assert (vector > 0).sum() == (size // 2 if alternating else size)
    assert vector.diff().abs().gt(0).all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_vectors_restart_and_the_layer_is_normalized(backend, dtype, order, bad, wide):
    """One forward shows the fault, and the next one is that of PyTorch from good vectors."""
    if wide and dtype.itemsize > 2:
        pytest.skip("the vectors have the dtype to compute in anyway")
    layers, good = layers_of(backend, dtype, order=order), samples.layer((6, 5), dtype=dtype)
    for layer in layers:
        layer.u.fill_(BAD[bad])
        layer.v.fill_(BAD[bad])
        if wide:
            layer.u, layer.v = layer.u.float(), layer.v.float()
    normalized, sigmas = normalize([*layers, good], backend=backend)
    for layer, weight, sigma in zip(layers, normalized, sigmas, strict=False):
        if bad == "zero":
            assert sigma == 0 and torch.equal(weight, layer.weight)
        else:
            assert sigma.isnan() and weight.isnan().all()
        assert_restarted(layer.u, bad == "infinite")
        assert_restarted(layer.v, bad == "infinite")
    assert sigmas[-1] > 0 and normalized[-1].isfinite().all()
    if not wide:
        check_forward(layers, True, backend)


@pytest.mark.parametrize("which", ["u", "v"])
@pytest.mark.parametrize("order", ORDERS)
def test_one_bad_vector_of_a_zero_weight_restarts(backend, order, which):
    layers = layers_of(backend, order=order)
    for layer in layers:
        layer.weight.zero_()
        getattr(layer, which).zero_()
    normalize(layers, backend=backend)
    for layer in layers:
        assert_restarted(layer.u, which == "v" and layer.u[0] < 0)
        assert_restarted(layer.v, which == "u" and layer.v[0] < 0)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_without_sigma_leaves_the_vectors(backend, dtype, order, value):
    """The next forward of a good weight goes on from them."""
    layers = layers_of(backend, dtype, order=order)
    weights = [layer.weight.clone() for layer in layers]
    before = [(layer.u.clone(), layer.v.clone()) for layer in layers]
    for layer in layers:
        if value == 0:
            layer.weight.zero_()
        else:
            layer.weight[..., -1] = value
    normalized, _ = normalize(layers, backend=backend)
    assert value == 0 or all(weight.isnan().any() for weight in normalized)
    for layer, (u, v), weight in zip(layers, before, weights, strict=True):
        assert torch.equal(layer.u, u) and torch.equal(layer.v, v)
        layer.weight = weight
    check_forward(layers, True, backend)


@pytest.mark.parametrize("first", [0.0, 0.5, -0.5])
@pytest.mark.parametrize("order", ORDERS)
def test_vectors_that_are_orthogonal_to_the_weight_restart(backend, order, first):
    """The weight is not zero though σ is; of the two vectors to restart from, one is another."""
    layers = layers_of(backend, order=order)
    for layer in layers:
        if order == "u_first":
            rest = layer.v
            matrix = torch.zeros_like(layer.weight.movedim(layer.dim, 0)).flatten(1)
            matrix[:, 1] = 0.1
            layer.v = torch.zeros_like(rest)
            layer.v[0], layer.v[-1] = first, 0.7
        else:
            matrix = torch.zeros_like(layer.weight.movedim(layer.dim, 0)).flatten(1)
            matrix[1] = 0.1
            layer.u = torch.zeros_like(layer.u)
            layer.u[0], layer.u[-1] = first, 0.7
        moved = layer.weight.movedim(layer.dim, 0)
        moved.copy_(matrix.view(moved.shape))
    normalized, sigmas = normalize(layers, backend=backend)
    assert sigmas.eq(0).all()
    for layer, weight in zip(layers, normalized, strict=True):
        assert torch.equal(weight, layer.weight)
        assert_restarted(layer.v if order == "u_first" else layer.u, first > 0)
    check_forward(layers, True, backend)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["u", "v", "both"])
def test_evaluation_with_bad_vectors_is_nan(backend, which, bad):
    """And writes nothing: what looks normalized must be."""
    layers = layers_of(backend)
    for layer in layers:
        for name in "uv" if which == "both" else which:
            getattr(layer, name).fill_(BAD[bad])
    before = [(layer.u.clone(), layer.v.clone()) for layer in layers]
    normalized, sigmas = normalize(layers, update=False, backend=backend)
    assert sigmas.isnan().all() and all(weight.isnan().all() for weight in normalized)
    for layer, (u, v) in zip(layers, before, strict=True):
        assert torch.equal(layer.u.nan_to_num(7), u.nan_to_num(7))
        assert torch.equal(layer.v.nan_to_num(7), v.nan_to_num(7))


@pytest.mark.parametrize("exponent", [20, 25, 30, 33])
@pytest.mark.parametrize("order", ORDERS)
def test_large_float32_weights_are_normalized(backend, order, exponent):
    layer = samples.layer((60, 50), dtype=torch.float64, order=order, n_power_iterations=3)
    truth = stock.forward(layer)
    scaled = layer.to(torch.float32)
    scaled.weight = (layer.weight * 10.0**exponent).float()
    normalized, sigmas = normalize([scaled], backend=backend)
    assert stock.error(normalized[0], truth.weight) < 1e-5
    assert abs(sigmas.double().item() / 10.0**exponent / truth.sigma.item() - 1) < 1e-5
    assert stock.error(scaled.u, truth.u) < 1e-5 and stock.error(scaled.v, truth.v) < 1e-5


@pytest.mark.parametrize("exponent", [-8, -13, -16, -20, -30, -40])
@pytest.mark.parametrize("order", ORDERS)
def test_small_weights_leave_good_vectors_for_when_they_have_grown(backend, order, exponent):
    """Below eps every iteration shortens the vectors, until they restart."""
    layer = samples.layer((60, 50), order=order)
    layer.weight[0] *= 5  # a singular value that is far from the others
    weight = layer.weight
    for _ in range(12):
        layer.weight = weight * 10.0**exponent
        normalize([layer], backend=backend)
        assert_usable(layer)
    layer.weight = weight
    for _ in range(4):
        normalize([layer], backend=backend)
    assert abs(layer.u.norm() - 1) < 1e-5 and abs(layer.v.norm() - 1) < 1e-5
    layer.n_power_iterations = 40
    _, sigmas = normalize([layer], backend=backend)
    assert abs(sigmas.item() / torch.linalg.matrix_norm(weight, 2).item() - 1) < 1e-4


@pytest.mark.parametrize("order", ORDERS)
def test_averaged_vectors_are_rewritten_by_no_rule(backend, order):
    """They are neither zero nor infinite: only divided by their norms, and only in evaluation."""
    layer = samples.layer((60, 50), order=order)
    layer.u, layer.v = layer.u * 0.3, layer.v * 1e-3
    u, v = layer.u.clone(), layer.v.clone()
    _, sigmas = normalize([layer], update=False, backend=backend)
    assert torch.equal(layer.u, u) and torch.equal(layer.v, v)
    sigma = (
        u.double() @ layer.weight.double() @ v.double() / (u.double().norm() * v.double().norm())
    )
    assert abs(sigmas.item() / sigma.item() - 1) < 1e-5
