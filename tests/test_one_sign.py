"""Sums of numbers of one sign, whose rounding errors add up, by the tolerance rule of stock.py."""

import pytest
import stock
import torch
from test_numeric import ORDERS, check_forward

SHAPES = [(600, 500), (3000, 40), (40, 3000)]
SMALL = [(600, 40), (1500, 8), (8, 1500)]  # where kernels are slow


def layer_of(shape, pattern, **settings):
    u, v = (torch.rand(size, dtype=torch.float64) + 0.1 for size in shape)
    weight = torch.full(shape, 0.1, dtype=torch.float64)
    if pattern == "positive":
        weight = torch.rand(shape, dtype=torch.float64)
    if pattern == "alternating":
        weight = weight.abs() * (1 - 2 * (torch.arange(shape[1]) % 2))
        v = v * (1 - 2 * (torch.arange(shape[1]) % 2))
    vectors = ((x / x.norm()).float() for x in (u, v))
    return stock.Layer(weight.float(), *vectors, **settings)


@pytest.mark.parametrize("n_power_iterations", [1, 3, None], ids=["1", "3", "eval"])
@pytest.mark.parametrize("pattern", ["equal", "positive", "alternating"])
@pytest.mark.parametrize("order", ORDERS)
def test_numbers_of_one_sign(backend, order, pattern, n_power_iterations):
    settings = {"order": order, "n_power_iterations": n_power_iterations or 1}
    shapes = SHAPES if backend in ("reference", "cpu") else SMALL
    layers = [layer_of(shape, pattern, **settings) for shape in shapes]
    check_forward(layers, n_power_iterations is not None, backend)
