"""The CPU backend without torch, plain and under ThreadSanitizer and AddressSanitizer; see driver.cpp.

Mistakes that are planted in copies of the sources show what driver and sanitizers notice.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread"]
PLAIN: tuple[str, ...] = ()
THREAD = ("-fsanitize=thread",)
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs g++, or the compiler that CXX names"),
    pytest.mark.xdist_group("cpu_kernels"),
]


class Builder:
    """Compiles each source once for each set of flags."""

    def __init__(self, folder):
        self._folder = folder
        self._objects = {}

    def _compile(self, text, path, flags):
        """Return the object file of a source, whose text may be another than that of its file."""
        key = (text, path, flags)
        if key not in self._objects:
            name = f"{path.stem}-{len(self._objects)}"
            source, target = self._folder / f"{name}.cpp", self._folder / f"{name}.o"
            source.write_text(text)
            include = [f"-I{ROOT / 'csrc'}", f"-I{path.parent}"]
            command = [COMPILER, *FLAGS, *flags, *include, "-c", source, "-o", target]
            subprocess.run(command, check=True)
            self._objects[key] = target
        return self._objects[key]

    def build(self, flags, changes=()):
        """Return the program; ``changes`` are (file of csrc/cpu, text, its replacement)."""
        objects = []
        sources = [Path(__file__).with_name("driver.cpp"), *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
        for path in sources:
            text = path.read_text()
            for name, old, new in changes:
                if path.name == name:
                    assert text.count(old) == 1, f"{name} no longer has {old!r}"
                    text = text.replace(old, new)
            objects.append(self._compile(text, path, flags))
        program = self._folder / f"driver-{len(list(self._folder.glob('driver-*')))}.exe"
        subprocess.run([COMPILER, *FLAGS, *flags, *objects, "-o", program], check=True)
        return program


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return Builder(tmp_path_factory.mktemp("driver"))


def run(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def can_run(flags, folder):
    """Return whether a program of these flags can be built and run here."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    built = subprocess.run(
        [COMPILER, *flags, source, "-o", program], capture_output=True, check=False
    )
    return built.returncode == 0 and run(program).returncode == 0


@pytest.fixture(params=[PLAIN, THREAD, ADDRESS], ids=["plain", "thread", "address"])
def flags(request, tmp_path):
    if not can_run(request.param, tmp_path):
        pytest.skip("the compiler has no such sanitizer, or it does not run here")
    return request.param


def test_driver(builder, flags):
    result = run(builder.build(flags))
    assert result.returncode == 0, result.stdout + result.stderr


# Items by turns instead of by a counter, so that a stage always has items of several threads.
IN_TURNS = (
    "schedule.cpp",
    "for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items_.size();)",
    "for (size_t i = worker; i < items_.size(); i += workers)",
)
NO_WAIT = ("schedule.cpp", "wait_for(finished, item.required);", "(void)wait_for;")


def test_race_is_seen(builder, tmp_path):
    if not can_run(THREAD, tmp_path):
        pytest.skip("the compiler has no ThreadSanitizer, or it does not run here")
    assert run(builder.build(THREAD, [IN_TURNS]), "one call").returncode == 0
    result = run(builder.build(THREAD, [IN_TURNS, NO_WAIT]), "one call")
    assert result.returncode != 0
    assert "data race" in result.stderr


PAST_THE_END = (
    "backward.cpp",
    "end = std::min(begin + cut_.slice, shape.numel());",
    "end = begin + cut_.slice;",
)


def test_write_past_the_end_is_seen(builder, tmp_path):
    if not can_run(ADDRESS, tmp_path):
        pytest.skip("the compiler has no AddressSanitizer, or it does not run here")
    result = run(builder.build(ADDRESS, [PAST_THE_END]), "one call")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


MISTAKES = {
    "sigma": ("forward.cpp", "return n * (n / std::max(n, layer_.eps));", "return n * 1.001;"),
    "order of columns": ("backward.cpp", "v_scratch_[c] = v[place];", "v_scratch_[c] = v[c];"),
    "rank one": ("backward.cpp", "along / sigma) - grad_sigma", "along / sigma) + grad_sigma"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_number_is_seen(builder, mistake):
    result = run(builder.build(PLAIN, [MISTAKES[mistake]]))
    assert result.returncode != 0
    assert "wrong: " in result.stderr
