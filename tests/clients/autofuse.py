"""A pytest plugin that fuses every model at its first call: ``pytest -p autofuse --outcomes FILE``.

A model is the module of an outermost call whose tree has a spectral norm of PyTorch. ``--as-they-are``
counts the models and fuses none. FILE becomes a JSON object: for each test its outcome, and how many
layers were fused, or could have been.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from threading import local
from typing import Any

import prepare
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

import spectral_ext

KEY = pytest.StashKey[dict[str, dict[str, Any]]]()
_call = nn.Module.__call__
_thread = local()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True)
    parser.addoption("--as-they-are", action="store_true")
    parser.addoption("--prepare", help="a function of prepare.py that is called before all tests")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = {}
    if config.option.prepare is not None:
        getattr(prepare, config.option.prepare)()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    seed()
    outcome = item.config.stash[KEY].setdefault(item.nodeid, {"layers": 0})
    fuse = not item.config.option.as_they_are

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_thread, "inside", False):
            found = len(normalized(module))
            outcome["layers"] += found
            if found and fuse:
                spectral_ext.fuse(module)
            _thread.inside = True
            try:
                return _call(module, *args, **kwargs)
            finally:
                _thread.inside = False
        return _call(module, *args, **kwargs)

    nn.Module.__call__ = call
    try:
        return (yield)
    finally:
        nn.Module.__call__ = _call


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    outcome = item.config.stash[KEY][item.nodeid]
    if report.when == "call" or report.outcome != "passed":
        outcome["outcome"] = f"{report.outcome} in {report.when}"
        outcome["why"] = str(call.excinfo.value) if call.excinfo else ""
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.option.outcomes.write_text(json.dumps(session.config.stash[KEY], indent=1))


def seed() -> None:
    """Let the tests draw the same numbers in every run."""
    random.seed(0)
    torch.manual_seed(0)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(0)


def normalized(model: nn.Module) -> list[str]:
    """Return the names of the layers that have a spectral norm of PyTorch, not fused yet."""
    found = []
    for name, module in model.named_modules():
        found += [name for hook in module._forward_pre_hooks.values() if type(hook) is SpectralNorm]
        if parametrize.is_parametrized(module):
            lists = module.parametrizations.values()
            found += [name for list_ in lists if type(list_[0]) is _SpectralNorm]
    return found
