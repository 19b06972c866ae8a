"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The first two run everything at -O1 with all dtypes; to AddressSanitizer the tensors of a call are
islands in memory that must not be touched. ThreadSanitizer keeps a history for each of 1024 CUDA
threads, so it gets tiny layers; it needs no unlucky schedule to see a race. test_planted_bugs.py
shows what both of them notice.
"""

import math

import emulator
import lists
import pytest
import samples
import torch
from test_numeric import DTYPES, check_backward, check_forward


def check_forward_of(kinds, dtype, n_power_iterations):
    n = n_power_iterations or 1
    layers = lists.layers(kinds, dtype, stride=2, n_power_iterations=n)
    check_forward(layers, n_power_iterations is not None, "emulated")


def check_backward_of(kinds, dtype, update=True):
    grads = [
        None if i % 4 == 3 else samples.in_layout(torch.randn(shape).to(dtype), layout)
        for i, (shape, _, layout) in enumerate(kinds)
    ]
    check_backward(lists.layers(kinds, dtype), grads, update, "emulated")


@pytest.mark.parametrize("n_power_iterations", [2, None], ids=["2", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_and_undefined_behavior(programs, emulate, dtype, n_power_iterations):
    emulated = emulate(emulator.build(programs, "address"))
    emulated.schedules = [emulator.SCHEDULES[1], emulator.SCHEDULES[2]]
    small = [kind for kind in lists.ALL if math.prod(kind[0]) < 16_000]
    check_forward_of(small, dtype, n_power_iterations)
    check_backward_of(small, dtype, n_power_iterations is not None)
    emulated.max_columns = 24
    check_forward_of(lists.TINY, dtype, n_power_iterations)


@pytest.mark.parametrize("max_columns", [1 << 30, 24], ids=["registers", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_races_of_the_forward(programs, emulate, dtype, max_columns):
    emulated = emulate(emulator.build(programs, "thread"))
    emulated.schedules, emulated.max_columns = emulator.ALL_RESIDENT, max_columns
    check_forward_of(lists.TINY, dtype, 2)


def test_races_of_the_backward(programs, emulate):
    emulate(emulator.build(programs, "thread")).schedules = emulator.ALL_RESIDENT
    check_backward_of(lists.TINY, torch.float32)


def test_ucontext(programs, emulate):
    """The way that fibers switch on other processors than x86-64."""
    flags = ["-O0", "-DEMULATOR_ONLY=float", "-DEMULATOR_UCONTEXT"]
    emulated = emulate(emulator.build(programs, "plain", flags=flags))
    emulated.schedules = emulator.SCHEDULES[1:]
    check_backward_of(lists.TINY[:4], torch.float32)
