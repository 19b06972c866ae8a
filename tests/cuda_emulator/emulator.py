"""The CUDA kernels as a backend of CPU tensors: the emulator runs them (see cuda_emulator.h).

Tests of any backend can so be tests of the CUDA kernels, without a GPU. Every call is run under all
`schedules`, which must give the same bits and write nothing but results.
"""

import fcntl
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spectral_ext import layout

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FLAGS = {
    "plain": ["-O2"],
    # A vector that is not aligned fails on a device; most of them would not here.
    "alignment": ["-O2", "-fsanitize=alignment"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
# ThreadSanitizer needs memory at certain addresses, which random ones may miss.
NO_RANDOM_ADDRESSES = ["setarch", "-R"]
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "detect_leaks=0",  # it needs ptrace, which containers may not have
    "TSAN_OPTIONS": "halt_on_error=1",
}


class Schedule(NamedTuple):
    """How a launch is run: all tickets at once or one launch a phase, and who gets to run when."""

    ticketed: bool
    grid: int
    resident: int
    seed: int


SCHEDULES = (
    Schedule(True, 5, 5, 0),
    Schedule(True, 64, 7, 11),
    Schedule(False, 3, 2, 12),
)
ALL_RESIDENT = (Schedule(True, 2, 2, 1), Schedule(False, 2, 2, 2))  # for ThreadSanitizer


def build(
    directory: Path, variant: str, csrc: Path = ROOT / "csrc", flags: Sequence[str] = ()
) -> list[str | Path]:
    """Return the command that runs the kernels in ``csrc``; the first process to ask compiles it."""
    program = directory / "-".join([variant, *(flag.lstrip("-") for flag in flags)])
    with open(f"{program}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
            command += [*FLAGS[variant], "-fno-sanitize-recover=all", *flags]
            command += [f"-I{csrc}", f"-I{HERE}", HERE / "run_kernels.cpp", csrc / "cuda/plan.cpp"]
            subprocess.run([*command, "-o", f"{program}.new"], check=True)
            Path(f"{program}.new").rename(program)
    return [*no_random_addresses(), program] if variant == "thread" else [program]


@cache
def no_random_addresses() -> list[str]:
    """Return what to run a program with; nothing where the system does not allow it."""
    allowed = shutil.which("setarch") and not subprocess.call([*NO_RANDOM_ADDRESSES, "true"])
    return NO_RANDOM_ADDRESSES if allowed else []


class Memory:
    """An image of the memory of tensors, each at its own alignment.

    Between them are bytes that make a huge number in every type. Unlike a NaN it does not stay what it
    is when a kernel computes with it, so a stray store of something that was loaded there shows.
    """

    GAP, BETWEEN = 64, 0x7B

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[str, Tensor, bool]] = {}
        self.places: dict[int, int] = {}  # by address: a weight may be its own output
        self.size = 0

    def add(self, name: str, tensor: Tensor | None, written: bool = False) -> int:
        """Return the place of a tensor, -1 for None; those that are written are results."""
        if tensor is None:
            return -1
        address = tensor.data_ptr()
        place = self.places.get(address)
        if place is None:
            place = self.size + self.GAP + (address - self.size) % self.GAP
            self.places[address] = place
            self.size = place + _span(tensor).nbytes
        self.tensors[place] = (name, tensor.detach(), written)
        return place

    def spans(self) -> list[tuple[int, int]]:
        return [(p, p + _span(tensor).nbytes) for p, (_, tensor, _) in self.tensors.items()]

    def image(self) -> Tensor:
        """Return the bytes to begin with."""
        image = torch.full((self.size + self.GAP,), self.BETWEEN, dtype=torch.uint8)
        for (begin, end), (_, tensor, _) in zip(self.spans(), self.tensors.values(), strict=True):
            image[begin:end] = _span(tensor).view(torch.uint8)
        return image

    def results(self, image: Tensor) -> dict[str, Tensor]:
        """Return the tensors that are written, as they are in an image."""
        return {
            name: self._find(image, place, tensor)
            for place, (name, tensor, written) in self.tensors.items()
            if written
        }

    @staticmethod
    def _find(image: Tensor, place: int, tensor: Tensor) -> Tensor:
        span = image[place : place + _span(tensor).nbytes].view(tensor.dtype)
        return span.as_strided(tensor.shape, tensor.stride())

    def keep(self, image: Tensor) -> None:
        """Copy the results of an image into their tensors; nothing else may have changed."""
        before = self.image()
        for place, (_, tensor, written) in self.tensors.items():
            if written:
                found = self._find(image, place, tensor)
                tensor.copy_(found)
                self._find(before, place, tensor).copy_(found)
        assert torch.equal(before, image), "a kernel wrote beyond its results"


def _span(tensor: Tensor) -> Tensor:
    """Return the memory from the first to the last element of a tensor, as elements."""
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((reach,), (1,))


def describe(weight: Tensor, dim: int) -> list[int]:
    """Return outer, rows and inner of a dense weight and its order of columns; see csrc/layer.h."""
    dims = [d for d in range(weight.ndim) if d == dim or weight.shape[d] > 1]
    dims.sort(key=lambda d: weight.stride(d) if weight.shape[d] > 1 else math.inf, reverse=True)
    outer, inner = dims[: dims.index(dim)], dims[dims.index(dim) + 1 :]
    columns = [d for d in range(weight.ndim) if d != dim]
    stride_in_v = {d: math.prod(weight.shape[e] for e in columns if e > d) for d in columns}
    order = [(weight.shape[d], stride_in_v[d]) for d in outer + inner]
    merged: list[tuple[int, int]] = []
    for size, stride in order:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) == 1:  # both orders are the same
        merged = []
    sizes = (math.prod(weight.shape[d] for d in part) for part in (outer, [dim], inner))
    return [*sizes, len(merged), *(number for pair in merged for number in pair)]


@dataclass
class Emulator:
    """A backend (see :class:`spectral_ext.backends.Backend`)."""

    command: Sequence[str | Path]  # from build
    schedules: Sequence[Schedule] = SCHEDULES
    tickets: int = 264
    max_columns: int = 1 << 30

    attach = prepare = None  # autograd calls the backward
    allocate = staticmethod(layout.allocate)

    def unavailable(self, device: torch.device | None) -> str | None:
        return None if device is None or device.type == "cpu" else "it computes on CPU tensors"

    @torch.no_grad()
    def forward_(
        self,
        weights,
        us,
        vs,
        outputs,
        saved,
        sigmas,
        convergence,
        dims,
        n_power_iterations,
        eps,
        v_first,
        tols,
        scales,
        soft,
        update,
    ) -> None:
        memory, layers, next_saved = Memory(), [], 0
        for i, (weight, output, u, v) in enumerate(zip(weights, outputs, us, vs, strict=True)):
            if weight.stride() != output.stride():
                weight = output.copy_(weight)
            layers.append(
                [
                    *_dtypes_and_shape(weight, output, dims[i]),
                    *(int(u.dtype != weight.dtype), int(v_first[i]), n_power_iterations[i], eps[i]),
                    *(tols[i], scales[i], int(soft[i]), 0, u.stride(0), v.stride(0)),
                    memory.add(f"weight {i}", weight),
                    memory.add(f"output {i}", output, written=True),
                    memory.add(f"u {i}", u, written=update),
                    memory.add(f"v {i}", v, written=update),
                    *(-1, -1, next_saved, i),
                ]
            )
            next_saved += u.numel() + v.numel()
        flat = [memory.add("saved", saved, True), memory.add("sigmas", sigmas, True)]
        report = convergence if len(convergence) else None
        flat += [memory.add("convergence", report, written=True), -1]
        self._run([0, int(update)], memory, flat, layers)

    @torch.no_grad()
    def backward(
        self,
        grad_outputs,
        grad_sigmas,
        outputs,
        saved,
        sigmas,
        dims,
        scales,
        soft,
        detach_sigma,
        mask,
        widen,
    ) -> list[Tensor]:
        dtypes = layout.grad_dtypes(outputs, widen)
        memory, layers, next_saved, grad_weights = Memory(), [], 0, []
        for i, (output, grad) in enumerate(zip(outputs, grad_outputs, strict=True)):
            place = next_saved
            next_saved += sum(layout.matrix_shape(output, dims[i]))
            if not mask[i]:
                continue
            if grad is not None and grad.stride() != output.stride():
                grad = torch.empty_like(output).copy_(grad)
            grad_weights.append(torch.empty_like(output, dtype=dtypes[i]))
            layers.append(
                [
                    *_dtypes_and_shape(output, grad_weights[-1], dims[i]),
                    *(0, 0, 1, 1e-12, 0.0, scales[i], int(soft[i]), int(detach_sigma[i]), 1, 1, -1),
                    memory.add(f"output {i}", output),
                    *(-1, -1),
                    memory.add(f"grad_output {i}", grad),
                    memory.add(f"grad_weight {i}", grad_weights[-1], written=True),
                    *(place, i),
                ]
            )
        grad_sigmas = None if grad_sigmas is None else grad_sigmas.contiguous()
        flat = [memory.add("saved", saved), memory.add("sigmas", sigmas)]
        flat += [-1, memory.add("grad_sigmas", grad_sigmas)]
        self._run([1, 0], memory, flat, layers)
        return grad_weights

    def _run(self, kind: list, memory: Memory, flat: list, layers: list[list]) -> None:
        lines = [[*kind, self.tickets, self.max_columns], [len(self.schedules)]]
        lines += [[int(schedule.ticketed), *schedule[1:]] for schedule in self.schedules]
        lines += [[len(memory.tensors)], *memory.spans(), flat, [len(layers)], *layers]
        with tempfile.TemporaryDirectory() as directory:
            call, image, results = (Path(directory, name) for name in ("call", "image", "results"))
            call.write_text("\n".join(" ".join(map(str, line)) for line in lines))
            image.write_bytes(memory.image().numpy().tobytes())
            done = subprocess.run(
                [*self.command, call, image, results],
                env=ENVIRONMENT,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            if "ThreadSanitizer: unexpected memory mapping" in done.stderr:
                pytest.skip(
                    "addresses are too random for ThreadSanitizer: vm.mmap_rnd_bits=28 helps"
                )
            assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
            images = torch.frombuffer(bytearray(results.read_bytes()), dtype=torch.uint8)
        images = images.view(len(self.schedules), -1)
        first = memory.results(images[0])
        for schedule, image in zip(self.schedules, images, strict=True):
            for name, value in memory.results(image).items():
                assert _same_bits(value, first[name]), f"{name}: other bits under {schedule}"
        memory.keep(images[0])


def _dtypes_and_shape(read: Tensor, result: Tensor, dim: int) -> list:
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (read, result)]
    return [*dtypes, *describe(result, dim)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(dtype), b.view(dtype))
