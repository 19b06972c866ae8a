"""The public API has the types that a strict user of mypy wants, and mypy sees wrong uses of it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import spectral_ext
from spectral_ext import plot

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "typing"


def test_mypy_accepts_a_user_and_complains_where_a_use_is_wrong():
    pytest.importorskip("mypy", reason="the extra `lint` is not installed")
    # No configuration: ours is milder. What is unused is an error in strict mode, a complaint that
    # does not come too.
    options = ["--config-file=", "--strict", "--follow-imports=silent"]
    cache = ["--cache-dir", ROOT / ".mypy_cache" / "user"]
    files = [FOLDER / "user.py", FOLDER / "wrong.py"]
    command = [sys.executable, "-m", "mypy", *options, *cache, *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_user_uses_all_of_the_api_and_it_runs():
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    user = (FOLDER / "user.py").read_text()
    modules = (spectral_ext, spectral_ext.nn, spectral_ext.functional, spectral_ext.reference)
    public = {name for module in (*modules, spectral_ext.spectrum, plot) for name in module.__all__}
    assert not {name for name in public if not re.search(rf"\b{name}\b", user)}
    command = [sys.executable, str(FOLDER / "user.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
