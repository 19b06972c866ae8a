"""Install distributions in new virtual environments and use what is there.

    python tests/installation.py FILE ...

Each sees the packages of this Python, torch among them, and nothing of a checkout: an installation takes
seconds, that of a source distribution as long as it takes to compile.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

__all__ = ["check"]

USE = """
import sys
from pathlib import Path

import torch
from torch import nn

import spectral_ext

assert Path(spectral_ext.__file__).is_relative_to(sys.prefix), spectral_ext.__file__
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 1))
spectral_ext.apply_spectral_norm(model, n_power_iterations=50)
group = spectral_ext.fuse(model, backend="cpu")
model(torch.randn(2, 3, 8, 8)).sum().backward()
exact = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2) for layer in group.layers]
torch.testing.assert_close(group.sigmas, torch.stack(exact).detach(), rtol=1e-3, atol=0)
assert all(layer.weight.grad.norm() > 0 for layer in group.layers)
"""


def run(*command: object) -> str:
    """Run a command away from any checkout; return what it printed."""
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd="/", env={"PATH": "/usr/bin:/bin"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    if result.returncode:
        raise SystemExit(f"{' '.join(words[:6])} …\n{result.stdout}")
    return result.stdout


def check(file: Path, folder: Path) -> str:
    """Install a wheel or a source distribution under ``folder`` and use it.

    Returns:
        What ``python -m spectral_ext`` says there.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "base.pth").write_text("\n".join(here) + "\n")
    # An editable installation in the packages of this Python must not count.
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, file.resolve())
    run(python, "-c", USE)
    return run(python, "-m", "spectral_ext")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as temporary:
            print(f"{name}, installed in a new environment:\n{check(Path(name), Path(temporary))}")
