"""What the CUDA backend is without a GPU: kernels that compile well, a library that links and imports.

The kernels need nvcc, the library nvcc and a torch that was built with CUDA: the one that runs the
tests, or that of the Python in SPECTRAL_EXT_CUDA_PYTHON.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import build_config
from bench import kernels
from spectral_ext.backends import cuda

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ.get("SPECTRAL_EXT_CUDA_PYTHON", sys.executable)

# On one worker each: compilations side by side would wait for each other.
pytestmark = [pytest.mark.xdist_group("cuda_build"), pytest.mark.first]


@pytest.fixture(scope="module")
def toolkit():
    try:
        return build_config.find_toolkit(os.environ)
    except build_config.Unavailable as reason:
        pytest.skip(f"no kernel can be compiled: {reason}")


@pytest.fixture(scope="module")
def rows(toolkit):
    """What nvcc makes of the kernels, without a warning; compiled where that is not recorded."""
    sources = kernels.digest_of_cuda()
    return kernels.recorded_of(kernels.nvcc_version(toolkit), sources) or kernels.measure()


def test_every_kernel_is_compiled_for_every_architecture(rows):
    dtypes = {source.stem for source in kernels.sources()}
    assert dtypes == {"float32", "float64", "bfloat16", "float16"}
    found = {(row["kernel"], row["dtype"], int(row["sm"])) for row in rows}
    assert found == {
        (kernel, dtype, sm)
        for kernel in ("forward", "backward")
        for dtype in dtypes
        for sm in kernels.ARCHITECTURES
    }


def test_nothing_is_spilled(rows):
    for row in rows:
        assert (row["stack"], row["spill_stores"], row["spill_loads"]) == ("0", "0", "0"), row
        assert int(row["registers"]) <= 128, row  # so that a CTA of 512 threads fits everywhere


def test_loads_are_wide_and_global(rows):
    """Every vector of every row group is one instruction, in two layouts of memory.

    Of float32 these are 42, of half types 37; four more scale the weights, and twelve are in the
    backward.
    """
    if rows[0]["global_loads"] == "":
        pytest.skip(
            "no cuobjdump and nvdisasm: not in the toolkit, triton or nvidia-cuda-cuobjdump"
        )
    for row in rows:
        assert row["generic_loads"] == "0", row
        assert int(row["global_loads_128"]) >= (78 if row["kernel"] == "forward" else 12), row


def test_the_table_is_up_to_date(rows):
    """`python bench/kernels.py` writes it; other versions of nvcc may give other numbers."""
    recorded = [row for row in kernels.recorded() if row["compiler"] == rows[0]["compiler"]]
    if not recorded:
        pytest.skip(f"bench/data/kernels.csv has no numbers of {rows[0]['compiler']}")
    if rows[0]["global_loads"] == "":
        recorded = [row | dict.fromkeys(kernels.LOADS, "") for row in recorded]
    assert rows == recorded


def test_rows_of_other_sources_are_not_taken():
    row = kernels.recorded()[0]
    known = json.loads(kernels.DIGESTS.read_text())
    assert kernels.recorded_of(row["compiler"], known[row["compiler"]])
    assert not kernels.recorded_of(row["compiler"], "of other sources")
    assert not kernels.recorded_of("another compiler", known[row["compiler"]])


# ---- The library


def run(*command, cwd=ROOT, **environ):
    """Run a command in a folder, with changes to the environment; return what it printed."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


@pytest.fixture(scope="module")
def library(toolkit, tmp_path_factory):
    """A copy of the source tree, with the extension built in place for a torch with CUDA."""
    if run(PYTHON, "-c", "import torch; print(torch.version.cuda)").strip() == "None":
        pytest.skip("torch is a build without CUDA here; SPECTRAL_EXT_CUDA_PYTHON may name another")
    tree = tmp_path_factory.mktemp("cuda") / "tree"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "tests", "bench", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    # For one architecture: the others were compiled above.
    environ = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    output = run(PYTHON, "setup.py", "build_ext", "--inplace", cwd=tree, **environ)
    assert "spectral_ext: CUDA kernels, by CUDA" in output
    assert not re.search(r"\bwarning[: #]", output), output
    return tree


SCRIPT = """
import torch, spectral_ext
from spectral_ext.backends import unavailable
print(spectral_ext.__file__)
for name in ("allocate", "forward_", "backward"):
    print(torch._C._dispatch_has_kernel_for_dispatch_key(f"spectral_ext::{name}", "CUDA"))
print(unavailable("cuda", torch.device("cuda")))
"""


def test_the_library_imports_and_has_the_kernels(library):
    """Where there is no driver, too."""
    path, *there, reason = run(PYTHON, "-c", SCRIPT, cwd=library).splitlines()
    assert Path(path).is_relative_to(library)
    assert there == ["True"] * 3
    if run(PYTHON, "-c", "import torch; print(torch.cuda.is_available())").strip() == "False":
        assert reason == "there is no CUDA device, or no driver for it"


def test_the_command_line_says_what_was_compiled(library):
    output = run(PYTHON, "-m", "spectral_ext", cwd=library)
    assert re.search(r"CUDA kernels  CUDA \d+\.\d+ for 9\.0\n", output)
    assert re.search(r"  cuda +(available|no: )", output)


def test_without_cuda_no_file_that_needs_it_is_compiled():
    files = build_config.extension(build_config.Plan("c++", "", None, "none is wanted")).sources
    assert "csrc/ops.cpp" in files and "csrc/cuda/plan.cpp" in files
    for file in files:
        assert not file.endswith(".cu")
        assert not re.search(r"#include <(cuda|c10/cuda)", (ROOT / file).read_text())


@pytest.mark.parametrize(("version", "newest"), [("12.6", "9.0+PTX"), ("13.0", "12.0+PTX")])
def test_architectures_are_those_that_the_toolkit_knows(version, newest):
    architectures = build_config.CudaToolkit(Path("/nowhere"), version).architectures().split(";")
    assert architectures[0] == "7.5" and architectures[-1] == newest


# ---- Which devices it runs on


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["9.0"], (9, 0), True),
        (["9.0"], (10, 0), False),
        (["9.0"], (8, 9), False),
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["7.5", "12.0+PTX"], (12, 1), True),
        (["7.5", "9.0+PTX"], (10, 3), True),
        (["9.0+PTX"], (8, 0), False),
        (["Hopper"], (9, 0), True),
        ([], (9, 0), False),
    ],
)
def test_covers(architectures, capability, expected):
    assert cuda.covers(architectures, capability) is expected
