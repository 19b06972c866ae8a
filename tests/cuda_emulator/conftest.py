"""Makes the emulated CUDA kernels the backend of all tests here, on small layers."""

import os
import shutil
import sys

import emulator
import pytest
import samples
import torch

from spectral_ext import backends


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    """Give tests of other backends a list that an emulator can run."""
    shapes = [((37, 1), 0), ((1, 13), 0), ((70, 30), 0), ((3, 20, 5), 1), ((16, 7, 4, 4), 1)]
    monkeypatch.setattr(samples, "SHAPES", shapes)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The directory of compiled programs, which all test processes share."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the emulator is compiled by GCC, and was made for Linux")
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_emulator"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture
def emulate(monkeypatch):
    """Return a function that makes what a command runs the backend of the name `emulated`."""

    def register(command):
        backend = emulator.Emulator(command)
        monkeypatch.setitem(backends._chosen, ("emulated", torch.device("cpu")), backend)
        return backend

    return register


@pytest.fixture
def emulated(programs, emulate):
    """The emulated kernels as a backend, whose settings a test may change."""
    return emulate(emulator.build(programs, "alignment"))


@pytest.fixture
def backend(emulated):
    """The name of the backend for tests that are shared with others."""
    return "emulated"
