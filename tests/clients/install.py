"""Install the packages of ``clients.py``, each by itself, into the environment of this Python.

One that cannot be installed stops neither the others nor the caller: why is printed, and kept in
``clients.json`` of the environment, where the tests look it up. What is there already is left alone, and
torch and numpy stay what they are. Where a package's own tests are run, its source distribution is unpacked
beside that file.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib import metadata
from pathlib import Path

from clients import CLIENTS, Client
from packaging.requirements import Requirement

REPORT = Path(sys.prefix) / "clients.json"
SOURCES = Path(sys.prefix) / "client-sources"
FIXED = ("torch", "numpy")


def main() -> None:
    failures = {}
    for name, client in CLIENTS.items():
        start = time.monotonic()
        failure = install(client) or unpack(client)
        if failure is not None:
            failures[name] = failure
        took = f"{time.monotonic() - start:.0f} s"
        print(f"{name}: {'there' if failure is None else failure} ({took})", flush=True)
    REPORT.write_text(json.dumps(failures, indent=1))


def install(client: Client) -> str | None:
    """Install one package; return why it failed, or None."""
    torch = metadata.version("torch")
    if client.native and "+" in torch:
        return f"not tried: torch {torch} is not the registry's build, for which it was compiled"
    alone = ["--no-deps"] if client.isolated else ["--no-deps", "--no-build-isolation"]
    for requirements, options in ((client.alone, alone), (client.whole, [])):
        missing = [r for r in requirements if not is_there(Requirement(r))]
        if missing:
            failure = pip(*options, *missing)
            if failure is not None:
                return failure
    return None


def source(client: Client) -> Path:
    """Return where the source distribution of a package is unpacked."""
    return SOURCES / client.alone[0].replace("==", "-")


def unpack(client: Client) -> str | None:
    """Get the source distribution of a package whose tests are run; return why that failed, or None."""
    target = source(client)
    if not client.tests or target.exists():
        return None
    SOURCES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SOURCES) as folder:
        options = ("--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", folder)
        failure = pip(*options, client.alone[0], command="download")
        if failure is not None:
            return failure
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as members:
            members.extractall(folder, filter="data")
        archive.unlink()
        (unpacked,) = Path(folder).iterdir()
        unpacked.rename(target)
    return None


def is_there(requirement: Requirement) -> bool:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def pip(*arguments: str, command: str = "install") -> str | None:
    """Run pip with torch and numpy held; return its exit status and error, or None."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        for name in FIXED:
            public, _, _ = metadata.version(name).partition("+")
            print(f"{name}=={public}", file=constraints, flush=True)
        line = [sys.executable, "-m", "pip", command, "--disable-pip-version-check", "--quiet"]
        line += ["--constraint", constraints.name, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return f"pip exited with {done.returncode}: {last_error(done.stdout + done.stderr)}"


def last_error(output: str) -> str:
    """Return the line that says what went wrong: of a build that failed, the last one of its own."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if "[end of output]" in lines:
        return lines[lines.index("[end of output]") - 1]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1]


if __name__ == "__main__":
    main()
