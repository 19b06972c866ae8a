"""Malformed calls of the native operators raise, and change nothing; see malformed_calls.py.

SPECTRAL_EXT_FUZZ_CALLS and SPECTRAL_EXT_FUZZ_SEED choose other calls.
"""

import os

import judging
import malformed_calls
import pytest

pytest.importorskip("spectral_ext._C")

CALLS = int(os.environ.get("SPECTRAL_EXT_FUZZ_CALLS", "300"))
SEED = int(os.environ.get("SPECTRAL_EXT_FUZZ_SEED", "0"))


def test_malformed_calls_raise_and_change_nothing():
    failures = judging.run(map(malformed_calls.script_of, range(SEED, SEED + CALLS)))
    assert not failures, "\n\n".join(f"{wrong}\n{script}" for script, wrong in failures)


def test_some_calls_are_right_and_some_are_not():
    """Calls that all raise at their first argument would show nothing."""
    scripts = [malformed_calls.script_of(seed) for seed in range(40)]
    raised = 0
    for script in scripts:
        try:
            exec(script, {})
        except Exception:
            raised += 1
    assert 8 <= raised <= 32


HEADER = malformed_calls.HEADER
PLANTED = {
    "the process ended": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "t0 was changed": "t0 = torch.zeros(3)\nt0.fill_(1).view(4)",
    "an internal assertion": "raise RuntimeError('INTERNAL ASSERT FAILED')",
    "it did not come back": "while True: pass",
}


@pytest.mark.parametrize("reason", PLANTED)
def test_what_goes_wrong_is_seen(reason, monkeypatch):
    monkeypatch.setattr(judging, "SECONDS_OF_A_HANG", 20.0)
    scripts = [HEADER + PLANTED[reason], HEADER + "t0 = torch.zeros(3)\nt0.view(4)"]
    failures = judging.run(scripts)
    assert [script for script, _ in failures] == scripts[:1]
    assert failures[0][1].startswith(reason)
