"""Every backend against float64, by the tolerance rule of stock.py."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import samples
import stock
import torch
from torch.autograd import gradcheck, gradgradcheck

from spectral_ext.functional import spectral_normalize

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ORDERS = ["u_first", "v_first"]


def normalize(layers, update=True, backend=None):
    """Call the list API on the layers; their u and v are updated in place."""
    return spectral_normalize(
        [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        n_power_iterations=[layer.n_power_iterations for layer in layers],
        eps=[layer.eps for layer in layers],
        dims=[layer.dim for layer in layers],
        order=[layer.order for layer in layers],
        update=update,
        backend=backend,
    )


def check_forward(layers, update, backend):
    before = [layer.to(layer.weight.dtype) for layer in layers]
    normalized, sigmas = normalize(layers, update, backend)
    for i, (layer, old) in enumerate(zip(layers, before, strict=True)):
        own, truth = stock.forward(old, update), stock.forward(old.to(torch.float64), update)
        name = f"{i}: {tuple(old.weight.shape)} dim {old.dim}"
        assert normalized[i].dtype == layer.weight.dtype
        stock.check(f"weight {name}", normalized[i], own.weight, truth.weight)
        stock.check(f"sigma {name}", sigmas[i], own.sigma, truth.sigma)
        stock.check(f"u {name}", layer.u, own.u, truth.u)
        stock.check(f"v {name}", layer.v, own.v, truth.v)
        if not update:
            assert torch.equal(layer.u, old.u) and torch.equal(layer.v, old.v)


@pytest.mark.parametrize("layout", samples.LAYOUTS)
@pytest.mark.parametrize("n_power_iterations", [1, 3, None], ids=["1", "3", "eval"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(backend, dtype, order, n_power_iterations, layout):
    layers = samples.layers(dtype, layout, order=order, n_power_iterations=n_power_iterations or 1)
    check_forward(layers, n_power_iterations is not None, backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
def test_strides_are_kept(backend, layout):
    layers = samples.layers(layout=layout)
    normalized, _ = normalize(layers, backend=backend)
    for layer, weight in zip(layers, normalized, strict=True):
        assert weight.stride() == layer.weight.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_many_iterations_find_the_norm(backend, order, dtype):
    layer = samples.layer((40, 23), dtype=dtype, order=order, n_power_iterations=200)
    _, sigmas = normalize([layer], backend=backend)
    truth = torch.linalg.matrix_norm(layer.weight.double(), 2)
    assert abs(sigmas[0].item() / truth.item() - 1) < 1e-5


@pytest.mark.parametrize("divisor", [1.0, 3.0, 2.0**-7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_converted_and_rounded_as_in_torch(backend, dtype, divisor):
    """With u, v the first unit vectors σ is the first element: all other quotients are known."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = torch.where(values.isfinite(), values, 0).reshape(256, 256).clone()
    weight[0, 0] = divisor
    unit = torch.zeros(256, dtype=dtype)
    unit[0] = 1
    (normalized,), _ = spectral_normalize(
        [weight], [unit], [unit.clone()], update=False, backend=backend
    )
    assert torch.equal(normalized, (weight.float() / divisor).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_of_a_gradient_comes_back(backend, dtype):
    """Where σ is a constant 1: infinities, NaN and subnormals, each in its place."""
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    grad = grad.reshape(256, 256)
    weight, unit = torch.zeros(256, 256, dtype=dtype), torch.zeros(256, dtype=dtype)
    weight[0, 0] = unit[0] = 1
    weight.requires_grad_()
    (normalized,), _ = spectral_normalize(
        [weight], [unit], [unit.clone()], update=False, detach_sigma=True, backend=backend
    )
    (found,) = torch.autograd.grad(normalized, weight, grad)
    assert torch.equal(found.isnan(), grad.isnan())
    assert torch.equal(found.nan_to_num(nan=0), grad.nan_to_num(nan=0))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("order", ORDERS)
def test_scales(backend, order, scale):
    layers = [
        samples.layer(shape, dim, scale=scale, order=order, n_power_iterations=5)
        for shape, dim in samples.SHAPES
    ]
    check_forward(layers, True, backend)


@pytest.mark.parametrize("zero_rows", [0, 300], ids=["full", "zero rows first"])
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, e) for e in (-30, -18, 18, 30)] + [(torch.float64, e) for e in (-140, 140)],
    ids=str,
)
def test_extreme_scales(dtype, exponent, zero_rows):
    """Here t·row leaves the range of float, and stock's norms do; the native kernels rescale. Norms are
    summed in double: float64 weights may go to about 1e±150, in stock and here.

    The zero rows fill a block of work of their own, which must not spoil the others' scale.
    """
    layer = samples.layer((700, 300), dtype=torch.float64, eps=1e-305)
    layer.weight[:zero_rows] = 0
    truth = stock.forward(layer)
    scaled = layer.to(dtype)
    scaled.weight = (layer.weight * 10.0**exponent).to(dtype)
    normalized, sigmas = normalize([scaled], backend="cpu")
    assert stock.error(normalized[0], truth.weight) < 1e-6
    assert abs(sigmas.double().item() / 10.0**exponent / truth.sigma.item() - 1) < 1e-6
    assert stock.error(scaled.u, truth.u) < 1e-5
    assert stock.error(scaled.v, truth.v) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "sigma"),
    [
        (torch.float32, 1e-39),
        (torch.float32, 3e38),
        (torch.float64, 2e-309),
        (torch.bfloat16, 3e38),
    ],
    ids=str,
)
def test_sigma_whose_reciprocal_is_not_normal(backend, dtype, sigma):
    one = torch.ones(1, dtype=dtype)
    weight = torch.tensor([[sigma]], dtype=dtype)
    (normalized,), sigmas = spectral_normalize(
        [weight], [one], [one.clone()], update=False, backend=backend
    )
    assert normalized.item() == 1 and sigmas.item() == weight.item()


@pytest.mark.parametrize("eps", [1e-12, 0.5, 1e3])
@pytest.mark.parametrize("order", ORDERS)
def test_eps_clamps_as_in_stock(backend, order, eps):
    check_forward(
        samples.layers(order=order, eps=eps, n_power_iterations=2, scale=0.01), True, backend
    )


@pytest.mark.parametrize("name", samples.MODELS)
def test_models(name):
    """Whole real models in one call; the largest layers are left to the benchmark's check."""
    check_forward(samples.model(name, limit=3_000_000), True, "cpu")


def gradients(layers, grads, update=True, backend=None, grad_sigmas=None):
    """Return the gradients of the weights, None for a weight whose output has none."""
    weights = [layer.weight.detach().requires_grad_() for layer in layers]
    layers = [
        stock.Layer(w, la.u, la.v, la.dim, la.n_power_iterations, la.eps, la.order)
        for w, la in zip(weights, layers, strict=True)
    ]
    normalized, sigmas = normalize(layers, update, backend)
    pairs = [(y, g) for y, g in zip(normalized, grads, strict=True) if g is not None]
    if grad_sigmas is not None:
        pairs.append((sigmas, grad_sigmas))
    outputs, grad_outputs = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, weights, grad_outputs, allow_unused=True)


def check_backward(layers, grads, update, backend):
    before = [layer.to(layer.weight.dtype) for layer in layers]
    found = gradients(layers, grads, update, backend)
    for i, (old, grad) in enumerate(zip(before, grads, strict=True)):
        if grad is None:
            assert found[i] is None
            continue
        expected = []
        for dtype in (grad.dtype, torch.float64):
            layer = old.to(dtype)
            layer.weight.requires_grad_()
            outcome = stock.forward(layer, update)
            expected += torch.autograd.grad(outcome.weight, layer.weight, grad.to(dtype))
        # The two terms of the gradient, each as large as G/σ, may cancel.
        scale = (grad.double().norm() / outcome.sigma.abs()).item()
        name = f"gradient {i}: {tuple(old.weight.shape)} dim {old.dim}"
        stock.check(name, found[i], *expected, scale)


@pytest.mark.parametrize("layout", samples.LAYOUTS)
@pytest.mark.parametrize("update", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(backend, dtype, order, update, layout):
    layers = samples.layers(dtype, layout, order=order)
    grads = [torch.randn_like(layer.weight) for layer in layers]
    check_backward(layers, grads, update, backend)


def test_backward_of_odd_gradients(backend):
    """Missing gradients, and gradients in another layout than the weight."""
    layers = samples.layers()
    for layout in ("reversed", "strided", "expanded", "channels_last"):
        grads = [
            None if i % 3 == 1 else samples.in_layout(torch.randn(layer.weight.shape), layout)
            for i, layer in enumerate(layers)
        ]
        check_backward(layers, grads, True, backend)


def test_gradient_of_sigma(backend):
    layers = samples.layers(torch.float64)
    grad_sigmas = torch.randn(len(layers), dtype=torch.float64)
    grads = [torch.randn_like(la.weight) if i % 2 else None for i, la in enumerate(layers)]
    found = gradients(layers, grads, False, backend, grad_sigmas)
    for i, layer in enumerate(layers):
        weight = layer.weight.detach().requires_grad_()
        matrix = weight.movedim(layer.dim, 0).reshape(len(layer.u), -1)
        sigma = torch.dot(layer.u, matrix @ layer.v)
        total = grad_sigmas[i] * sigma
        if grads[i] is not None:
            total = total + (weight / sigma * grads[i]).sum()
        (expected,) = torch.autograd.grad(total, weight)
        assert stock.error(found[i], expected) < 1e-12


def test_frozen_weights_get_no_gradient(backend):
    frozen, free = samples.layer((4, 5)), samples.layer((6, 3))
    free.weight.requires_grad_()
    normalized, sigmas = normalize([frozen, free], backend=backend)
    (sum(y.sum() for y in normalized) + sigmas.sum()).backward()
    assert frozen.weight.grad is None and free.weight.grad is not None


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(backend, order):
    shapes = [((3, 4), 0), ((2, 3, 2), 1), ((1, 5), 0), ((4, 1), 0)]
    if backend == "triton":  # is interpreted
        shapes = [((2, 3), 0), ((2, 2, 1), 1), ((1, 3), 0), ((2, 1), 0)]
    layers = [samples.layer(shape, dim, torch.float64, order=order) for shape, dim in shapes]
    weights = [layer.weight.requires_grad_() for layer in layers]

    def f(*_):
        normalized, sigmas = normalize(layers, update=False, backend=backend)
        return (*normalized, sigmas)

    assert gradcheck(f, weights, check_batched_grad=True)
    assert gradgradcheck(f, weights, check_batched_grad=True)


def test_gradcheck_beside_frozen_weights(backend):
    """The places of the free weights differ from their numbers among those that get a gradient."""
    shapes = [(3, 4), (2, 2), (4, 3), (3, 2)]
    layers = [samples.layer(shape, dtype=torch.float64) for shape in shapes]
    free = [layers[1].weight.requires_grad_(), layers[3].weight.requires_grad_()]

    def f(*_):
        normalized, sigmas = normalize(layers, update=False, backend=backend)
        return normalized[1], normalized[3], sigmas

    assert gradcheck(f, free, check_batched_grad=True)
    assert gradgradcheck(f, free)


def test_vector_gradcheck(backend):
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def f(weight):
        normalized, sigmas = spectral_normalize([weight], [None], [None], backend=backend)
        return normalized[0], sigmas

    assert gradcheck(f, [weight]) and gradgradcheck(f, [weight])


def test_two_forwards_then_backward_of_the_first(backend):
    layers = samples.layers(torch.float64)
    first = [layer.to(torch.float64) for layer in layers]
    grads = [torch.randn_like(layer.weight) for layer in layers]
    for layer in layers:
        layer.weight.requires_grad_()
    normalized, _ = normalize(layers, backend=backend)
    normalize(layers, backend=backend)
    found = torch.autograd.grad(normalized, [layer.weight for layer in layers], grads)
    expected = gradients(first, grads, True, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_optimizer_step_between_two_backwards(backend):
    """Stock raises here, because its graph holds the weights."""
    layer = samples.layer((8, 5), dtype=torch.float64)
    layer.weight.requires_grad_()
    (normalized,), _ = normalize([layer], backend=backend)
    grad = torch.randn_like(normalized)
    (first,) = torch.autograd.grad(normalized, layer.weight, grad, retain_graph=True)
    with torch.no_grad():
        layer.weight.add_(1)
    (second,) = torch.autograd.grad(normalized, layer.weight, grad)
    assert torch.equal(first, second)


@pytest.mark.parametrize("order", ORDERS)
def test_zero_weight(backend, order):
    """σ = 0: zeros and not NaN, the identity's gradient, and u, v ready for when it leaves zero."""
    zero, other = samples.layer((6, 4), order=order), samples.layer((5, 3), order=order)
    zero.weight.zero_()
    u, v = zero.u.clone(), zero.v.clone()
    zero.weight.requires_grad_()
    normalized, sigmas = normalize([zero, other], backend=backend)
    assert torch.equal(normalized[0], torch.zeros(6, 4)) and sigmas[0] == 0 and sigmas[1] > 0
    assert torch.equal(zero.u, u) and torch.equal(zero.v, v)
    grad = torch.randn(6, 4)
    (found,) = torch.autograd.grad(normalized[0], zero.weight, grad)
    assert torch.equal(found, grad)
    zero.weight = torch.randn(6, 4)
    check_forward([zero], True, backend)


def test_zero_sigma_of_a_weight_that_is_not_zero(backend):
    """In evaluation, with vectors that look past the weight: it is passed through, and its gradient."""
    weight = torch.eye(2).requires_grad_()
    u, v = torch.eye(2)
    (normalized,), sigmas = spectral_normalize([weight], [u], [v], update=False, backend=backend)
    assert torch.equal(normalized, weight) and sigmas.item() == 0
    grad, grad_sigma = torch.randn(2, 2), torch.randn(1)
    (found,) = torch.autograd.grad((normalized, sigmas), weight, (grad, grad_sigma))
    torch.testing.assert_close(found, grad + grad_sigma * torch.outer(u, v))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("order", ORDERS)
def test_non_finite_weights_propagate(backend, order, value):
    layers = [samples.layer((6, 40), order=order) for _ in range(2)]
    layers[0].weight[2, 3] = value
    expected = stock.forward(layers[0].to(torch.float32))
    normalized, sigmas = normalize(layers, backend=backend)
    assert normalized[0].isnan().all() and expected.weight.isnan().all()
    assert sigmas[0].isnan() and not sigmas[1].isnan()
    assert normalized[1].isfinite().all()


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_complex(backend, order, update):
    layer = samples.layer((5, 7), dtype=torch.float64, order=order)
    layer.u, layer.v = layer.u * (0.6 + 0.8j), layer.v * (0.8 - 0.6j)
    layer.weight = torch.randn(5, 7, dtype=torch.complex128, requires_grad=True)
    before = copy.deepcopy(layer)
    (normalized,), sigmas = normalize([layer], update, backend)
    if order == "u_first":
        expected = stock.forward(before, update)
        assert torch.allclose(normalized, expected.weight, rtol=1e-12)
        assert torch.allclose(layer.u, expected.u) and torch.allclose(layer.v, expected.v)
    assert sigmas.dtype == torch.float64
    assert normalized.abs().square().sum().backward() is None and layer.weight.grad is not None


def test_vectors(backend):
    """Stock divides a 1-D weight by its norm under the parametrization; under the hook it is a column."""
    weight = torch.randn(9)
    (normalized,), sigmas = spectral_normalize([weight], [None], [None], backend=backend)
    assert torch.allclose(normalized, torch.nn.functional.normalize(weight, dim=0))
    assert torch.allclose(sigmas[0], weight.norm())
    check_forward([samples.layer((9,), order="v_first")], True, backend)


def test_empty_list(backend):
    assert spectral_normalize([], [], [], backend=backend)[0] == []
    assert spectral_normalize([], [], [], backend=backend)[1].shape == (0,)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype, order):
    def run(threads):
        torch.manual_seed(3)
        layers = samples.layers(dtype, order=order, n_power_iterations=2)
        grads = [torch.randn_like(layer.weight) for layer in layers]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            weights = gradients(layers, grads, True, "cpu")
        finally:
            torch.set_num_threads(before)
        return [*weights, *(layer.u for layer in layers), *(layer.v for layer in layers)]

    single = run(1)
    for threads in (2, 3, 8):
        for a, b in zip(single, run(threads), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "narrowed"),
    [(dtype, None) for dtype in DTYPES] + [(torch.float32, dtype) for dtype in DTYPES[2:]],
    ids=str,
)
def test_bits_do_not_depend_on_the_size_of_the_call(dtype, narrowed):
    """Large calls write past the caches, from odd places on."""

    def run(*others):
        torch.manual_seed(3)
        layer = samples.layer((1003, 501), dtype=dtype)
        weight = layer.weight.requires_grad_()
        (normalized, *_), _ = spectral_normalize(
            [weight, *(other.weight for other in others)],
            [layer.u, *(other.u for other in others)],
            [layer.v, *(other.v for other in others)],
            dtype=narrowed,
            backend="cpu",
        )
        (gradient,) = torch.autograd.grad(normalized, weight, torch.randn_like(normalized))
        return normalized, gradient

    large = samples.layer((2048, 2048))  # 16 MiB
    for a, b in zip(run(), run(large), strict=True):
        assert torch.equal(a, b)


def test_weight_of_more_than_2_gib():
    """Byte offsets beyond 32 bits, forward and backward."""
    needed = 12 << 30
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, {available >> 30} are there")
    torch.use_deterministic_algorithms(False)  # do not poison gigabytes
    weight = torch.ones(32771, 16421).requires_grad_()
    with torch.no_grad():
        weight[-1] = 2
    u, v = samples.unit(32771, torch.float32), torch.ones(16421) / math.sqrt(16421)
    (normalized,), sigmas = spectral_normalize([weight], [u], [v], backend="cpu")
    sigma = math.sqrt(16421 * (32770 + 4))  # rank one
    assert abs(sigmas.item() / sigma - 1) < 1e-4  # sums of equal numbers round the same way
    assert abs(normalized[-1, -1].item() * sigma / 2 - 1) < 1e-4
    (gradient,) = torch.autograd.grad(normalized[-1].sum(), weight)
    expected = (1 - 16421 * 2 / sigma * u[-1] * v[-1]) / sigma
    assert abs(gradient[-1, -1] - expected) < 1e-3 * abs(expected) + 1e-9


def test_baseline_instructions():
    """The kernels for processors without AVX2 pass the same tests."""
    if os.environ.get("SPECTRAL_EXT_CPU_LEVEL"):
        pytest.skip("this is the run with another level")
    chosen = (
        "forward or backward or scales or zero or threads or every_half or size or nan or rounded"
    )
    selection = f"({chosen}) and not reference and not triton"
    files = [__file__, str(Path(__file__).with_name("test_half_outputs.py"))]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *files, "-k", selection],
        env={**os.environ, "SPECTRAL_EXT_CPU_LEVEL": "baseline"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
