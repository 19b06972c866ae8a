"""``python -m spectral_ext``: what is installed here, and which backends can run."""

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import spectral_ext

from . import backends

try:
    from ._C import build_info
except ImportError:
    build_info = None  # type: ignore[assignment]


def describe() -> list[tuple[str, str]]:
    """Return the facts about this installation, as labels and values."""
    facts = [("spectral_ext", spectral_ext.__version__), *describe_backends()]
    if build_info is None:
        return [*facts, ("native library", "none"), *describe_torch()]
    info = build_info()
    cuda = f"CUDA {info['cuda']} for {', '.join(info['cuda_architectures'])}"
    return [
        *facts,
        ("native library", f"for torch {info['torch']}"),
        ("  compiler", f"{info['compiler']}, {info['flags']}"),
        ("  CPU kernels", f"{', '.join(info['cpu_levels'])}; {info['cpu_level']} runs here"),
        ("  CUDA kernels", cuda if info["cuda"] else "none"),
        *describe_torch(),
    ]


def describe_backends() -> list[tuple[str, str]]:
    """Return for every backend that it can run, or why it cannot."""
    reasons = [(name, backends.unavailable(name)) for name in backends.names()]
    return [
        ("backends", ""),
        *((f"  {name}", f"no: {why}" if why else "available") for name, why in reasons),
        ("  auto takes", ", ".join(describe_choices())),
    ]


def describe_choices() -> list[str]:
    """Return for each kind of device that is here the backend that ``auto`` takes."""
    devices = {"CPU": torch.device("cpu")}
    if torch.cuda.is_available():
        devices["CUDA"] = torch.device("cuda", 0)
    return [
        f"{backends.name_of(backends.select('auto', device))} for {kind} tensors"
        for kind, device in devices.items()
    ]


def describe_torch() -> list[tuple[str, str]]:
    """Return what matters here about torch and the devices that it finds."""
    return [
        ("torch", torch.__version__),
        ("  threads", str(torch.get_num_threads())),
        ("  CUDA", torch.version.cuda or "not in this build of torch"),
        ("  Triton", describe_triton()),
        *(("  GPU", describe_gpu(index)) for index in range(torch.cuda.device_count())),
    ]


def describe_triton() -> str:
    """Return the version of Triton, if there is one."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def describe_gpu(index: int) -> str:
    """Return the name and the compute capability of a GPU."""
    gpu = torch.cuda.get_device_properties(index)
    return f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m spectral_ext", description=__doc__)
    parser.add_argument("--version", action="version", version=spectral_ext.__version__)
    parser.parse_args(arguments)
    facts = describe()
    width = max(len(label) for label, _ in facts)
    print("\n".join(f"{label:{width}}  {value}".rstrip() for label, value in facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
