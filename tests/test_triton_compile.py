"""Triton kernels as a GPU gets them: machine code for several architectures, made without one."""

import importlib.metadata
import importlib.util

import pytest

from bench import kernels, triton_kernels

pytestmark = [
    # On one worker: compilations side by side with nvcc's would wait for each other.
    pytest.mark.xdist_group("cuda_build"),
    pytest.mark.first,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
]


@pytest.fixture(scope="module")
def rows():
    """What Triton makes of the kernels; compiled where that is not recorded, without its interpreter."""
    compiler = f"triton {importlib.metadata.version('triton')}"
    recorded = kernels.recorded_of(compiler, kernels.digest_of_triton())
    return recorded or kernels.measure_triton()


def test_every_variant_is_compiled_for_every_architecture(rows):
    found = {(row["kernel"], row["dtype"], int(row["sm"])) for row in rows}
    assert found == {
        (kernel, dtype, sm)
        for kernel in triton_kernels.KERNELS
        for dtype in triton_kernels.dtypes_of(kernel)
        for sm in triton_kernels.ARCHITECTURES
    }


def test_nothing_is_spilled(rows):
    for row in rows:
        assert (row["stack"], row["spill_stores"], row["spill_loads"]) == ("0", "0", "0"), row
        assert int(row["shared"]) <= 48 << 10, row  # what every GPU gives without being asked


def test_loads_are_wide_and_global(rows):
    """Three kinds of tiles, each of four to eight vectors of 16 bytes; the dots have two tensors."""
    for row in rows:
        assert row["generic_loads"] == "0", row
        assert int(row["global_loads_128"]) >= 3 * 2, row


def test_the_table_is_up_to_date(rows):
    """`python bench/kernels.py` writes it; other versions of Triton may give other numbers."""
    recorded = [row for row in kernels.recorded() if row["compiler"] == rows[0]["compiler"]]
    if not recorded:
        pytest.skip(f"bench/data/kernels.csv has no numbers of {rows[0]['compiler']}")
    assert rows == recorded
