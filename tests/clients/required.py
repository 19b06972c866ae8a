"""Skip what needs a package that could not be installed."""

import json

import pytest
from clients import CLIENTS
from install import REPORT, is_there
from packaging.requirements import Requirement

__all__ = ["require"]


def require(name: str) -> None:
    """Skip unless a package is there, and say why it is not."""
    failures = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    if name in failures:
        pytest.skip(f"{name} could not be installed: {failures[name]}")
    wanted = CLIENTS[name].alone + CLIENTS[name].whole
    missing = [r for r in wanted if not is_there(Requirement(r))]
    if missing:
        pytest.skip(f"{name}: no {', '.join(missing)} here; python tests/clients/install.py")
