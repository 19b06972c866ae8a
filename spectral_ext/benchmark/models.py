"""What is measured: the normalized layers of a known model, or of one's own."""

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrizations

from ..nn import apply_spectral_norm, fuse, unfuse
from ..nn.find import find_norms

__all__ = ["SHAPES", "Layer", "Model", "load", "random_layer"]

#: The layers with spectral norm of real models: name, shape, and the dimension of the rows.
SHAPES: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "model_shapes.json").read_text()
)


@dataclass(frozen=True)
class Layer:
    """One weight, loaded in float32 on the CPU, and the dimension along which its rows lie."""

    name: str
    weight: Tensor
    dim: int


@dataclass(frozen=True)
class Model:
    """The normalized layers of a model; of one's own also the model with stock's norms, and its inputs."""

    name: str
    layers: list[Layer]
    net: Module | None = None
    inputs: tuple[Any, ...] = field(default=())

    @property
    def numel(self) -> int:
        """The parameters of all layers."""
        return sum(layer.weight.numel() for layer in self.layers)


def load(name: str) -> Model:
    """Return a model by its name in :data:`SHAPES`, one's own by ``path.py:factory``, or ``"9 x 64x32"``.

    The last has so many layers of so many rows and columns.
    A factory takes no argument and returns a module, or a tuple of a module and the inputs of its forward,
    with which whole steps of the model are measured, too. The layers are those that have a spectral
    norm, of stock's kinds or ours; if there is none, those that :func:`spectral_ext.apply_spectral_norm`
    would give one.

    Raises:
        ValueError: there is no such model, or nothing in it to normalize.
        OSError: the file cannot be read.
        TypeError: the factory returned something else.
    """
    if name in SHAPES:
        torch.manual_seed(0)
        return Model(name, [random_layer(**entry) for entry in SHAPES[name]])
    if (alike := re.fullmatch(r"(\d+) x (\d+)x(\d+)", name)) and "0" not in alike.groups():
        torch.manual_seed(0)
        count, *shape = map(int, alike.groups())
        return Model(name, [random_layer(f"layer{i}", shape, 0) for i in range(count)])
    path, colon, factory = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"there is no model {name!r}; give path.py:factory, '9 x 64x32' for layers that are alike, "
            f"or one of {', '.join(SHAPES)}"
        )
    torch.manual_seed(0)
    made = _function(Path(path), factory)()
    net, *inputs = made if isinstance(made, tuple) else (made,)
    if not isinstance(net, Module):
        raise TypeError(
            f"{name} must return a torch.nn.Module, and may add the inputs of its forward"
        )
    net = _with_stock_norms(net)
    return Model(factory, _layers_of(net), net, tuple(inputs))


def random_layer(name: str, shape: list[int], dim: int) -> Layer:
    """Return a layer of that shape with normal numbers, scaled for σ to be about 1 to 2."""
    columns = math.prod(shape) // shape[dim]
    return Layer(name, torch.randn(shape) / max(columns, shape[dim]) ** 0.5, dim)


def _function(path: Path, name: str) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # what is defined there may be pickled
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function {name!r}")
    return function


def _with_stock_norms(net: Module) -> Module:
    """Return a copy of a model as a user of stock has it."""
    net = unfuse(deepcopy(net))
    if not any(site.is_fusible for site in find_norms(net)):
        for name in apply_spectral_norm(deepcopy(net)).normalized:
            path, _, tensor_name = name.rpartition(".")
            parametrizations.spectral_norm(net.get_submodule(path), tensor_name)
    return net


def _layers_of(net: Module) -> list[Layer]:
    group = fuse(deepcopy(net))
    return [
        Layer(layer.qualified_name, layer.weight.detach().float().cpu(), layer.dim)
        for layer in group.layers
        if layer.weight.ndim > 1
    ]
