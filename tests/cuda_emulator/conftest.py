"""Makes the emulated CUDA kernels the backend of all tests here, on small layers."""

import os

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
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_emulator"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture
def emulated(monkeypatch, programs):
    """The emulated kernels as a backend, named `emulated`, whose settings a test may change."""
    backend = emulator.Emulator(emulator.build(programs, "plain"))
    monkeypatch.setitem(backends._chosen, ("emulated", torch.device("cpu")), backend)
    return backend


@pytest.fixture
def backend(emulated):
    """The name of the backend for tests that are shared with others."""
    return "emulated"
