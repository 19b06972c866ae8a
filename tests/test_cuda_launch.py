"""The host code that launches the CUDA kernels, on a runtime that is a fake and the emulator."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "cuda_launch"
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="the emulator is compiled by g++, which is not there")
def test_launch(tmp_path):
    """Numbers, capture, cache of plans and errors; see launch_test.cpp."""
    program = tmp_path / "launch_test"
    command = [COMPILER, "-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-fsanitize=address"]
    command += ['-DSPECTRAL_EXT_CUDA_ARCHITECTURES="8.0;9.0"']
    command += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda_emulator'}"]
    sources = [HERE / "launch_test.cpp", ROOT / "csrc/cuda/launch.cpp", ROOT / "csrc/cuda/plan.cpp"]
    subprocess.run([*command, *sources, "-o", program], check=True)
    environ = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # tables are never freed
    result = subprocess.run([program], capture_output=True, text=True, check=False, env=environ)
    assert result.returncode == 0, result.stdout + result.stderr
