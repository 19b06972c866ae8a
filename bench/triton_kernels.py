"""What Triton makes of its kernels: cubins for GPUs that need not be there.

    python bench/triton_kernels.py [--sm 80 90 100 120]

Prints the rows of bench/data/kernels.csv as JSON; `bench/kernels.py` calls it. It has a process of its
own, in which no interpreter was asked for and nothing was imported that reads it from the environment.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = ("float32", "float64", "bfloat16", "float16")
# The variants of each kernel: constants beyond the dtypes.
KERNELS = {
    "half_step": ("forward_kernels", "half_step_kernel", {}),
    "divide": ("forward_kernels", "divide_kernel", {}),
    "divide_narrow": ("forward_kernels", "divide_kernel", {}),
    "dot": ("backward_kernels", "dot_kernel", {}),
    "gradient": ("backward_kernels", "gradient_kernel", {"HAS_GRAD_SIGMAS": False}),
    "gradient_sigma": ("backward_kernels", "gradient_kernel", {"HAS_GRAD_SIGMAS": True}),
    "gradient_wide": ("backward_kernels", "gradient_kernel", {"HAS_GRAD_SIGMAS": False}),
}
# Those that write another dtype than they read: what they write, by what they read.
RESULTS = {"divide_narrow": {"float32": "bfloat16"}, "gradient_wide": {"bfloat16": "float32"}}
# What the arguments are; A stands for the dtype to compute in.
ARGUMENTS = {
    **dict.fromkeys(("layers", "orders", "pointers"), "*i64"),
    "tiles": "*i32",
    **dict.fromkeys(("step", "count"), "i32"),
    "sums": "*fp64",
    **dict.fromkeys(("vectors", "saved", "sigmas", "convergence", "grad_sigmas"), "*A"),
}
UNALIGNED = ("saved", "sigmas", "convergence", "grad_sigmas")


def dtypes_of(kernel: str) -> tuple[str, ...]:
    """Return the dtypes that a variant is compiled for."""
    return tuple(RESULTS.get(kernel, DTYPES))


def compile_kernel(kernel: str, dtype: str, sm: int) -> dict[str, str]:
    """Compile a kernel; return its row."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from bench.kernels import PTXAS, RESOURCES, loads_of
    from spectral_ext.backends.triton import launch

    module, name, constants = KERNELS[kernel]
    function = getattr(importlib.import_module(f"spectral_ext.backends.triton.{module}"), name)
    weight = getattr(torch, dtype)
    compute = torch.float64 if weight == torch.float64 else torch.float32
    constants = {**launch.constants_of(weight, compute), **constants}
    if "RESULT_T" in function.arg_names:
        result = RESULTS.get(kernel, {dtype: dtype})[dtype]
        constants |= launch.result_constant(getattr(torch, result))
    pointers = {"A": "fp64" if compute == torch.float64 else "fp32"}
    signature = {
        argument: "constexpr"
        if argument in constants
        else re.sub("A$", pointers["A"], ARGUMENTS[argument])
        for argument in function.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(function.arg_names)
        if signature[argument].startswith("*") and argument not in UNALIGNED
    }
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", sm, 32), options=launch.options_of(compute)
    )
    ptxas = Path(get_ptxas(sm).path)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
        assert target is not None
        command = [ptxas, "-v", f"--gpu-name={target[1]}", ptx, "-o", Path(folder, "again")]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
        path = os.pathsep.join([str(ptxas.parent), os.environ.get("PATH", "")])
        listing = subprocess.check_output(
            ["cuobjdump", "-sass", cubin], text=True, env={**os.environ, "PATH": path}
        )
    found = PTXAS.search(report.stdout + report.stderr)
    assert found is not None, report.stdout + report.stderr
    row = {"compiler": f"triton {triton.__version__}", "kernel": kernel, "dtype": dtype}
    row |= {"sm": str(sm)} | {resource: found[resource] for resource in RESOURCES}
    return row | {"shared": str(compiled.metadata.shared)} | loads_of(listing)


def measure(architectures: tuple[int, ...]) -> Iterator[dict[str, str]]:
    """Compile everything, on two cores."""
    jobs = [(k, d, sm) for k in KERNELS for d in dtypes_of(k) for sm in architectures]
    with ProcessPoolExecutor(2) as pool:
        yield from pool.map(compile_kernel, *zip(*jobs, strict=True), chunksize=4)


def main() -> None:
    """Compile, and print rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES)
    print(json.dumps(list(measure(tuple(parser.parse_args().sm)))))


if __name__ == "__main__":
    main()
