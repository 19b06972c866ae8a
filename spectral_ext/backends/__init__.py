"""The registry of backends: which exist, which can run here, and which one a call gets.

A backend is a module of this package with four functions, the interface :class:`Backend`. It knows
tensors and lists; it knows nothing of autograd or modules.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Backend",
    "PreparedForward",
    "name_of",
    "names",
    "select",
    "unavailable",
]

ENVIRONMENT_VARIABLE = "SPECTRAL_EXT_BACKEND"

# For each device type the backends that `auto` tries, best first. `reference` runs on any device.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_NAMES = ("reference", "cpu", "cuda", "triton")

# What `Backend.prepare` returns: outputs, saved, sigmas and convergence of (update, attached, dtype).
PreparedForward = Callable[
    [bool, bool, torch.dtype | None], tuple[list[Tensor], Tensor, Tensor, Tensor]
]


class Backend(Protocol):
    """What a backend module offers. Its operators have the schemas of :mod:`spectral_ext.ops`."""

    attach: Callable[..., tuple[list[Tensor], Tensor]] | None
    """The operator whose autograd node calls the backward natively; None: the node in Python does."""
    prepare: Callable[..., PreparedForward] | None
    """Takes the arguments of ``forward_`` up to ``vs``, and all settings, once.

    The function that it returns takes ``update``, whether to attach the results to the graph, and the dtype
    that ``allocate`` takes. It does the work of ``allocate``, ``forward_`` and ``attach``: outputs, saved,
    sigmas, convergence. None: there is no such short cut.
    """

    def unavailable(self, device: torch.device | None) -> str | None:
        """Return None if it can run (on ``device``, if given), else the reason in words."""

    def allocate(
        self, weights: Sequence[Tensor], dims: Sequence[int], dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return uninitialized ``outputs``, ``saved`` and ``sigmas`` for a forward.

        A ``dtype``, of half precision, is that of the outputs of float32 weights.
        """

    def forward_(
        self,
        weights: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        saved: Tensor,
        sigmas: Tensor,
        convergence: Tensor,
        dims: Sequence[int],
        n_power_iterations: Sequence[int],
        eps: Sequence[float],
        v_first: Sequence[bool],
        tols: Sequence[float],
        scales: Sequence[float],
        soft: Sequence[bool],
        update: bool,
    ) -> None:
        """Normalize all layers into ``outputs``; write us, vs, ``saved``, ``sigmas``, ``convergence``."""

    def backward(
        self,
        grad_outputs: Sequence[Tensor | None],
        grad_sigmas: Tensor | None,
        outputs: Sequence[Tensor],
        saved: Tensor,
        sigmas: Tensor,
        dims: Sequence[int],
        scales: Sequence[float],
        soft: Sequence[bool],
        detach_sigma: Sequence[bool],
        mask: Sequence[bool],
        widen: Sequence[bool],
    ) -> list[Tensor]:
        """Return the gradients of the weights for which ``mask`` is true.

        ``widen``, which may be empty, is true for half outputs of float32 weights.
        """


def names() -> tuple[str, ...]:
    """Return the names of all backends, whether they can run here or not."""
    return _NAMES


def name_of(backend: Backend) -> str:
    """Return the name of a backend."""
    return getattr(backend, "__name__", "?").rpartition(".")[2]


@cache
def _load(name: str) -> Backend:
    """Import the module of a backend: not before it is asked for, since Triton's takes a second."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def unavailable(name: str, device: torch.device | None = None) -> str | None:
    """Return None if backend ``name`` can run (on ``device``, if given), else the reason in words."""
    return _load(name).unavailable(device)


def select(name: str | None, device: torch.device) -> Backend:
    """Return the backend for tensors on ``device``.

    Args:
        name: one of :func:`names`, or ``auto``; None means the environment variable
            ``SPECTRAL_EXT_BACKEND``, or ``auto``. ``auto`` takes the best that can run, at worst
            ``reference``; any other name is taken at its word.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot run on ``device``; the message says why.
    """
    name = name or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    chosen = _chosen.get((name, device))
    if chosen is None:
        chosen = _chosen[name, device] = _choose(name, device)
    return chosen


# A dictionary and not functools.cache: torch.compile reads the one, and traces through the other.
_chosen: dict[tuple[str, torch.device], Backend] = {}


def _choose(name: str, device: torch.device) -> Backend:
    if name == "auto":
        candidates = (*_PREFERENCE.get(device.type, ()), "reference")
        name = next(candidate for candidate in candidates if unavailable(candidate, device) is None)
    elif name not in _NAMES:
        raise ValueError(f"backend={name!r} is unknown; expected auto, {', '.join(_NAMES)}")
    elif (reason := unavailable(name, device)) is not None:
        raise RuntimeError(f"backend={name!r} cannot run on {device}: {reason}")
    return _load(name)
