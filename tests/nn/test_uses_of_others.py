"""What public code does with spectral norms beside calling the model: the numbers stay PyTorch's.

Each use is a function of the norm (either of PyTorch's) and of what is done to the finished model:
nothing, or ``fuse``. It returns tensors.
"""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from nets import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import spectral_ext

Norm = Callable[..., nn.Module]
Finish = Callable[[nn.Module], object]
Use = Callable[[Norm, Finish], list[Tensor]]
NORMS = {"hook": hook_spectral_norm, "parametrization": parametrizations.spectral_norm}
USES: list[tuple[str, Use]] = []
F64 = torch.float64


def use(*norms: str) -> Callable[[Use], Use]:
    """Register a use for these norms, or for both."""

    def register(function: Use) -> Use:
        USES.extend((norm, function) for norm in norms or NORMS)
        return function

    return register


@pytest.mark.parametrize(("norm", "function"), USES, ids=lambda x: getattr(x, "__name__", x))
def test_numbers_are_those_of_torch(norm, function):
    torch.manual_seed(0)
    expected = function(NORMS[norm], lambda model: None)
    torch.manual_seed(0)
    found = function(NORMS[norm], spectral_ext.fuse)
    assert len(found) == len(expected) > 0
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_close(a, b, f"tensor {place}", rtol=1e-9)


def data() -> Tensor:
    return torch.linspace(-2, 2, 12, dtype=F64).reshape(3, 4).sin()


def net(norm: Norm) -> nn.Sequential:
    first, last = nn.Linear(4, 5, dtype=F64), nn.Linear(5, 2, dtype=F64)
    return nn.Sequential(norm(first), nn.Tanh(), norm(last))


def train(model: nn.Module, each: Callable[[], object] = lambda: None) -> list[Tensor]:
    """Return the outputs of three steps, and that in eval mode afterwards."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    outputs = []
    for _ in range(3):
        output = model(data())
        optimizer.zero_grad()
        output.square().sum().backward()
        optimizer.step()
        each()
        outputs.append(output.detach())
    last = model.eval()(data()).detach()
    model.train()
    return [*outputs, last]


def initialize(module: nn.Module) -> None:
    """The idiom of GAN code: by the name of the class, and through ``data``."""
    if "Linear" in type(module).__name__ and hasattr(module, "weight"):
        values = torch.linspace(-1, 1, module.weight.numel(), dtype=F64)
        module.weight.data.copy_(values.reshape(module.weight.shape))


def other_weight() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 20, dtype=F64).cos().reshape(5, 4))


@use()
def initializers_before_the_model_is_finished(norm, finish):
    model = net(norm).apply(initialize)
    finish(model)
    return train(model)


@use()
def initializers_of_a_finished_model(norm, finish):
    """The hook's weight is the raw one until the first call, so it counts; a parametrization's never."""
    model = net(norm)
    finish(model)
    model.apply(initialize)
    return train(model)


@use()
def initializers_after_a_call(norm, finish):
    model = net(norm)
    finish(model)
    model(data())
    model.apply(initialize)
    return train(model)


@use()
def moving_averages(norm, finish):
    model = net(norm)
    finish(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    outputs = train(model, lambda: ema.update_parameters(model))
    return [*outputs, ema.eval()(data()).detach()]


@use()
def averages_of_buffers_too(norm, finish):
    model = net(norm)
    finish(model)
    mean = AveragedModel(model, use_buffers=True)
    return train(model, lambda: mean.update_parameters(model))


@use("parametrization")
def pruning_of_the_original(norm, finish):
    model = net(norm)
    prune.l1_unstructured(model[0].parametrizations.weight, "original", amount=0.3)
    finish(model)
    outputs = train(model)
    prune.l1_unstructured(model[2].parametrizations.weight, "original", amount=0.3)
    return outputs + train(model)


@use()
def pruning_of_a_bias(norm, finish):
    model = net(norm)
    finish(model)
    prune.random_unstructured(model[0], "bias", amount=2)
    return train(model)


def test_a_pruned_weight_under_the_hook_is_refused_by_name():
    """The mask makes ``weight_orig`` a plain attribute, computed from another parameter before each call."""
    model = net(hook_spectral_norm)
    prune.l1_unstructured(model[0], "weight_orig", amount=0.3)
    expected = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"0\.weight"):
        spectral_ext.fuse(model)
    assert type(model) is nn.Sequential and list(model.state_dict()) == list(expected)
    model(data()).sum().backward()


@use("hook")
def sigma_from_the_attributes_of_the_hook(norm, finish):
    model, sigmas = net(norm), []
    finish(model)

    def log() -> None:
        for layer in (model[0], model[2]):
            sigma = layer.weight_u @ layer.weight_orig.flatten(1) @ layer.weight_v
            sigmas.append(sigma.detach().reshape(1))

    return train(model, log) + sigmas


@use("hook")
def a_penalty_on_the_weight_that_the_forward_used(norm, finish):
    model, gradients = net(norm), []
    finish(model)
    for _ in range(3):
        loss = model(data()).square().sum()
        for layer in (model[0], model[2]):
            loss = loss + (layer.weight @ layer.weight.T - torch.eye(len(layer.weight))).norm()
        model.zero_grad()
        loss.backward()
        gradients += [layer.weight_orig.grad.clone() for layer in (model[0], model[2])]
    return gradients


@use()
def parameters_through_one_vector(norm, finish):
    """Every parameter becomes a view of the vector."""
    model = net(norm)
    finish(model)
    outputs = train(model)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(1.5 * vector, model.parameters())
    return outputs + train(model)


@use()
def new_data_for_every_parameter(norm, finish):
    model = net(norm)
    finish(model)
    model(data())
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data + 0.1
    return train(model)


@use()
def children_in_another_model(norm, finish):
    model = net(norm)
    finish(model)
    model(data())
    features = nn.Sequential(*list(model.children())[:-1])
    around = nn.Sequential(nn.Linear(4, 4, dtype=F64), model)
    return train(features) + train(model) + train(around)


@use()
def layers_come_and_go(norm, finish):
    model = net(norm)
    finish(model)
    model(data())
    model[0] = nn.Linear(4, 5, dtype=F64)
    outputs = train(model)
    model.append(nn.Linear(2, 2, dtype=F64))
    return outputs + train(model)


@use()
def a_norm_put_on_in_the_constructor_of_a_root(norm, finish):
    class Normalized(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2, dtype=F64)
            norm(self)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = Normalized()
    finish(model)
    return train(model)


@use("parametrization")
def other_settings_of_a_parametrization(norm, finish):
    model = net(norm)
    finish(model)
    model(data())
    model[0].parametrizations.weight[0].n_power_iterations = 5
    return train(model)


@use("hook")
def other_settings_of_a_hook(norm, finish):
    model = net(norm)
    finish(model)
    model(data())
    for hook in model[0]._forward_pre_hooks.values():
        if isinstance(hook, StockHook):
            hook.n_power_iterations = 5
    return train(model)


@use("hook")
def another_parameter_as_the_weight_of_a_hook(norm, finish):
    model = net(norm)
    finish(model)
    model(data())
    model[0].weight_orig = other_weight()
    return train(model)


@use("parametrization")
def another_parameter_as_the_original(norm, finish):
    model = net(norm)
    finish(model)
    model(data())
    model[0].parametrizations.weight.original = other_weight()
    return train(model)


@use("hook")
def hooks_called_by_hand(norm, finish):
    model, weights = net(norm), []
    finish(model)
    for hook in list(model[0]._forward_pre_hooks.values()):
        hook(model[0], None)
        weights.append(model[0].weight.detach())
        weights.append(hook.compute_weight(model[0], do_power_iteration=False).detach())
        weights.append(hook.compute_weight(model[0], do_power_iteration=True).detach())
    return weights + train(model)


@use("hook")
def a_hook_taken_off_by_hand(norm, finish):
    """What ``remove_spectral_norm`` did in its first versions, still found in old code."""
    model = net(norm)
    finish(model)
    model(data())
    for key, hook in list(model[0]._forward_pre_hooks.items()):
        if isinstance(hook, StockHook) and hook.name == "weight":
            hook.remove(model[0])
            del model[0]._forward_pre_hooks[key]
    return train(model)


@use("parametrization")
def entries_of_a_list_and_a_buffer(norm, finish):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([other_weight(), other_weight()])
            self.register_buffer("fixed", other_weight().detach().T.contiguous())
            norm(self.weights, "0")
            norm(self, "fixed")

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.linear(x, self.weights[0]) + F.linear(x, self.weights[1])
            return F.linear(hidden, self.fixed)

    model = Net()
    finish(model)
    return train(model)


@use()
def line_searches(norm, finish):
    model, losses = net(norm), []
    finish(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(data()).square().sum()
        loss.backward()
        losses.append(loss.detach().reshape(1))
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return losses


@use()
def traces_in_eval_mode(norm, finish):
    model = net(norm)
    finish(model)
    outputs = train(model)
    traced = torch.jit.trace(model.eval(), data())
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    return [*outputs, traced(data()).detach(), torch.jit.load(buffer)(data()).detach()]


@use()
def another_memory_format(norm, finish):
    model = nn.Sequential(norm(nn.Conv2d(4, 3, 2, dtype=F64)), norm(nn.Conv2d(3, 2, 2, dtype=F64)))
    finish(model)
    images = torch.linspace(-3, 3, 200, dtype=F64).cos().reshape(2, 4, 5, 5)
    outputs = [model(images)]
    model.to(memory_format=torch.channels_last)
    outputs.append(model(images))
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    outputs += [model(images), model.eval()(images)]
    return [output.detach() for output in outputs]


def test_a_norm_takes_the_mode_of_its_layer():
    for norm in (parametrizations.spectral_norm, spectral_ext.spectral_norm):
        layer = nn.Linear(3, 3).eval()
        norm(layer)
        assert not any(p.training for p in layer.parametrizations.weight)
        parametrize.remove_parametrizations(layer, "weight")
