"""The options of ``python -m spectral_ext bench`` and ``profile``."""

import argparse
from pathlib import Path
from typing import get_args

import torch

from ..nn.kept import Update
from ..reference import Order
from .measure import MODES
from .peers import PEERS

__all__ = ["DTYPES", "add_bench_arguments", "add_profile_arguments"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``bench`` takes; the lists multiply."""
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name, path.py:factory, or all")
    add("--modes", nargs="+", choices=MODES, default=["forward", "forward+backward"])
    add("--providers", nargs="+", default=[], metavar="NAME", help=f"of: {', '.join(PEERS)}")
    add("--iterations", nargs="+", type=int, default=[1], metavar="N", help="of the power method")
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    add("--orders", nargs="+", choices=get_args(Order), default=["u_first"])
    add("--threads", nargs="+", type=int, default=[torch.get_num_threads()], metavar="N")
    add("--evaluation", action="store_true", help="in evaluation instead of training")
    add("--update", choices=get_args(Update), default="forward", help="see fuse; of ours")
    add("--passes", type=int, default=1, metavar="N", help="between two changes of the weights")
    add("--seconds", type=float, default=3.0, metavar="S", help="of timing for each case")
    add("--memory", action="store_true", help="the peak memory of stock and ours, too (in the CSV)")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--results", type=Path, metavar="CSV", help="a file to put the lines into")


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``profile`` takes."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name, or path.py:factory")
    add("--steps", type=int, default=10, metavar="N", help="training steps of each")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--out", type=Path, default=Path("out/profile"), metavar="FOLDER", help="of the traces")
