"""The demo runs and writes its report and pictures."""

import os
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_demo(tmp_path):
    run = subprocess.run(
        [sys.executable, str(DEMO), "--steps", "3", "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # other tests run beside it
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert (tmp_path / "sigma.png").stat().st_size > 1000
    report = (tmp_path / "report.md").read_text()
    cells = next(line for line in report.splitlines() if "spectral norm, ms" in line).split("|")
    assert float(cells[2]) > 0 and float(cells[3]) > 0
    once = next(line for line in report.splitlines() if 'update="step"' in line).split("|")
    assert float(once[3]) > 0 and once[4].strip().endswith("×")
    losses = next(line for line in report.splitlines() if "losses, whole run" in line)
    assert float(losses.split("|")[4]) < 1e-3  # three steps from one seed
