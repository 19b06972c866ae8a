"""What compilers make of the kernels: registers, spills, stack and the width of global loads.

    python bench/kernels.py

Compiles csrc/cuda/*.cu by nvcc and the Triton kernels by Triton, for several architectures, prints a
table and writes bench/data/kernels.csv, where each compiler has its rows, and kernels.json, which says
for which sources. What is not here is left out; no GPU is needed. The widths are read from the machine
code where there is a disassembler: in the toolkit, on PATH, in the wheel of triton, or in that of
nvidia-cuda-cuobjdump. Shared memory is what a kernel has of itself; nvcc's ask for theirs when they are
launched.
"""

import csv
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import build_config  # noqa: E402

RESULTS = ROOT / "bench" / "data" / "kernels.csv"
# By compiler the digest of the sources that its rows were measured for.
DIGESTS = ROOT / "bench" / "data" / "kernels.json"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
KEY = ("compiler", "kernel", "dtype", "sm")
RESOURCES = ("registers", "stack", "spill_stores", "spill_loads")
SHARED = ("shared",)
LOADS = ("global_loads", "global_loads_128", "generic_loads")
COLUMNS = (*KEY, *RESOURCES, *SHARED, *LOADS)
Row = dict[str, str]

# What `-Xptxas -v` says about a kernel, in order.
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<sm>\d+)\w?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def sources() -> list[Path]:
    """Return the files that hold kernels, one for each dtype."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc_version(toolkit: build_config.CudaToolkit) -> str:
    """Return nvcc and its full version: a change of the last number can change the registers."""
    text = subprocess.check_output([toolkit.home / "bin" / "nvcc", "--version"], text=True)
    found = re.search(r"\bV([\d.]+)", text)
    assert found is not None, text
    return f"nvcc {found[1]}"


def find_disassembler(toolkit: build_config.CudaToolkit) -> str | None:
    """Return cuobjdump, which needs nvdisasm beside it, or None."""
    folders = [toolkit.home / "bin"]
    for package, below in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            folders.append(Path(place) / below)
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    disassembler = shutil.which("cuobjdump", path=path)
    return disassembler if shutil.which("nvdisasm", path=path) else None


def compile_kernels(source: Path, toolkit: build_config.CudaToolkit, folder: Path) -> list[Row]:
    """Compile a file for all architectures, with warnings as errors; return a row for each kernel."""
    target = folder / f"{source.stem}.o"
    command = [toolkit.home / "bin" / "nvcc", "-c", source, "-o", target]
    command += ["-O3", "-Werror", "all-warnings", "-Xptxas", "-v"]
    for sm in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{sm},code=sm_{sm}"]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"nvcc does not compile {source}:\n{result.stdout}{result.stderr}")
    version = nvcc_version(toolkit)
    rows = []
    for match in PTXAS.finditer(result.stdout + result.stderr):
        kernel = "forward" if "forward_kernel" in match["name"] else "backward"
        row = {"compiler": version, "kernel": kernel, "dtype": source.stem, "sm": match["sm"]}
        row |= {name: match[name] for name in RESOURCES}
        rows.append(row | dict.fromkeys((*SHARED, *LOADS), ""))
    disassembler = find_disassembler(toolkit)
    if disassembler is not None:
        count_loads(target, rows, disassembler)
    return rows


def count_loads(target: Path, rows: list[Row], disassembler: str) -> None:
    """Fill in the loads of the kernels of an object file."""
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])
    for sm in {row["sm"] for row in rows}:
        listing = subprocess.check_output(
            [disassembler, "-sass", "-arch", f"sm_{sm}", target],
            text=True,
            env={**os.environ, "PATH": path},
        )
        for code in listing.split("Function : ")[1:]:
            kernel = "forward" if "forward_kernel" in code.partition("\n")[0] else "backward"
            (row,) = (row for row in rows if (row["sm"], row["kernel"]) == (sm, kernel))
            row |= loads_of(code)


def loads_of(code: str) -> Row:
    """Return how many instructions load from global memory, and how many of them 16 bytes at once.

    A generic load is one for which the compiler did not know that the memory is global.
    """
    loads = re.findall(r"\b(LDG?)((?:\.\w+)*) ", code)
    wide = sum(name == "LDG" and "128" in how.split(".") for name, how in loads)
    counts = (sum(name == "LDG" for name, _ in loads), wide, sum(name == "LD" for name, _ in loads))
    return dict(zip(LOADS, map(str, counts), strict=True))


def measure() -> list[Row]:
    """Compile csrc/cuda; return its rows, sorted.

    Raises:
        build_config.Unavailable: there is no CUDA toolkit.
        RuntimeError: nvcc does not compile a file without a warning.
    """
    toolkit = build_config.find_toolkit(os.environ)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        files = pool.map(lambda source: compile_kernels(source, toolkit, Path(folder)), sources())
        rows = [row for file in files for row in file]
    return sorted(rows, key=place)


def measure_triton() -> list[Row]:
    """Compile the Triton kernels; return their rows, sorted.

    Raises:
        RuntimeError: one does not compile.
    """
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, ROOT / "bench" / "triton_kernels.py"],
        env=environ,
        text=True,
        capture_output=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"Triton does not compile its kernels:\n{result.stderr}")
    return sorted(json.loads(result.stdout.splitlines()[-1]), key=place)


def digest_of_cuda() -> str:
    """Return a digest of what nvcc compiles, and of this file."""
    return _digest(
        [ROOT / "csrc" / "layer.h", *(ROOT / "csrc" / "cuda").glob("*.[chi]*"), Path(__file__)]
    )


def digest_of_triton() -> str:
    """Return a digest of what Triton compiles, and of the script that says for what."""
    kernels = (ROOT / "spectral_ext" / "backends" / "triton").glob("*.py")
    return _digest([*kernels, ROOT / "bench" / "triton_kernels.py"])


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def recorded_of(compiler: str, sources: str) -> list[Row]:
    """Return the rows of a compiler, if they were recorded for the sources as they are now."""
    known = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    if known.get(compiler) != sources:
        return []
    return [row for row in recorded() if row["compiler"] == compiler]


def place(row: Row) -> tuple[str, str, int]:
    """Return where a row stands among those of its compiler."""
    return row["kernel"], row["dtype"], int(row["sm"])


def recorded() -> list[Row]:
    """Return the rows of kernels.csv."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Measure, print and record."""
    rows = []
    try:
        rows += measure()
    except build_config.Unavailable as reason:
        print(f"not by nvcc: {reason}")
    if importlib.util.find_spec("triton") is not None:
        rows += measure_triton()
    measured = {row["compiler"] for row in rows}
    known = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    for compiler in measured:
        known[compiler] = digest_of_triton() if "triton" in compiler else digest_of_cuda()
    DIGESTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    table = rows + [row for row in recorded() if row["compiler"] not in measured]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(table, key=lambda row: (row["compiler"], *place(row))))
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in COLUMNS}
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print("  ".join(f"{row[name]:>{width}}" for name, width in widths.items()))


if __name__ == "__main__":
    main()
