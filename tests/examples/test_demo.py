"""The demo runs and writes its report and pictures."""

import example


def test_demo(tmp_path):
    example.run("demo", tmp_path, "--steps", "3")
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert (tmp_path / "sigma.png").stat().st_size > 1000
    report = (tmp_path / "report.md").read_text()
    cells = next(line for line in report.splitlines() if "spectral norm, ms" in line).split("|")
    assert float(cells[2]) > 0 and float(cells[3]) > 0
    once = next(line for line in report.splitlines() if 'update="step"' in line).split("|")
    assert float(once[3]) > 0 and once[4].strip().endswith("×")
    losses = next(line for line in report.splitlines() if "losses, whole run" in line)
    assert float(losses.split("|")[4]) < 1e-3  # three steps from one seed
