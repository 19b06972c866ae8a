"""What deel-torchlip's tests call beside the package, which its source distribution leaves out.

The tests are written for two frameworks, and do everything through a module of these names. A copy of
this file is put beside them, as ``utils_framework``. A class that is only in the other framework has the
attribute ``unavailable_class``.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from deel import torchlip
from torch import Tensor, nn

LIP_LAYERS = "torchlip"
MODEL_PATH = "model.pt"
Adam, SGD = torch.optim.Adam, torch.optim.SGD
MeanSquaredError = nn.MSELoss
Flatten, Model, Sequential = nn.Flatten, nn.Module, torchlip.Sequential
tLinear, tConv2d = nn.Linear, nn.Conv2d


def __getattr__(name: str) -> object:
    """Return torchlip's class of that name, or a stand-in for one that it does not have."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torchlip, name, None) or type(
        name, (), {"unavailable_class": True, "__init__": lambda self, *args, **settings: None}
    )


class tModel(nn.Module):
    """A model of named parts and a function of them."""

    def __init__(self, parts: dict[str, nn.Module | None], function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.names = list(parts)
        self.parts = nn.ModuleDict({k: part for k, part in parts.items() if part is not None})
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        named = dict.fromkeys(self.names) | dict(self.parts.items())
        return self.function(named, x)


def tInput(*args: object, **settings: object) -> None:
    """Layers of torch infer no shape from an input layer."""


def get_instance_framework(cls: Callable[..., Any], inst_params: dict[str, Any]) -> Any:
    settings = dict(inst_params)
    if cls in (Adam, SGD):
        parameters = list(settings.pop("model").parameters())
        return cls(parameters or [torch.zeros(1)], **settings)
    if not hasattr(cls, "unavailable_class"):
        known = inspect.signature(cls).parameters
        settings = {k: value for k, value in settings.items() if k in known}
    return cls(**settings)


def generate_k_lip_model(
    layer_type: type[nn.Module],
    layer_params: dict[str, Any],
    input_shape: tuple[int, ...] | None = None,
    k: float = 1.0,
) -> nn.Module:
    if issubclass(layer_type, nn.Sequential):
        layers = [layer for layer in layer_params["layers"] if layer is not None]
    else:
        layers = [get_instance_framework(layer_type, layer_params)]
    return torchlip.Sequential(*layers, k_coef_lip=k)


def get_functional_model(
    cls: type[tModel], parts: dict[str, nn.Module | None], function: Callable[..., Tensor]
) -> tModel:
    return cls(parts, function)


def compile_model(
    model: nn.Module, optimizer: object, loss: object, metrics: Sequence[object]
) -> tuple[object, object, Sequence[object]]:
    return loss, optimizer, metrics


def metric_mse() -> nn.Module:
    return nn.MSELoss()


def compute_output_shape(input_shape: tuple[int, ...], model: nn.Module) -> tuple[int, ...]:
    return tuple(compute_predict(model, torch.zeros(1, *input_shape)).shape[1:])


def compute_predict(model: nn.Module, x: Tensor, training: bool = False) -> Tensor:
    was_training = model.training
    model.train(training)
    with torch.set_grad_enabled(training):
        output = model(x)
    model.train(was_training)
    return output


def train(
    data: Iterator[tuple[np.ndarray, np.ndarray]],
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    steps_per_epoch: int,
    callbacks: Iterable[object] = (),
) -> None:
    model.train()
    for _ in range(epochs * steps_per_epoch):
        x, y = (to_tensor(array) for array in next(data))
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        if loss.requires_grad:  # a pooling layer has no parameters
            loss.backward()
        optimizer.step()


def run_test(
    model: nn.Module,
    data: Iterator[tuple[np.ndarray, np.ndarray]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    metrics: Sequence[Callable[[Tensor, Tensor], Tensor]],
    steps: int,
) -> tuple[float, float]:
    totals = np.zeros(2)
    for _ in range(steps):
        x, y = (to_tensor(array) for array in next(data))
        output = compute_predict(model, x)
        totals += [float(function(output, y)) for function in (loss_fn, metrics[0])]
    loss, metric = totals / steps
    return loss, metric


def evaluate_lip_const(model: nn.Module, x: Tensor, seed: int, eps: float = 1e-4) -> Tensor:
    """Return the largest ratio of distances of outputs and inputs, over small random steps."""
    set_seed(seed)
    double = x.double()
    other = double + eps * torch.randn_like(double)
    model.double()
    outputs = [compute_predict(model, point).flatten(1) for point in (double, other)]
    model.float()
    distances = (other - double).flatten(1).norm(dim=1)
    return ((outputs[1] - outputs[0]).norm(dim=1) / distances).max()


def save_model(model: nn.Module, path: str, overwrite: bool = True) -> None:
    torch.save(model.state_dict(), path)


def load_model(
    path: str,
    layer_type: type[nn.Module],
    layer_params: dict[str, Any],
    input_shape: tuple[int, ...],
    k: float,
) -> nn.Module:
    model = generate_k_lip_model(layer_type, layer_params, input_shape, k)
    model.load_state_dict(torch.load(path))
    return model.eval()


def vanilla_require_a_copy() -> bool:
    return True  # `vanilla_model` replaces layers in place


def copy_model_parameters(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def vanillaModel(model: nn.Module) -> nn.Module:
    model.eval()
    return (
        model.vanilla_export()
        if hasattr(model, "vanilla_export")
        else torchlip.vanilla_model(model)
    )


def get_layer_weights_by_index(model: nn.Sequential, index: int) -> Tensor:
    return model.eval()[index].weight


def is_supported_padding(padding_mode: str, cls: type[nn.Module]) -> bool:
    return padding_mode in ("zeros", "reflect", "circular", "replicate")


def to_tensor(array: np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(array), dtype=torch.float32)


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def to_framework_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def set_seed(seed: int) -> None:
    torch.manual_seed(seed)


def init_session() -> None:
    """Another framework keeps a graph for each process."""
