"""From the tensors of a call to launches of the kernels.

The tables of a call's layers stay on the device: they are made once for each combination of shapes,
strides and settings. What changes from call to call, the addresses, is copied there by every call in
one piece, which the host does not wait for.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from threading import RLock
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .backward_kernels import dot_kernel, gradient_kernel
from .forward_kernels import divide_kernel, half_step_kernel
from .tables import LayerFacts, Tables, backward_tables, forward_tables

__all__ = ["Layer", "constants_of", "options_of", "result_constant", "run_backward", "run_forward"]


class Layer(NamedTuple):
    """A layer of a call: what its table depends on, and what changes."""

    dtype: torch.dtype
    result_dtype: torch.dtype
    """Of the output or, in the backward, of the gradient."""
    facts: LayerFacts
    addresses: tuple[int, ...]
    """Forward: of weight, output, u and v. Backward: of gradient (or 0), output and result."""


_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# More warps for float64, whose elements take two registers. So many registers leave room for two
# programs of float32 on a processor; without a limit the assembler spills some to make it three.
_WARPS = {torch.float32: 8, torch.float64: 16}
_REGISTERS = 128

# Tables are never given up, since a CUDA graph may hold their addresses.
_tables: dict[Any, Tables] = {}
# Memory of the host that replays of CUDA graphs read again; nothing tells when there are none any more.
_pinned_tables: dict[Any, Tables] = {}
_captured: list[Tensor] = []
# The interpreter keeps in globals what a program is.
_interpreter = RLock()


def run_forward(
    layers: Sequence[Layer], saved: Tensor, sigmas: Tensor, convergence: Tensor
) -> None:
    """Normalize layers of one compute dtype, in a fixed number of launches for each dtype."""
    with _on(saved.device):
        # All memory is there before the first launch.
        for group in [_Group(part, forward_tables, saved) for part in _by_dtype(layers)]:
            tables = group.tables
            common = (group.pointers, group.vectors, group.sums)
            for step in range(tables.half_steps):
                tiles = tables.turns[step % 2]
                half_step_kernel[(len(tiles),)](
                    tables.layers, tables.orders, tiles, *common, step, **group.constants
                )
            divide_kernel[(len(tables.row_tiles),)](
                tables.layers,
                tables.orders,
                tables.row_tiles,
                *common,
                saved,
                sigmas,
                convergence,
                len(convergence) // 2,
                **group.constants,
                **group.result,
            )


def run_backward(
    layers: Sequence[Layer], saved: Tensor, sigmas: Tensor, grad_sigmas: Tensor | None
) -> None:
    """Compute the gradients of layers of one compute dtype, in two launches for each dtype."""
    with _on(saved.device):
        for group in [_Group(part, backward_tables, saved) for part in _by_dtype(layers)]:
            tables = group.tables
            grid = (len(tables.row_tiles),)
            dot_kernel[grid](
                tables.layers, tables.row_tiles, group.pointers, group.sums, **group.constants
            )
            gradient_kernel[grid](
                tables.layers,
                tables.orders,
                tables.row_tiles,
                group.pointers,
                group.sums,
                saved,
                sigmas,
                sigmas if grad_sigmas is None else grad_sigmas,
                HAS_GRAD_SIGMAS=grad_sigmas is not None,
                **group.constants,
                **group.result,
            )


class _Group:
    """The layers of one dtype: their tables and addresses on the device, and a workspace."""

    def __init__(
        self,
        layers: Sequence[Layer],
        make: Callable[[Sequence[LayerFacts]], Tables],
        saved: Tensor,
    ) -> None:
        device, dtype = saved.device, saved.dtype
        self.tables = _cached(make, tuple(layer.facts for layer in layers), device)
        addresses = [layer.addresses for layer in layers]
        self.pointers = _upload(torch.tensor(addresses, dtype=torch.int64), device)
        self.vectors = torch.empty(self.tables.vectors, dtype=dtype, device=device)
        self.sums = torch.empty(self.tables.sums, dtype=torch.float64, device=device)
        self.constants = {**constants_of(layers[0].dtype, dtype), **options_of(dtype)}
        self.result = result_constant(layers[0].result_dtype)


def constants_of(dtype: torch.dtype, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Return what the kernels are compiled for, besides their arguments."""
    return {
        "T": _DTYPES[dtype],
        "A": _DTYPES[compute_dtype],
        "LANES": 16 // dtype.itemsize,
    }


def result_constant(dtype: torch.dtype) -> dict[str, Any]:
    """Return what the kernels that write a result are compiled for besides."""
    return {"RESULT_T": _DTYPES[dtype]}


def options_of(compute_dtype: torch.dtype) -> dict[str, int]:
    """Return how the kernels are compiled."""
    return {"num_warps": _WARPS[compute_dtype], "maxnreg": _REGISTERS}


def _by_dtype(layers: Sequence[Layer]) -> list[list[Layer]]:
    groups: dict[tuple[torch.dtype, torch.dtype], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.dtype, layer.result_dtype), []).append(layer)
    return list(groups.values())


def _cached(
    make: Callable[[Sequence[LayerFacts]], Tables],
    facts: tuple[LayerFacts, ...],
    device: torch.device,
) -> Tables:
    """Return the tables of these layers on the device."""
    key = (make, facts, device)
    tables = _tables.get(key)
    if tables is None:
        if _is_capturing(device):
            # What a graph copies is there when it runs, and not yet for calls outside of it.
            if key not in _pinned_tables:
                _pinned_tables[key] = make(facts).moved_by(Tensor.pin_memory)
            return _pinned_tables[key].moved_by(lambda host: host.to(device, non_blocking=True))
        tables = _tables[key] = make(facts).moved_by(lambda table: _kept(table, device))
    return tables


def _kept(host: Tensor, device: torch.device) -> Tensor:
    """Copy to memory of the device that stays.

    By another thread: this one may be allocating from the pool of a CUDA graph that is to be. Waits for
    the copy, since the next call may come on another stream.
    """
    if device.type == "cpu":
        return host
    with ThreadPoolExecutor(1) as other:
        return other.submit(lambda: host.to(device)).result()


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, in the order of the current stream and without waiting for it."""
    if device.type == "cpu":
        return host
    host = host.pin_memory()
    if _is_capturing(device):
        _captured.append(host)
    return host.to(device, non_blocking=True)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one: Triton launches there. On the CPU, one launch at a time."""
    return torch.cuda.device(device) if device.type == "cuda" else _interpreter
