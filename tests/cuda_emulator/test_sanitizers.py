"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The first two run everything at -O1 with all dtypes; to AddressSanitizer the tensors of a call are
islands in memory that must not be touched. ThreadSanitizer keeps a history for each of 1024 CUDA
threads, so it gets tiny layers; it needs no unlucky schedule to see a race. test_planted_bugs.py
shows what both of them notice.
"""

import emulator
import lists
import pytest
import samples
import torch
from test_numeric import DTYPES, ORDERS, check_backward, check_forward


def check_both(dtype, order, n_power_iterations, kinds):
    n = n_power_iterations or 1
    layers = lists.layers(kinds, dtype, stride=2, order=order, n_power_iterations=n)
    check_forward(layers, n_power_iterations is not None, "emulated")
    grads = [
        None if i % 4 == 3 else samples.in_layout(torch.randn(shape).to(dtype), layout)
        for i, (shape, _, layout) in enumerate(kinds)
    ]
    layers = lists.layers(kinds, dtype, order=order)
    check_backward(layers, grads, n_power_iterations is not None, "emulated")


@pytest.mark.parametrize("n_power_iterations", [2, None], ids=["2", "eval"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_and_undefined_behavior(programs, emulate, dtype, order, n_power_iterations):
    emulated = emulate(emulator.build(programs, "address"))
    emulated.schedules = [emulator.SCHEDULES[1], emulator.SCHEDULES[2]]
    small = [kind for kind in lists.ALL if torch.Size(kind[0]).numel() < 16_000]
    check_both(dtype, order, n_power_iterations, small)
    emulated.max_columns = 24
    check_both(dtype, order, n_power_iterations, lists.TINY)


@pytest.mark.parametrize("max_columns", [1 << 30, 24], ids=["registers", "wide"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_races(programs, emulate, dtype, order, max_columns):
    emulated = emulate(emulator.build(programs, "thread"))
    emulated.schedules, emulated.max_columns = emulator.ALL_RESIDENT, max_columns
    check_both(dtype, order, 2, lists.TINY)


def test_ucontext(programs, emulate):
    """The way that fibers switch on other processors than x86-64."""
    flags = ["-O0", "-DEMULATOR_FLOAT32_ONLY", "-DEMULATOR_UCONTEXT"]
    emulated = emulate(emulator.build(programs, "plain", flags=flags))
    emulated.schedules = emulator.SCHEDULES[1:]
    check_both(torch.float32, "u_first", 2, lists.TINY)
