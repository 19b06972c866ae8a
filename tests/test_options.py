"""What layers may have beyond stock: targets, tolerances, wide and averaged vectors, projection."""

import itertools
import math
from dataclasses import replace

import pytest
import samples
import torch
from samples import options_of
from stock import check, error, forward, iterate
from torch.autograd import gradcheck, gradgradcheck

from spectral_ext.functional import project_, spectral_normalize

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ORDERS = ["u_first", "v_first"]


def run(layers, update=True, backend=None, weights=None, **more):
    """Call the list API on layers with their options; u and v are updated in place."""
    return spectral_normalize(
        weights or [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        update=update,
        backend=backend,
        **options_of(layers),
        **more,
    )


def layer_with(shape, dtype=torch.float32, **options):
    return replace(samples.layer(shape, dtype=dtype), **options)


def mixed(dtype=torch.float32, order="u_first", shapes=None):
    """Return layers of all shapes with targets in turn, bounds on both sides of each layer's σ."""
    layers = []
    for i, (shape, dim) in enumerate(shapes or samples.SHAPES):
        layer = samples.layer(shape, dim, dtype, order=order)
        sigma = forward(layer.to(torch.float64)).sigma.item()
        for name, value in [
            {},
            {"scale": 2.5},
            {"bound": 0.5 * sigma},
            {"bound": 2 * sigma},
            {"detach_sigma": True},
            {"bound": 0.7 * sigma, "detach_sigma": True},
            {"scale": 0.3, "detach_sigma": True},
        ][i % 7].items():
            setattr(layer, name, value)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("update", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets(backend, dtype, order, update):
    """Forward and backward by the rule of stock.py, every target beside every other."""
    layers = mixed(dtype, order)
    before = [layer.to(dtype) for layer in layers]
    grads = [torch.randn_like(layer.weight) for layer in layers]
    weights = [layer.weight.requires_grad_() for layer in layers]
    normalized, sigmas = run(layers, update, backend)
    found = torch.autograd.grad(normalized, weights, grads)
    for i, (layer, old, grad) in enumerate(zip(layers, before, grads, strict=True)):
        gradients, outcomes = [], []
        for precision in (dtype, torch.float64):
            copy = old.to(precision)
            copy.weight.requires_grad_()
            outcomes.append(forward(copy, update))
            gradients += torch.autograd.grad(outcomes[-1].weight, copy.weight, grad.to(precision))
        own, truth = outcomes
        name = f"{i}: {tuple(old.weight.shape)}"
        check(f"weight {name}", normalized[i], own.weight, truth.weight)
        check(f"sigma {name}", sigmas[i], own.sigma, truth.sigma)
        check(f"u {name}", layer.u, own.u, truth.u)
        check(f"v {name}", layer.v, own.v, truth.v)
        size = (grad.double().norm() / truth.sigma * (layer.bound or layer.scale)).item()
        check(f"gradient {name}", found[i], *gradients, scale=size)


def test_plain_layers_keep_their_bits_beside_others(backend):
    layers = mixed()
    plain = [layer.plain() for layer in layers]
    grads = [torch.randn_like(layer.weight) for layer in layers]
    results = []
    for part in (layers, plain):
        weights = [layer.weight.detach().requires_grad_() for layer in part]
        normalized, sigmas = run(part, True, backend, weights)
        gradients = torch.autograd.grad(normalized, weights, grads)
        vectors = [vector for layer in part for vector in (layer.u, layer.v)]
        results.append((normalized, gradients, vectors))
        assert sigmas.isfinite().all()
    (normalized, gradients, vectors), expected = results
    assert all(map(torch.equal, vectors, expected[2]))  # whatever the target
    for i in range(0, len(layers), 7):
        assert torch.equal(normalized[i], expected[0][i])
        assert torch.equal(gradients[i], expected[1][i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_within_its_bound_is_left_alone(backend, dtype):
    """To the bit, and so is its gradient; also at the bound itself, and with u, v that see σ < 0."""
    layer = samples.layer((9, 6), dtype=dtype)
    weight = layer.weight.requires_grad_()
    (_,), sigmas = run([layer], False, backend)
    grad = torch.randn_like(weight)
    for bound, sign in ((sigmas.item(), 1), (1e-3, -1)):
        layer.bound, layer.u = bound, sign * layer.u
        (normalized,), _ = run([layer], False, backend)
        assert torch.equal(normalized, weight)
        (found,) = torch.autograd.grad(normalized, weight, grad)
        assert torch.equal(found, grad)


def test_a_zero_weight_stays_zero_whatever_the_target(backend):
    for options in ({"scale": 3.0}, {"bound": 0.5}, {"scale": 2.0, "detach_sigma": True}):
        layer = layer_with((6, 4), **options)
        layer.weight.zero_()
        u, weight = layer.u.clone(), layer.weight.requires_grad_()
        (normalized,), sigmas = run([layer], True, backend)
        assert torch.equal(normalized, torch.zeros(6, 4)) and sigmas.item() == 0
        assert torch.equal(layer.u, u)
        (found,) = torch.autograd.grad(normalized.sum(), weight)
        assert torch.equal(found, torch.ones(6, 4))


@pytest.mark.parametrize("options", [{"scale": 2.0}, {"bound": 0.5}, {"bound": 0.5, "tol": 0.1}])
def test_non_finite_weights_propagate(backend, options):
    layers = [layer_with((6, 40), n_power_iterations=3, **options) for _ in range(2)]
    layers[0].weight[2, 3] = math.nan
    normalized, sigmas = run(layers, True, backend)
    assert normalized[0].isnan().all() and sigmas[0].isnan()
    assert normalized[1].isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(backend, order):
    """First and second derivatives, by outputs and by σ; constants of the forward stay constants."""
    shapes = [((3, 4), 0), ((2, 3, 2), 1), ((1, 5), 0), ((4, 1), 0)]
    if (
        backend == "triton"
    ):  # is interpreted: the smallest of the four targets that a gradient knows
        shapes = [((2, 2), 0), ((2, 1), 0), ((2, 2), 1), ((1, 2), 0)]
    layers = mixed(torch.float64, order, shapes)
    weights = [layer.weight.requires_grad_() for layer in layers]

    def f(*_):
        normalized, sigmas = run(layers, False, backend)
        return (*normalized, sigmas)

    assert gradcheck(f, weights, check_batched_grad=True)
    assert gradgradcheck(f, weights, check_batched_grad=True)


@pytest.mark.parametrize("bound", [None, 0.5])
def test_second_derivative_with_a_constant_sigma(backend, bound):
    """gradcheck cannot know the constant: compare with the formula c·W/σ written down with one."""
    layer = samples.layer((4, 3), dtype=torch.float64, detach_sigma=True)
    layer.bound = bound and bound * forward(layer).sigma.item()
    weight = layer.weight.requires_grad_()
    (normalized,), sigmas = run([layer], False, backend)
    constant = (layer.bound or 1) / sigmas.detach()
    (first,) = torch.autograd.grad(normalized.pow(3).sum(), weight, create_graph=True)
    assert error(first, 3 * constant**3 * weight**2) < 1e-12
    (second,) = torch.autograd.grad(first.pow(2).sum(), weight)
    assert error(second, 36 * constant**6 * weight**3) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_tolerance(backend, dtype, order):
    """Each layer stops by its own tolerance, after as many steps as counted here one by one."""
    layers = [
        samples.layer(shape, dim, dtype, order=order, n_power_iterations=6, tol=tol)
        for (shape, dim), tol in zip(
            samples.SHAPES, itertools.cycle([0.3, 0.0, 0.1, 5e-3, 0.02]), strict=False
        )
    ]
    before = [layer.to(dtype) for layer in layers]
    report = torch.empty(2, len(layers))
    normalized, sigmas = run(layers, True, backend, convergence=report)
    residuals, iterations = report
    assert len(set(iterations.tolist())) > 2  # or there is nothing to see
    for i, (layer, old) in enumerate(zip(layers, before, strict=True)):
        steps, residual = iterate(old.to(torch.float64))
        name = f"{i}: {tuple(old.weight.shape)}"
        assert iterations[i] == steps, name
        if layer.tol == 0:
            assert residuals[i].isnan()
        else:
            assert abs(residuals[i].item() - residual) < (4e-3 if dtype == torch.float32 else 1e-7)
        # Those steps and no other: the same bits as without a tolerance.
        plain = old.to(dtype).plain()
        plain.n_power_iterations = steps
        (expected,), sigma = run([plain], True, backend)
        assert torch.equal(normalized[i], expected) and torch.equal(sigmas[i], sigma[0]), name
        assert torch.equal(layer.u, plain.u) and torch.equal(layer.v, plain.v), name


@pytest.mark.parametrize("order", ORDERS)
def test_tolerance_of_weights_without_a_direction(backend, order):
    """Zero has converged at once; NaN never does."""
    zero, nan = (samples.layer((6, 4), order=order, n_power_iterations=3, tol=0.5) for _ in "12")
    zero.weight.zero_()
    nan.weight.fill_(math.nan)
    residuals, iterations = report = torch.empty(2, 2)
    _, sigmas = run([zero, nan], True, backend, convergence=report)
    assert sigmas[0] == 0 and sigmas[1].isnan()
    assert residuals[0] == 0 and residuals[1].isnan()
    assert iterations.tolist() == [1, 3]


def test_evaluation_reports_no_iterations(backend):
    layers = [samples.layer((6, 4), tol=0.5), samples.layer((3, 5))]
    residuals, iterations = report = torch.empty(2, 2)
    run(layers, False, backend, convergence=report)
    assert residuals.isnan().all() and iterations.tolist() == [0, 0]
    residuals, iterations = report = torch.empty(2, 1)
    run(layers[1:], True, backend, convergence=report)
    assert residuals.isnan().all() and iterations.tolist() == [1]


def test_tolerance_of_mixed_dtypes_and_vectors(backend):
    """Layers of several calls and of the reference are reported in their places."""
    layers = [
        samples.layer((30, 20), dtype=torch.float64, n_power_iterations=3, tol=1e-9),
        samples.layer((9,)),
        samples.layer((30, 20), n_power_iterations=4),
        samples.layer((3, 2), dtype=torch.float64, n_power_iterations=50, tol=0.9),
    ]
    layers[1].u = layers[1].v = None
    residuals, iterations = report = torch.empty(2, 4)
    run(layers, True, backend, convergence=report)
    assert iterations.tolist() == [3, 0, 4, 1]
    assert 0 < residuals[0] < 1 and residuals[2].isnan() and 0 <= residuals[3] <= 0.9


@pytest.mark.parametrize("update", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_vectors_of_half_precision_weights(backend, dtype, order, update):
    layers = [
        samples.layer(shape, dim, dtype, order=order, n_power_iterations=2)
        for shape, dim in samples.SHAPES
    ]
    for layer in layers:
        layer.u, layer.v = layer.u.float(), layer.v.float()
        layer.u, layer.v = layer.u / layer.u.norm(), layer.v / layer.v.norm()
    before = [(layer.weight.float(), layer.u.clone(), layer.v.clone()) for layer in layers]
    normalized, sigmas = run(layers, update, backend)
    for i, (layer, (weight, u, v)) in enumerate(zip(layers, before, strict=True)):
        plain = layer.with_tensors(weight, u, v)
        own, truth = forward(plain, update), forward(plain.to(torch.float64), update)
        assert layer.u.dtype == layer.v.dtype == torch.float32
        check(f"u {i}", layer.u, own.u, truth.u)
        check(f"v {i}", layer.v, own.v, truth.v)
        check(f"sigma {i}", sigmas[i], own.sigma, truth.sigma)
        check(f"weight {i}", normalized[i], own.weight.to(dtype), truth.weight)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averaged_vectors_count_as_unit_vectors_in_evaluation(backend, dtype, order):
    """An average of unit vectors is shorter than one. σ, the weight and its gradient are as without that."""
    layers = [samples.layer(shape, dim, dtype, order=order) for shape, dim in samples.SHAPES]
    shorter = [layer.to(dtype) for layer in layers]
    for layer in shorter:
        layer.u, layer.v = layer.u / 2, layer.v / 4  # powers of two: no rounding
    results = []
    for part in (layers, shorter):
        weights = [layer.weight.detach().requires_grad_() for layer in part]
        normalized, sigmas = run(part, False, backend, weights)
        gradients = torch.autograd.grad(
            (*normalized, sigmas), weights, (*(w.detach() for w in weights), sigmas.detach())
        )
        results.append((*normalized, *gradients, *sigmas))
    half = dtype in (torch.bfloat16, torch.float16)
    for found, expected in zip(results[1], results[0], strict=True):
        # The vectors of half precision have a norm of 1 within 2^-8 only.
        assert error(found, expected.double()) < (3e-2 if half else 1e-5)
    for layer, old in zip(shorter, layers, strict=True):
        assert torch.equal(layer.u, old.u / 2) and torch.equal(layer.v, old.v / 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_writes_the_weights(backend, dtype):
    layers = mixed(dtype)
    for layer in layers:
        layer.detach_sigma = False
    copies = [layer.to(dtype) for layer in layers]
    versions = [layer.weight._version for layer in layers]
    expected, sigmas = run(copies, True, backend)
    options = options_of(layers)
    options.pop("detach_sigma")
    found = project_(
        [layer.weight for layer in layers],
        [layer.u for layer in layers],
        [layer.v for layer in layers],
        backend=backend,
        **options,
    )
    assert torch.equal(found, sigmas)
    for layer, copy, weight, version in zip(layers, copies, expected, versions, strict=True):
        assert torch.equal(layer.weight, weight)
        is_same = torch.equal(weight, copy.weight)
        assert (layer.weight._version > version) != is_same
        assert torch.equal(layer.u, copy.u) and torch.equal(layer.v, copy.v)


def test_project_takes_any_weight(backend):
    """Strided, of several dtypes, a vector, one that requires a gradient, complex: each in its place."""
    weights = [
        samples.in_layout(torch.randn(6, 5), "strided"),
        torch.randn(4, 3, dtype=torch.float64),
        torch.randn(7),
        torch.randn(5, 4, requires_grad=True),
        torch.randn(4, 4, dtype=torch.complex64),
        samples.in_layout(torch.randn(4, 3, 2, 2), "channels_last"),
    ]
    before = [weight.detach().clone() for weight in weights]
    us = [samples.unit(w.shape[0], torch.float64).to(w.dtype) for w in weights]
    vs = [samples.unit(w[0].numel(), torch.float64).to(w.dtype) for w in weights]
    us[2] = vs[2] = None
    sigmas = project_(weights, us, vs, n_power_iterations=60, bound=0.5, backend=backend)
    for weight, old, sigma in zip(weights, before, sigmas, strict=True):
        old, new = (x.reshape(len(x), -1) for x in (old, weight.detach()))
        truth = torch.linalg.matrix_norm(old.to(torch.complex128), 2)
        assert abs(sigma / truth - 1) < 1e-4
        assert abs(torch.linalg.matrix_norm(new.to(torch.complex128), 2) - 0.5) < 1e-4
        assert error((new / new.norm()).abs(), (old / old.norm()).abs().double()) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": 0.0}, "weights.1.: bound must be positive"),
        ({"bound": -1.0}, "weights.1.: bound must be positive"),
        ({"bound": math.inf}, "weights.1.: bound must be positive and finite"),
        ({"scale": 0.0}, "weights.1.: scale must be positive"),
        ({"scale": math.nan}, "weights.1.: scale must be positive and finite"),
        ({"tol": -1e-3}, "weights.1.: tol must be not negative"),
        ({"tol": math.nan}, "weights.1.: tol must be not negative and finite"),
        ({"scale": 2.0, "bound": 1.0}, "weights.1.: scale=2.0 and bound=1.0 exclude"),
    ],
)
def test_bad_values_name_the_layer_before_anything_is_written(options, message):
    layers = [samples.layer((4, 3)), layer_with((4, 3), **options)]
    u = layers[0].u.clone()
    with pytest.raises(ValueError, match=message):
        run(layers)
    assert torch.equal(layers[0].u, u)


def test_a_report_of_another_shape_is_refused():
    layer = samples.layer((4, 3))
    for wrong, kind in ((torch.empty(2, 2), ValueError), (torch.ones(2, 1).int(), TypeError)):
        with pytest.raises(kind, match="convergence must"):
            run([layer], convergence=wrong)


@pytest.mark.parametrize("name", ["scale", "bound", "tol", "detach_sigma"])
def test_bad_types_name_the_argument(name):
    layer = samples.layer((4, 3))
    setattr(layer, name, "1")
    with pytest.raises(TypeError, match=rf"weights\[0\]: {name} must be a"):
        run([layer])


def test_project_refuses_weights_that_share_memory():
    weight, u, v = torch.randn(3, 1).expand(3, 4), torch.ones(3), torch.ones(4)
    with pytest.raises(ValueError, match="elements share memory"):
        project_([weight], [u], [v])
    weight = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="overlap in memory"):
        project_([weight, weight], [u, u.clone()], [v, v.clone()])
