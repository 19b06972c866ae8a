"""How the native library is compiled: the one place for its sources, its flags and its tools.

``setup.py`` asks :func:`setup_arguments`. What gets built follows from the machine:

* no usable C++ compiler: a pure-Python package, whose backends are the ones written in Python;
* a compiler: ``spectral_ext._C`` with the CPU kernels, and a compilation that fails is an error;
* besides that a CUDA build of torch and its toolkit: the CUDA kernels as well.

The environment overrides it:

========================  =======================================================================
``SPECTRAL_EXT_NO_NATIVE``  ``1``: build pure Python even where there is a compiler
``FORCE_CUDA``              ``1``: fail, instead of building without CUDA kernels
``SKIP_CUDA``               ``1``: build without CUDA kernels
``CUDA_HOME``               the toolkit, instead of the one whose ``nvcc`` is on ``PATH``
``TORCH_CUDA_ARCH_LIST``    the GPU architectures, as for any torch extension
``CXX``, ``MAX_JOBS``       the compiler, and how many of it run at once (default: all cores)
========================  =======================================================================

Torch is imported inside functions only, so that this file can say in words that it is missing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setuptools.command.build_py import build_py

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).resolve().parent

# Every processor of an architecture runs the same library: the kernels choose their instruction
# level at run time, so there is no -march here. Nor a -std: torch picks the one its headers need.
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "--threads=2", "-Xcompiler=-fvisibility=hidden"]
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0"
CUDA_12_8_ARCHITECTURES = f"{CUDA_ARCHITECTURES};10.0;12.0"
NEED_CUDA = {"csrc/ops_cuda.cpp", "csrc/cuda/launch.cpp"}  # the headers of a toolkit
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"

TORCH_MISSING = """\
spectral_ext compiles against the torch that you use, and this build environment has none.
Install torch first, then build in the same environment instead of an isolated one:

    pip install torch
    pip install --no-build-isolation .
"""


class Unavailable(Exception):
    """A part of the build cannot be had here; the message says why, for the user to read."""


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit whose compiler and headers were seen to be there."""

    home: Path
    version: str

    def architectures(self) -> str:
        """Return the GPU architectures that are compiled for, and an intermediate code for later ones."""
        major, minor = (int(number) for number in self.version.split("."))
        known = CUDA_12_8_ARCHITECTURES if (major, minor) >= (12, 8) else CUDA_ARCHITECTURES
        return f"{known}+PTX"


@dataclass(frozen=True)
class Plan:
    """What a build makes. Where a part is None, ``why_not_…`` says why."""

    compiler: str | None
    why_not_native: str
    cuda: CudaToolkit | None
    why_not_cuda: str

    def describe(self) -> str:
        """Return what is compiled, and what is not and why, a line each."""
        if self.compiler is None:
            return f"spectral_ext: pure Python, since {self.why_not_native}"
        cpu = f"spectral_ext: CPU kernels, compiled by {self.compiler}"
        if self.cuda is None:
            return f"{cpu}\nspectral_ext: no CUDA kernels, since {self.why_not_cuda}"
        return f"{cpu}\nspectral_ext: CUDA kernels, by CUDA {self.cuda.version} in {self.cuda.home}"


def sources(pattern: str) -> list[str]:
    """Return the files that match ``pattern``, sorted, relative to the project."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def is_set(variable: str, environ: Mapping[str, str]) -> bool:
    """Return whether an on/off variable is on."""
    return environ.get(variable, "0").lower() not in ("", "0", "no", "off", "false")


def find_compiler(environ: Mapping[str, str]) -> str:
    """Return the C++ compiler: ``$CXX``, or the first of the usual names on ``PATH``.

    Raises:
        Unavailable: there is none, or none that knows the vector extensions of GCC and Clang.
        SystemExit: ``$CXX`` is no such compiler; whoever set it wants no other and no pure Python.
    """
    if is_set("SPECTRAL_EXT_NO_NATIVE", environ):
        raise Unavailable("SPECTRAL_EXT_NO_NATIVE is set")
    if sys.platform == "win32":
        raise Unavailable("the kernels are written for GCC and Clang, and Python here needs MSVC")
    names = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        compiler = shutil.which(name, path=environ.get("PATH"))
        if compiler is None:
            continue
        macros = _output([compiler, "-dM", "-E", "-x", "c++", os.devnull], environ)
        if "__GNUC__" in macros:  # GCC and Clang define it
            return name
    if environ.get("CXX"):
        raise SystemExit(f"CXX={environ['CXX']} is not a GCC or Clang for C++ that can be run")
    raise Unavailable(f"there is no GCC or Clang for C++ (looked for {', '.join(names)})")


def find_toolkit(environ: Mapping[str, str]) -> CudaToolkit:
    """Return the CUDA toolkit of ``$CUDA_HOME``, or else of the ``nvcc`` on ``PATH``.

    The compiler itself is asked where it lives: what is on ``PATH`` may be a script that calls the
    nvcc of a toolkit elsewhere.

    Raises:
        Unavailable: there is no nvcc, or it is not part of a toolkit with headers.
    """
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    names = [f"{home}/bin/nvcc"] if home else ["nvcc", DEFAULT_NVCC]
    found = [shutil.which(name, path=environ.get("PATH")) for name in names]
    nvcc = next((path for path in found if path is not None), None)
    if nvcc is None:
        raise Unavailable(f"there is no CUDA compiler (looked for {', '.join(names)})")
    dry_run = _output([nvcc, "-v", "--dryrun", "-c", "x.cu"], environ)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    version = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"], environ))
    if top is None or version is None:
        raise Unavailable(f"{nvcc} does not answer as a CUDA compiler does")
    toolkit = CudaToolkit(Path(top[1].strip()).resolve(), version[1])
    if not (toolkit.home / "include" / "cuda_runtime.h").exists():
        raise Unavailable(f"{nvcc} belongs to {toolkit.home}, which has no include/cuda_runtime.h")
    return toolkit


def find_cuda(environ: Mapping[str, str], torch_cuda: str | None) -> CudaToolkit:
    """Return the toolkit that compiles the CUDA kernels of this version.

    Args:
        environ: the environment of the build.
        torch_cuda: ``torch.version.cuda``, None for a torch without CUDA.

    Raises:
        Unavailable: they are not compiled, and why.
    """
    if is_set("SKIP_CUDA", environ):
        raise Unavailable("SKIP_CUDA is set")
    if torch_cuda is None:
        raise Unavailable("the installed torch is a build without CUDA")
    toolkit = find_toolkit(environ)
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        raise Unavailable(
            f"torch was built with CUDA {torch_cuda}, and {toolkit.home} has CUDA {toolkit.version}"
        )
    if not sources("csrc/cuda/*.cu"):
        raise Unavailable("this version of spectral_ext has none")
    return toolkit


def plan(environ: Mapping[str, str]) -> Plan:
    """Decide what to build.

    Raises:
        SystemExit: torch is missing, or ``FORCE_CUDA`` asks for what cannot be had.
    """
    compiler, why_not_native = None, ""
    cuda, why_not_cuda = None, ""
    try:
        compiler = find_compiler(environ)
        cuda = find_cuda(environ, _torch_cuda())
    except Unavailable as reason:
        if compiler is None:
            why_not_native = str(reason)
        why_not_cuda = str(reason)
    if cuda is None and is_set("FORCE_CUDA", environ):
        raise SystemExit(f"FORCE_CUDA is set, but CUDA kernels cannot be built: {why_not_cuda}")
    return Plan(compiler, why_not_native, cuda, why_not_cuda)


def setup_arguments() -> dict[str, Any]:
    """Return the arguments of ``setuptools.setup`` that depend on this machine."""
    decided = plan(os.environ)

    @cache  # once, whichever steps a build has
    def say_what_is_built() -> None:
        print(decided.describe(), flush=True)

    class BuildPython(build_py):
        """The first step of a whole build."""

        def run(self) -> None:
            say_what_is_built()
            super().run()

    if decided.compiler is None:
        return {"cmdclass": {"build_py": BuildPython}}

    # What torch's build reads; CUDA_HOME when it is imported.
    os.environ["CXX"] = decided.compiler
    os.environ.setdefault("MAX_JOBS", str(_cores()))
    if decided.cuda is not None:
        os.environ["CUDA_HOME"] = str(decided.cuda.home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", decided.cuda.architectures())
    import torch
    from torch.utils.cpp_extension import BuildExtension

    objects = f"{sys.implementation.cache_tag}-{platform.machine()}-torch{torch.__version__}"

    class BuildNative(BuildExtension):
        """Keeps the object files, also those of an editable install, so that a rebuild is short."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / objects)

        def run(self) -> None:
            say_what_is_built()
            super().run()

    return {
        "ext_modules": [extension(decided)],
        "cmdclass": {"build_py": BuildPython, "build_ext": BuildNative},
    }


def extension(plan: Plan) -> Extension:
    """Return ``spectral_ext._C``: the operators, the kernels and the module that describes them."""
    import torch
    from torch.utils import cpp_extension

    files = {*sources("csrc/*.cpp"), *sources("csrc/*/*.cpp")}
    make_extension = cpp_extension.CppExtension
    if plan.cuda is None:
        files -= NEED_CUDA
    else:
        files |= {*sources("csrc/cuda/*.cu")}
        make_extension = cpp_extension.CUDAExtension
    facts = {
        "TORCH": torch.__version__,
        "FLAGS": " ".join(CXX_FLAGS),
        "CUDA": plan.cuda.version if plan.cuda else "",
        "CUDA_ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if plan.cuda else "",
    }
    # Warnings are for our own files; the compiler keeps quiet about headers of a system folder.
    system = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    return make_extension(
        "spectral_ext._C",
        sorted(files),
        depends=sources("csrc/**/*.*"),
        define_macros=[(f"SPECTRAL_EXT_{name}", f'"{text}"') for name, text in facts.items()],
        extra_compile_args={"cxx": [*CXX_FLAGS, *system], "nvcc": [*NVCC_FLAGS]},
    )


def _torch_cuda() -> str | None:
    """Return the CUDA version that the installed torch was built with, if any."""
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit(TORCH_MISSING) from None
    return torch.version.cuda


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _output(command: list[str], environ: Mapping[str, str]) -> str:
    """Return what a command prints, in both streams (nvcc's dry run uses stderr)."""
    result = subprocess.run(
        command,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.stdout
