"""Runs scripts in a child process, and says what is wrong with how they end."""

import json
import os
import select
import subprocess
import sys

SECONDS_OF_A_HANG = 120.0


def _bytes_of(tensor):
    import torch

    if tensor.is_meta:
        return None
    if tensor.layout != torch.strided:
        return _bytes_of(tensor._values())
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
    return raw.clone()


def judge(script: str) -> str:
    """Run a script, and return what is wrong with how it ended; nothing, if it is empty.

    The lines before one that raises have made the tensors that it must not change.
    """
    import torch

    space: dict[str, object] = {}
    before: dict[str, object] = {}
    for line in script.splitlines():
        made = {k: v for k, v in space.items() if isinstance(v, torch.Tensor) and k[1:].isdigit()}
        before = {name: _bytes_of(tensor) for name, tensor in made.items()}
        try:
            exec(line, space)
        except Exception as error:
            if "INTERNAL ASSERT" in str(error):
                return f"an internal assertion: {error}"
            for name, was in before.items():
                now = _bytes_of(made[name])
                if was is not None and not torch.equal(was, now):
                    return f"{name} was changed, and then raised: {error}"
            return ""
    return ""


def child() -> None:
    """Judge scripts that come in lines of JSON, and answer in such lines."""
    for line in sys.stdin:
        print(json.dumps(judge(json.loads(line))), flush=True)


class Child:
    """A process that judges scripts."""

    def __init__(self) -> None:
        command = [sys.executable, os.path.abspath(__file__)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.is_alive = True

    def judge(self, script: str) -> str:
        """Return what is wrong with a script; the child may be dead after it."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(script) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS_OF_A_HANG)
        answer = process.stdout.readline() if ready else ""
        if answer:
            return str(json.loads(answer))
        self.is_alive = False
        if not ready:
            process.kill()
            process.communicate()
            return f"it did not come back in {SECONDS_OF_A_HANG:.0f} s"
        _, errors = process.communicate()
        return f"the process ended with status {process.returncode}: {errors[-3000:]}"

    def close(self) -> None:
        """End the child."""
        if self.is_alive:
            self._process.communicate()


def run(scripts) -> list[tuple[str, str]]:
    """Judge scripts; return those that failed, each with the reason."""
    failures = []
    judging = Child()
    for script in scripts:
        wrong = judging.judge(script)
        if wrong:
            failures.append((script, wrong))
        if not judging.is_alive:
            judging = Child()
    judging.close()
    return failures


if __name__ == "__main__":
    child()
