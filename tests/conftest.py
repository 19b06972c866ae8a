"""Fixtures of all tests: backends, poisoned memory, reproducible hypothesis runs."""

import os

import minutes
import pytest
import torch
import triton_interpreter

if not torch.cuda.is_available():
    triton_interpreter.ask_for()

import samples

from spectral_ext import backends

try:
    import hypothesis
except ImportError:  # the tests on a device do without: `make gpu` installs nothing
    pass
else:
    hypothesis.settings.register_profile(
        "default", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
    )
    hypothesis.settings.load_profile("default")

# Test processes run side by side; threads that wait for each other's cores would slow all of them.
torch.set_num_threads(1)

CPU = torch.device("cpu")
CPU_BACKENDS = [name for name in backends.names() if backends.unavailable(name, CPU) is None]
if "triton" in CPU_BACKENDS:
    triton_interpreter.improve()


def pytest_report_header() -> str:
    """Say why a run begins slowly."""
    return "tests marked `first` take minutes each and start first; the others then pass quickly"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what takes minutes first: at the end one process would wait for the other."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many minutes each group of tests took, summed over the test processes."""
    found = [report for reports in terminalreporter.stats.values() for report in reports]
    seconds = minutes.seconds_by_group(r for r in found if isinstance(r, pytest.TestReport))
    if sum(seconds.values()) < 60:  # who runs one file reads --durations
        return
    terminalreporter.section("minutes by group, summed over the test processes")
    for line in minutes.table(seconds):
        terminalreporter.line(line)


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that computes on CPU tensors here; the interpreter's gets small samples."""
    if request.param == "triton":
        monkeypatch.setattr(samples, "SHAPES", samples.SMALL_SHAPES)
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what `torch.empty` returns with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random numbers."""
    torch.manual_seed(0)
