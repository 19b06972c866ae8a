"""``python -m spectral_ext``: what is installed here, and which backends can run.

``python -m spectral_ext report CHECKPOINT``: how well the spectral norms in a checkpoint are doing.

``python -m spectral_ext bench MODEL``: time the spectral norms of a model, stock's, others' and ours.

``python -m spectral_ext profile MODEL``: where a training step goes, with stock's norms and with fused ones.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

import spectral_ext

from . import backends
from .benchmark.arguments import add_bench_arguments, add_profile_arguments
from .benchmark.measure import WrongNumbersError
from .checkpoint_report import load_state_dict, report_state_dict
from .nn.report import NormalizedTensor, Report

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


def describe_checkpoint(path: Path, key: str | None, exact: bool, as_json: bool) -> int:
    """Print the report of a checkpoint; return the exit status."""
    try:
        state_dict = load_state_dict(path, key)
        report = report_state_dict(state_dict, exact=exact, track=progress if exact else iter)
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        show(report)
    return 0


def measure(options: argparse.Namespace) -> int:
    """Run ``bench`` or ``profile``; return the exit status."""
    if not find_spec("rich"):
        print("error: this needs rich: pip install rich", file=sys.stderr)
        return 2
    from .benchmark import command

    try:
        command.bench(options) if options.command == "bench" else command.profile(options)
    except (OSError, TypeError, ValueError, WrongNumbersError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def progress(tensors: Sequence[NormalizedTensor]) -> Iterable[NormalizedTensor]:
    """Return the tensors one after the other, with a bar where someone can see it."""
    if not (sys.stderr.isatty() and find_spec("rich")):
        return tensors
    from rich.console import Console
    from rich.progress import track

    return track(tensors, "singular values", console=Console(stderr=True), transient=True)


def show(report: Report) -> None:
    """Print a report: as a table for a terminal, as plain text for a file or a pipe."""
    if not (sys.stdout.isatty() and find_spec("rich")):
        print(report)
        return
    from rich.console import Console

    Console().print(report)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    what_is_here, *commands = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m spectral_ext", description=what_is_here)
    parser.add_argument("--version", action="version", version=spectral_ext.__version__)
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    add_arguments = (add_report_arguments, add_bench_arguments, add_profile_arguments)
    for about, add in zip(commands, add_arguments, strict=True):
        name = about.split()[3]
        what = about.partition("``: ")[2]
        add(parsers.add_parser(name, help=what, description=what))
    return parser


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``report`` takes."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="a file of torch.save; no code in it is run")
    add("--key", help="where in it the state dict is, such as state_dict or nets.D")
    add("--exact", action="store_true", help="compute the singular values, too")
    add("--json", action="store_true", help="print JSON")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = make_parser().parse_args(arguments)
    if options.command == "report":
        return describe_checkpoint(options.checkpoint, options.key, options.exact, options.json)
    if options.command in ("bench", "profile"):
        return measure(options)
    facts = describe()
    width = max(len(label) for label, _ in facts)
    print("\n".join(f"{label:{width}}  {value}".rstrip() for label, value in facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
