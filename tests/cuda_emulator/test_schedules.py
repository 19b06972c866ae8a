"""Neither schedule, grid, number of resident CTAs nor their order changes a bit."""

import lists
import options
import pytest
import torch
from emulator import Schedule
from test_numeric import DTYPES, ORDERS, check_backward, check_forward

MANY = [
    Schedule(True, 1, 1, 0),
    *(Schedule(True, grid, grid, seed) for seed, grid in enumerate((2, 7, 64), start=100)),
    *(Schedule(True, 64, resident, seed) for seed, resident in enumerate((1, 2, 33), start=200)),
    *(Schedule(False, grid, 4, seed) for seed, grid in enumerate((1, 3, 64), start=300)),
    *(Schedule(True, 6, 4, seed) for seed in range(400, 410)),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_same(emulated, backend, dtype, order):
    emulated.schedules = MANY
    layers = lists.layers(lists.TINY, dtype, order=order, n_power_iterations=2)
    check_forward(layers, True, backend)
    check_backward(layers, [torch.randn_like(la.weight) for la in layers], True, backend)
    layers = lists.layers(lists.TINY, dtype, order=order, n_power_iterations=4)
    options.check(emulated, options.mixed(layers, True), True)
