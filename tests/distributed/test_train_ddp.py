"""The example trains under torchrun what it trains in one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_ddp.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]

pytestmark = pytest.mark.xdist_group("distributed")


def run(*command):
    done = subprocess.run(
        [sys.executable, *command, "--steps", "4", "--batch-size", "16"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": _loopback()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("u and v are the same on all processes: yes") == 1  # of one rank
    numbers = re.findall(r"-?\d+\.\d+", done.stdout)
    assert len(numbers) == 6  # two losses and four σ
    return [float(number) for number in numbers]


def _loopback():
    return "lo0" if sys.platform == "darwin" else "lo"


def test_all_ways_to_train_give_the_same():
    expected = run(str(EXAMPLE))
    for arguments in ([], ["--fsdp"]):
        found = run(*TORCHRUN, "--nproc-per-node=2", str(EXAMPLE), *arguments)
        assert found == pytest.approx(expected, abs=2e-4)
