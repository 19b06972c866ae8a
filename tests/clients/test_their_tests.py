"""Tests that packages ship for their own models have the same outcomes when the models are fused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import prepare
import pytest
from clients import CLIENTS
from install import source
from required import require

HERE = Path(__file__).parent
Outcomes = dict[str, dict[str, str | int]]


def run(folder: Path, tests: tuple[str, ...], outcomes: Path, *options: str) -> Outcomes:
    """Run tests in a folder with the plugin, in a process of their own."""
    paths = (str(HERE), str(HERE.parents[1]))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *tests, "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-p", "autofuse", "--outcomes", str(outcomes), *options]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert outcomes.exists(), done.stdout + done.stderr
    return json.loads(outcomes.read_text())


def run_twice(
    folder: Path, tests: tuple[str, ...], results: Path, *options: str
) -> tuple[Outcomes, Outcomes]:
    stock = run(folder, tests, results / "stock.json", "--as-they-are", *options)
    return stock, run(folder, tests, results / "fused.json", *options)


def differences(stock: Outcomes, fused: Outcomes) -> dict[str, tuple[object, object]]:
    names = stock.keys() | fused.keys()
    pairs = {name: (stock.get(name, {}), fused.get(name, {})) for name in names}
    return {k: (a, b) for k, (a, b) in pairs.items() if a.get("outcome") != b.get("outcome")}


@pytest.mark.first
@pytest.mark.parametrize("name", [name for name, client in CLIENTS.items() if client.tests])
def test_their_tests_do_not_see_that_the_model_is_fused(name, tmp_path):
    require(name)
    client = CLIENTS[name]
    function = name.replace("-", "_")
    options = ("--prepare", function) if hasattr(prepare, function) else ()
    stock, fused = run_twice(source(client), client.tests, tmp_path, *options)
    assert not differences(stock, fused)
    assert len(stock) == len(client.tests)
    for test in stock:
        assert stock[test]["outcome"] == "passed in call", stock[test]
        assert stock[test]["layers"] > 0 and fused[test]["layers"] > 0


SUITE = """
import torch
from torch import nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as parametrized


def model():
    return nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Sequential(parametrized(nn.Linear(4, 2))))


def test_shape():
    net = model()
    for _ in range(2):
        assert net(torch.randn(2, 3)).shape == (2, 2)


def test_class():
    net = model()
    net(torch.randn(2, 3))
    assert type(net).__mro__[1] is nn.Module


def test_without_a_norm():
    assert nn.Linear(3, 4)(torch.zeros(1, 3)).shape == (1, 4)
"""


def test_a_test_that_sees_the_class_of_the_root_is_a_difference(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    stock, fused = run_twice(tmp_path, ("test_suite.py",), tmp_path)
    assert list(differences(stock, fused)) == ["test_suite.py::test_class"]
    layers = {name.partition("::")[2]: outcome["layers"] for name, outcome in fused.items()}
    assert layers == {"test_shape": 2, "test_class": 2, "test_without_a_norm": 0}
