"""Settings that PyTorch takes are taken: NumPy's numbers, and an eps of 0."""

import json

import numpy as np
import pytest
import stock
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

import spectral_ext
from spectral_ext import functional, fuse

NUMPY = {"n_power_iterations": np.int64(3), "eps": np.float32(1e-6), "dim": np.int32(1)}
PYTHON = {"n_power_iterations": 3, "eps": float(np.float32(1e-6)), "dim": 1}
STOCK = {"u_first": parametrizations.spectral_norm, "v_first": spectral_norm}


def test_numpy_settings_of_a_list(backend):
    weights = [torch.randn(4, 6), torch.randn(5, 3)]
    us, vs = [torch.randn(4), torch.randn(5)], [torch.randn(6), torch.randn(3)]
    found = []
    for kinds in ((np.int64, np.float32), (int, float)):
        integer, real = kinds
        copies = [[x.clone() for x in vectors] for vectors in (us, vs)]
        settings = {
            "n_power_iterations": [integer(2), integer(9)],
            "eps": real(0.5),
            "dims": integer(0),
            "tol": real(0.25),
            "scale": [real(2), real(1)],
            "bound": [None, real(0.5)],
            "blocks": integer(1),
        }
        outputs, sigmas = functional.spectral_normalize(
            weights, *copies, backend=backend, **settings
        )
        found.append([*outputs, sigmas, *copies[0], *copies[1]])
    for numpy, python in zip(*found, strict=True):
        assert torch.equal(numpy, python)


@pytest.mark.parametrize("order", STOCK)
@pytest.mark.parametrize("norm", ["stock", "own"])
def test_numpy_settings_of_a_layer_alone_and_fused(order, norm, backend):
    def net(settings):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)
        if norm == "stock":
            STOCK[order](layer, **settings)
        else:
            spectral_ext.spectral_norm(layer, order=order, **settings)
        return nn.Sequential(layer)

    x = torch.randn(2, 6)
    for fused in (False, True):
        found, expected = net(NUMPY), net(PYTHON)
        if fused:
            for each in (found, expected):
                fuse(each, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(found(x), expected(x))


def test_a_numpy_setting_may_be_assigned_later():
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4)))
    group = fuse(net)
    net(torch.randn(2, 6))
    norm = net[0].parametrizations.weight[0]
    norm.n_power_iterations, norm.eps = np.int64(3), np.float64(0)
    net(torch.randn(2, 6))
    assert group.iterations.tolist() == [3]
    json.dumps(spectral_ext.report(net).to_dict())
    norm.n_power_iterations = np.bool_(True)
    with pytest.raises(TypeError, match="n_power_iterations must be an int"):
        net(torch.randn(2, 6))


@pytest.mark.parametrize("order", STOCK)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1.0), (torch.float32, 1e-16), (torch.float64, 1e-16), (torch.float64, 1e-30)],
)
def test_eps_0_gives_the_numbers_of_stock(order, dtype, size, backend):
    """A weight of size 1e-16 is far below the default of 1e-12: what is divided by eps comes out small."""
    torch.manual_seed(0)
    weight, u, v = (size * torch.randn(5, 7)).to(dtype), torch.randn(5), torch.randn(7)
    u, v = (nn.functional.normalize(x.to(dtype), dim=0) for x in (u, v))
    expected = stock.forward(stock.Layer(weight, u, v, eps=0.0, order=order, n_power_iterations=2))
    outputs, sigmas = functional.spectral_normalize(
        [weight], [u], [v], eps=0.0, order=order, n_power_iterations=2, backend=backend
    )
    for found, truth in ((outputs[0], expected.weight), (u, expected.u), (v, expected.v)):
        torch.testing.assert_close(found, truth)
    torch.testing.assert_close(sigmas[0], expected.sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", STOCK)
@pytest.mark.parametrize("eps", [0.0, 1e-50])
@pytest.mark.parametrize("settings", [{}, {"bound": 1.0}, {"tol": 1e-2, "n_power_iterations": 4}])
def test_a_zero_weight_stays_finite_with_an_eps_that_float32_does_not_have(
    order, eps, settings, backend
):
    weights = [torch.zeros(5, 7), torch.zeros(6), torch.zeros(4, 3, dtype=torch.bfloat16)]
    us = [torch.ones(5) / 5**0.5, torch.ones(6) / 6**0.5, torch.ones(4) / 2]
    vs = [torch.ones(7) / 7**0.5, torch.ones(1), torch.ones(3) / 3**0.5]
    outputs, sigmas = functional.spectral_normalize(
        weights, us, vs, eps=eps, order=order, backend=backend, **settings
    )
    assert not any(output.any() or output.isnan().any() for output in outputs)
    assert sigmas.abs().max() < 1e-37
    for vector in (*us, *vs):
        assert torch.linalg.vector_norm(vector).item() == pytest.approx(1)


@pytest.mark.parametrize("order", STOCK)
def test_stock_layers_with_eps_0_are_fused(order):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(STOCK[order](nn.Linear(6, 4), eps=0.0))

    found, expected, x = net(), net(), torch.randn(2, 6)
    fuse(found)
    for _ in range(3):
        torch.testing.assert_close(found(x), expected(x))


def test_numpy_settings_of_an_operator_norm():
    x = torch.randn(1, 2, 8, 8)
    outputs = []
    for integer, real in ((np.int64, np.float32), (int, float)):
        torch.manual_seed(0)
        layer = spectral_ext.nn.operator_norm(
            nn.Conv2d(2, 3, 3),
            input_size=(integer(8), 8),
            n_power_iterations=integer(2),
            eps=real(0),
            scale=real(2),
        )
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs)
    layer.parametrizations.weight.original.data.zero_()
    assert not layer.weight.any() and all(b.isfinite().all() for b in layer.buffers())


REFUSED = {
    "n_power_iterations": ["2", 2.0, True, np.float64(2)],
    "eps": ["small", True, None],
    "dim": ["0", True, 0.0],
    "tol": ["small", True],
    "scale": ["2", True],
    "bound": ["2", True],
    "blocks": ["2", True, 1.0],
    "detach_sigma": ["no", 1],
    "per_group": ["no", 1],
    "name": [3],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_other_types_are_refused_by_name(name, value):
    layer = nn.Linear(4, 4)
    with pytest.raises(TypeError, match=name):
        spectral_ext.spectral_norm(layer, **{name: value})
    assert not parametrize.is_parametrized(layer)


@pytest.mark.parametrize("value", ["3", True, 3.0])
def test_max_power_iterations_of_another_type_is_refused_by_name(value):
    with pytest.raises(TypeError, match="max_power_iterations must be an int"):
        spectral_ext.spectral_norm(nn.Linear(4, 4), tol=1e-2, max_power_iterations=value)


def test_update_of_another_type_is_refused_by_name():
    with pytest.raises(TypeError, match="update must be a bool"):
        functional.spectral_normalize([torch.eye(3)], [torch.ones(3)], [torch.ones(3)], update="no")


def test_float8_is_refused_by_its_name():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    for call in (spectral_ext.spectral_norm, spectral_ext.SpectralProjection):
        with pytest.raises(TypeError, match=r"float8_e4m3fn weights are not supported; convert"):
            call(layer)
