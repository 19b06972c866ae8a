"""Build the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, and run tests with it.

    make sanitize

The library belongs to a copy of the package in build/sanitize; the one that is installed stays as it is.
Both sanitizers end the process at their first report. Leaks are not looked for: Python has many.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer"
TESTS = (
    ("tests/test_numeric.py", "-k", "cpu"),
    ("tests/fuzz/test_malformed_calls.py", "-k", "raise_and_change_nothing"),
    ("tests/test_memory.py",),
)


def copy_package() -> None:
    """Copy what changed; object files of an earlier build stay."""
    ignored = shutil.ignore_patterns("_C*.so", "__pycache__")
    for name in ("spectral_ext", "csrc", "tests"):
        shutil.copytree(ROOT / name, COPY / name, ignore=ignored, dirs_exist_ok=True)
    for name in ("setup.py", "build_config.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, COPY / name)


def build() -> None:
    """Compile the library of the copy with both sanitizers."""
    flags = dict.fromkeys(("CFLAGS", "CXXFLAGS", "LDFLAGS"), FLAGS)
    environ = {**os.environ, **flags, "SKIP_CUDA": "1"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=COPY, env=environ, check=True)


def runtime(name: str) -> str:
    """Return the path of a library of the compiler."""
    compiler = os.environ.get("CXX", "c++")
    output = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True)
    return str(Path(output.strip()).resolve())


def environment() -> dict[str, str]:
    """Return the environment in which Python runs with the sanitized library."""
    return {
        **os.environ,
        "PYTHONPATH": str(COPY),
        # Python itself is not sanitized, so the runtime must come first; it looks for what throws.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


def main() -> int:
    """Build and run; return the exit status."""
    copy_package()
    build()
    for test in TESTS:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *test]
        print(f"\n== {' '.join(test)}", flush=True)
        status = subprocess.run(command, cwd=COPY, env=environment(), check=False).returncode
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
