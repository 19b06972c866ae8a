"""The CUDA device functions, compiled by a C++ compiler and run under the emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="the emulator is compiled by g++, which is not there")
def test_forward(tmp_path):
    program = tmp_path / "forward"
    subprocess.run(
        [
            *(
                COMPILER,
                "-std=c++20",
                "-O1",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wno-unknown-pragmas",
                "-o",
                program,
            ),
            *("-I", ROOT / "csrc", "-I", ROOT / "tests/cuda_emulator"),
            *(ROOT / "tests/cuda_emulator/forward.cpp", ROOT / "csrc/cuda/plan.cpp"),
        ],
        check=True,
    )
    result = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 0, result.stdout
