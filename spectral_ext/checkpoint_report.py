"""How well the spectral norms in a checkpoint are doing, without the model that it belongs to."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .nn.hook_keys import keys
from .nn.report import NormalizedTensor, Report

__all__ = ["load_state_dict", "report_state_dict"]

# Where checkpoints keep the state dict of a model, if not at the top.
USUAL_KEYS = ("state_dict", "model")
_WEIGHT_KEYS = (
    re.compile(r"(?P<prefix>(?:.*\.)?)(?P<tensor_name>[^.]+)_orig"),
    re.compile(r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<tensor_name>[^.]+)\.original"),
)
_NO_PRODUCT = "a checkpoint does not say how layers follow each other"

Track = Callable[[Sequence[NormalizedTensor]], Iterable[NormalizedTensor]]


def load_state_dict(path: str | Path, key: str | None = None) -> dict[str, Any]:
    """Read a file of ``torch.save`` to the CPU and return the state dict in it.

    Args:
        path: of the file. Only tensors and plain values are read; no code in it is run.
        key: where in the file the state dict is, with dots between the keys of nested dictionaries.
            By default the file itself, ``"state_dict"`` or ``"model"``, the first with a spectral
            norm.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no such file, or no state dict with a spectral norm is there; the message
            says what was.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path must be a str or a Path, got {type(path).__name__}")
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a file that is no checkpoint can raise anything
            raise ValueError(
                f"{path} cannot be loaded: it is damaged, no file of torch.save, or has other objects "
                f"than tensors and plain values, which are not read ({type(error).__name__})"
            ) from error
    places = [content] if key is None else []
    places += [_at(content, name) for name in (USUAL_KEYS if key is None else [key])]
    for place in places:
        if isinstance(place, Mapping) and _weights(place):
            return dict(place)
    where = str(path) if key is None else f"{key!r} of {path}"
    seen = content if key is None or places[0] is None else places[0]
    raise ValueError(f"{where} has no spectral norm; seen: {_seen(seen)}")


def report_state_dict(
    state_dict: Mapping[str, Any], *, exact: bool = False, track: Track = iter
) -> Report:
    """Measure every spectral norm of a state dict, in the layout of either of stock's or of ours.

    The settings are not in it: bounds count as 1, ``u`` and ``v`` as unit vectors, and the dimension
    of the rows is one whose size is that of ``u``; among several the one with the smallest residual.
    A parametrized 1-D weight has no ``u`` and is not recognized.

    Args:
        state_dict: tensors by their names.
        exact: see :func:`spectral_ext.nn.report.report`.
        track: wraps the iteration over the tensors, to show progress.

    Raises:
        TypeError, ValueError: an argument, or a weight with its ``u`` and ``v``, does not fit; the
            message names it.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    if not isinstance(exact, bool):
        raise TypeError(f"exact must be a bool, got {type(exact).__name__}")
    tensors = [_normalized_tensor(state_dict, *found) for found in _weights(state_dict)]
    return Report(tuple(tensor.measure(exact) for tensor in track(tensors)), why=_NO_PRODUCT)


def _weights(state_dict: Mapping[Any, Any]) -> list[tuple[str, list[str], bool]]:
    """Return for every norm its name, the keys of weight, ``u`` and ``v``, and whether a hook's."""
    found = []
    for key in state_dict:
        for layout, pattern in enumerate(_WEIGHT_KEYS):
            match = pattern.fullmatch(key) if isinstance(key, str) else None
            if match is not None:
                names = [pair[layout] for pair in keys(**match.groupdict())]
                if all(name in state_dict for name in names):
                    found.append((match["prefix"] + match["tensor_name"], names, layout == 0))
    return found


def _normalized_tensor(
    state_dict: Mapping[str, Any], name: str, names: list[str], is_hook: bool
) -> NormalizedTensor:
    weight, u, v = (state_dict[key] for key in names)
    for key, tensor in zip(names, (weight, u, v), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{key} must be a tensor, got {type(tensor).__name__}")
    dims = [dim for dim, size in enumerate(weight.shape) if u.shape == (size,)] or [0]
    order = "v_first" if is_hook else None
    candidates = [NormalizedTensor(name, weight, u, v, dim, order=order) for dim in dims]
    for candidate in candidates:
        candidate.check()
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda candidate: candidate.measure(exact=False).residual)


def _at(content: Any, key: str) -> Any:
    """Return what is at a key with dots, or None."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _seen(content: Any, limit: int = 12) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [str(key) for key in content]
    return ", ".join(names[:limit]) + (f", … ({len(names)} keys)" if len(names) > limit else "")
