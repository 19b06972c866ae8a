"""A short run of the machine; ``make fuzz`` makes a long one."""

import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from long_run import profile
from machine import machine
from registry import OPERATIONS


@pytest.fixture(autouse=True)
def quiet():
    """Ignore the warnings that a user gets for some of the operations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_fused_model_does_what_its_twin_does():
    """The same examples each time; ``make fuzz`` draws others."""
    short = settings(profile(60), derandomize=True)
    run_state_machine_as_test(machine(), settings=short)


def test_there_are_at_least_thirty_operations():
    assert len(OPERATIONS) >= 30
