"""What a build ships, how it decides what to compile, and what an installation says about itself.

Wheels and source distributions are really built, once per session. The native wheel reuses the
object files of the installation under test, so that nothing is compiled twice.
"""

import json
import os
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import installation
import pytest
import torch

import build_config
import spectral_ext
from spectral_ext import backends

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"__pycache__", ".DS_Store"}

# On one worker, so that the builds are not made by several at once.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command, cwd=None, **environ):
    """Run a command with changes to the environment; return it with what it printed."""
    changed = {**os.environ, **{name: str(value) for name, value in environ.items()}}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=changed, text=True, capture_output=True
    )


def python(*arguments, **environ):
    """Run this Python away from the source tree, so that it imports what is installed."""
    return run(sys.executable, *arguments, **{"cwd": "/", **environ})


def python_with(folder, *arguments, **environ):
    """Run this Python with ``folder`` before its packages, without the editable installation."""
    packages = sysconfig.get_path("purelib")
    # -S: the .pth files there are not read; one of them finds spectral_ext in the source tree.
    return python("-S", *arguments, PYTHONPATH=f"{folder}{os.pathsep}{packages}", **environ)


def build(kind, source, folder, **environ):
    """Build an ``sdist`` or a ``wheel`` of ``source`` into ``folder`` and return the file."""
    scratch = folder / "setup.cfg"  # keep the steps' output out of the source tree
    scratch.write_text(f"[build]\nbuild_base = {folder}/build\n[egg_info]\negg_base = {folder}\n")
    command = ("-m", "build", f"--{kind}", "--no-isolation", "--outdir", folder / "dist", source)
    result = python(*command, DIST_EXTRA_CONFIG=scratch, **environ)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = (folder / "dist").iterdir()
    return file


def files_of(*folders):
    """Return the files of this tree that belong into a distribution, relative to the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not NOT_SHIPPED & set(path.parts) and path.suffix != ".so"
    }


def executable(path, script):
    """Write a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def no_programs(tmp_path_factory):
    """A PATH without anything: no compiler."""
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def pure_wheel(source, no_programs, tmp_path_factory):
    """The wheel that a machine without a compiler makes of the source distribution."""
    return build("wheel", source, tmp_path_factory.mktemp("pure"), PATH=no_programs, CXX="")


@pytest.fixture(scope="module")
def pure_install(pure_wheel, tmp_path_factory):
    """The folder where that wheel is installed."""
    folder = tmp_path_factory.mktemp("site")
    result = python("-m", "pip", "install", "--no-deps", "--no-index", "-t", folder, pure_wheel)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory):
    """The wheel that this machine makes."""
    try:
        build_config.find_compiler(os.environ)
    except build_config.Unavailable as reason:
        pytest.skip(f"no native wheel can be built: {reason}")
    return build("wheel", ROOT, tmp_path_factory.mktemp("native"))


def metadata(wheel, name) -> Message:
    """Return a file of a wheel's ``.dist-info``, parsed."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return Parser().parsestr(archive.read(path).decode())


def package_files(wheel):
    """Return what a wheel installs beside its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {path for path in archive.namelist() if ".dist-info/" not in path}


# ---- What is shipped


def test_sdist_has_all_that_building_and_testing_takes(sdist):
    top = {
        *("pyproject.toml", "setup.py", "build_config.py", "MANIFEST.in", "Makefile"),
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"),
        *("mkdocs.yml", ".clang-format"),
    }
    generated = {"PKG-INFO", "setup.cfg"}
    with tarfile.open(sdist) as archive:
        names = {
            name.split("/", 1)[1] for name in archive.getnames() if archive.getmember(name).isfile()
        }
    names = {name for name in names if ".egg-info/" not in name}
    folders = ("spectral_ext", "csrc", "tests", "bench", "docs", "examples")
    assert names == files_of(*folders) | top | generated


def test_wheel_without_compiler_is_pure_python(pure_wheel):
    assert package_files(pure_wheel) == files_of("spectral_ext")
    assert "spectral_ext/py.typed" in package_files(pure_wheel)
    assert metadata(pure_wheel, "WHEEL")["Tag"] == "py3-none-any"


def test_native_wheel_adds_one_library(native_wheel):
    (library,) = package_files(native_wheel) - files_of("spectral_ext")
    assert library.startswith("spectral_ext/_C.")
    assert metadata(native_wheel, "WHEEL")["Root-Is-Purelib"] == "false"


def test_metadata(pure_wheel):
    about = metadata(pure_wheel, "METADATA")
    assert about["Name"] == "spectral-ext"
    assert about["Version"] == spectral_ext.__version__
    assert "License :: OSI Approved :: Apache Software License" in about.get_all("Classifier")
    assert about["License-File"] == "LICENSE"
    assert about["Requires-Python"] == ">=3.10"
    required = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.11"]
    tools = {"accelerate", "docs", "export", "keras", "lightning"}
    assert tools | {"triton", "demo", "report", "test", "lint", "dev"} == set(
        about.get_all("Provides-Extra")
    )


def test_the_citation_has_what_its_format_asks_for_and_no_second_version():
    yaml = pytest.importorskip("yaml", reason="comes with the extra `docs`")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"]
    assert citation["title"].startswith("spectral_ext") and citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "spectral_ext contributors"}]
    assert [(paper["type"], paper["year"]) for paper in citation["references"]] == [
        ("conference-paper", 2018)
    ]
    assert not {"version", "date-released"} & set(citation)


# ---- An installation


def test_the_native_wheel_works_in_a_new_environment(native_wheel, tmp_path):
    described_there = described(installation.check(native_wheel, tmp_path))
    assert described_there["spectral_ext"] == metadata(native_wheel, "METADATA")["Version"]
    assert described_there["cpu"] == "available"


def test_without_compiler_backends_in_python_work_and_others_say_why(pure_install, no_programs):
    script = """
import json, torch, spectral_ext
from spectral_ext import backends
reasons = {name: backends.unavailable(name) for name in backends.names()}
sigmas = {}
for name in [name for name in reasons if reasons[name] is None]:
    weight = torch.diag(torch.tensor([3.0, 1.0])).requires_grad_()
    u, v = torch.full((2, 2), 0.5**0.5)
    normalized, found = spectral_ext.functional.spectral_normalize(
        [weight], [u], [v], n_power_iterations=30, backend=name
    )
    normalized[0].sum().backward()
    sigmas[name] = found.tolist()
print(json.dumps([spectral_ext.__file__, sigmas, reasons]))
"""
    # In Triton's interpreter, where Triton is: see conftest.py.
    result = python_with(pure_install, "-c", script, PATH=no_programs)
    assert result.returncode == 0, result.stderr
    path, sigmas, reasons = json.loads(result.stdout)
    assert Path(path).is_relative_to(pure_install)
    in_python = {name for name in ("reference", "triton") if backends.unavailable(name) is None}
    assert set(sigmas) == in_python
    assert all(values == pytest.approx([3.0]) for values in sigmas.values())
    assert "C++ compiler" in reasons["cpu"]


def test_command_line_without_native_library(pure_install):
    result = python_with(pure_install, "-m", "spectral_ext")
    assert result.returncode == 0, result.stderr
    facts = described(result.stdout)
    assert facts["native library"] == "none"
    assert facts["reference"] == "available"
    assert facts["cpu"].startswith("no: ")


def test_command_line():
    result = python("-m", "spectral_ext")
    assert result.returncode == 0, result.stderr
    facts = described(result.stdout)
    assert facts["spectral_ext"] == spectral_ext.__version__
    assert facts["torch"] == torch.__version__
    assert int(facts["threads"]) >= 1
    for name in backends.names():
        reason = backends.unavailable(name)
        assert facts[name] == ("available" if reason is None else f"no: {reason}")
    chosen = backends.name_of(backends.select("auto", torch.device("cpu")))
    assert facts["auto takes"].startswith(f"{chosen} for CPU tensors")


def described(output):
    """Return the facts that ``python -m spectral_ext`` printed, by their labels."""
    lines = (line.strip().split("  ", 1) for line in output.splitlines())
    return {line[0]: line[-1].strip() for line in lines}


def test_native_library_knows_its_build():
    module = pytest.importorskip("spectral_ext._C", reason="built without a C++ compiler")
    info = module.build_info()
    assert info["torch"] == torch.__version__
    assert info["flags"] == " ".join(build_config.CXX_FLAGS)
    assert info["cpu_level"] in info["cpu_levels"]
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])


def test_import_adds_nothing_slow():
    script = """
import sys, torch
before = set(sys.modules)
import spectral_ext
print(*sorted(set(sys.modules) - before))
"""
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    added = result.stdout.split()
    assert "spectral_ext.functional" in added
    packages = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert packages <= {"spectral_ext", "torch"}
    slow = ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "torch.testing")
    assert not [name for name in added if name.startswith(slow)]


# ---- What to compile


def test_without_torch_the_build_says_what_to_type(source):
    script = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    result = run(sys.executable, "-c", script, cwd=source)
    assert result.returncode != 0
    assert "pip install torch\n" in result.stderr
    assert "pip install --no-build-isolation .\n" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failing_compilation_fails_the_build(source, tmp_path):
    answers = "*-dM*) echo '#define __GNUC__ 12' ;; *' -c '*) exit 1 ;; *) echo 12.2.0 ;;"
    compiler = executable(tmp_path / "c++", f'case "$*" in {answers} esac')
    command = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, source)
    result = python(*command, CXX=compiler, SKIP_CUDA="1")  # nvcc would ask it for its version
    assert result.returncode != 0
    assert "Error compiling objects for extension" in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_no_compiler(no_programs):
    plan = build_config.plan({"PATH": str(no_programs)})
    assert plan.compiler is None
    assert "looked for c++, g++, clang++" in plan.describe()


def test_a_compiler_without_vector_extensions_is_none(tmp_path):
    executable(tmp_path / "c++", "echo Microsoft C/C++")
    with pytest.raises(build_config.Unavailable, match="no GCC or Clang"):
        build_config.find_compiler({"PATH": str(tmp_path)})


def test_a_chosen_compiler_must_be_there(no_programs):
    with pytest.raises(SystemExit, match=r"CXX=g\+\+ is not"):
        build_config.find_compiler({"PATH": str(no_programs), "CXX": "g++"})


def test_native_code_can_be_turned_off():
    plan = build_config.plan({**os.environ, "SPECTRAL_EXT_NO_NATIVE": "1"})
    assert plan.describe() == "spectral_ext: pure Python, since SPECTRAL_EXT_NO_NATIVE is set"


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA 13.0 toolkit with an nvcc that answers, and headers."""
    home = tmp_path / "cuda-13.0"
    executable(
        home / "bin" / "nvcc",
        f'case "$*" in\n'
        f"*--dryrun*) echo '#$ _HERE_={home}/bin' >&2; echo '#$ TOP={home}/bin/..' >&2 ;;\n"
        f"*--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;\nesac",
    )
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home


def test_the_toolkit_behind_a_wrapper_script(toolkit, tmp_path):
    executable(tmp_path / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    found = build_config.find_toolkit({"PATH": str(tmp_path / "bin")})
    assert found == build_config.CudaToolkit(toolkit, "13.0")


def test_a_toolkit_without_headers_is_none(toolkit):
    (toolkit / "include" / "cuda_runtime.h").unlink()
    with pytest.raises(build_config.Unavailable, match=r"has no include/cuda_runtime\.h"):
        build_config.find_toolkit({"CUDA_HOME": str(toolkit), "PATH": os.defpath})


def test_cuda_kernels_are_compiled_when_all_is_there(toolkit, monkeypatch):
    monkeypatch.setattr(build_config, "sources", lambda pattern: ["csrc/cuda/forward.cu"])
    environ = {"CUDA_HOME": str(toolkit), "PATH": os.defpath}
    assert build_config.find_cuda(environ, "13.1").home == toolkit
    with pytest.raises(build_config.Unavailable, match=r"torch was built with CUDA 12\.8"):
        build_config.find_cuda(environ, "12.8")
    with pytest.raises(build_config.Unavailable, match="SKIP_CUDA is set"):
        build_config.find_cuda({**environ, "SKIP_CUDA": "1"}, "13.1")


@pytest.mark.parametrize(
    ("torch_cuda", "change", "reason"),
    [
        (None, {}, "the installed torch is a build without CUDA"),
        ("13.0", {"CUDA_HOME": "/nowhere"}, "no CUDA compiler .looked for /nowhere/bin/nvcc."),
        ("13.0", {"SKIP_CUDA": "1"}, "SKIP_CUDA is set"),
        ("13.0", {"SPECTRAL_EXT_NO_NATIVE": "1"}, "SPECTRAL_EXT_NO_NATIVE is set"),
    ],
)
def test_force_cuda_fails_where_it_cannot_be_met(torch_cuda, change, reason, monkeypatch):
    monkeypatch.setattr(build_config, "_torch_cuda", lambda: torch_cuda)
    with pytest.raises(SystemExit, match=f"FORCE_CUDA is set, but .*{reason}"):
        build_config.plan({**os.environ, "FORCE_CUDA": "1", **change})
