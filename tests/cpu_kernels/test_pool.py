"""The pool of output memory beside forks and where memory ends; see pool_test.cpp."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
WRAPPED = ("pthread_mutex_lock", "pthread_mutex_unlock", "posix_memalign", "madvise", "free")

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs g++ and the linker's --wrap"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    program = tmp_path_factory.mktemp("pool") / "pool_test"
    command = [COMPILER, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += [f"-I{ROOT / 'csrc'}", *(f"-Wl,--wrap={name}" for name in WRAPPED)]
    sources = [Path(__file__).with_name("pool_test.cpp"), ROOT / "csrc/cpu/memory.cpp"]
    subprocess.run([*command, *sources, "-o", program], check=True)
    return program


def run(program, what):
    result = subprocess.run([program, what], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_child_can_use_the_pool_when_another_thread_was_in_it_at_the_fork(program):
    run(program, "fork")


def test_pool_loses_nothing_without_memory_and_calls_the_system_unlocked(program):
    run(program, "memory")
