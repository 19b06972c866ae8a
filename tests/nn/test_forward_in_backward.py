"""A forward inside of a backward that no checkpoint has asked for is a forward as any other."""

import pytest
import torch
from nets import STOCK, assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectral_ext

WIDTH = 6


class Adjoint(torch.autograd.Function):
    """``z' = f(z)`` by explicit steps; the backward evaluates ``f`` again, as adjoint methods do."""

    @staticmethod
    def forward(ctx, function, z, steps, *parameters):
        states = [z]
        with torch.no_grad():
            for _ in range(steps):
                states.append(states[-1] + 0.1 * function(states[-1]))
        ctx.function = function
        ctx.save_for_backward(*states, *parameters)
        ctx.steps = steps
        return states[-1]

    @staticmethod
    def backward(ctx, grad):
        saved, count = ctx.saved_tensors, ctx.steps + 1
        states, parameters = saved[:count], saved[count:]
        totals = [torch.zeros_like(p) for p in parameters]
        for z in reversed(states[:-1]):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                found = torch.autograd.grad(ctx.function(z), [z, *parameters], 0.1 * grad)
            grad = grad + found[0]
            totals = [x + y for x, y in zip(totals, found[1:], strict=True)]
        return (None, grad, None, *totals)


def model_of(kind, **settings):
    """Return one model for all kinds: stock's, our layers alone, or fused."""
    torch.manual_seed(0)
    norm = spectral_ext.spectral_norm if kind == "alone" else STOCK["u_first"]
    layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2)]
    for layer in layers:  # singular values so close to each other that u and v move for long
        with torch.no_grad():
            nn.init.orthogonal_(layer.weight)
            layer.weight.mul_(torch.linspace(0.97, 1, WIDTH)[:, None])
        norm(layer)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    if kind == "fused":
        spectral_ext.fuse(model, **settings)
    return model


def sample(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def assert_same(found, expected):
    for (name, parameter), other in zip(
        found.named_parameters(), expected.parameters(), strict=True
    ):
        if other.grad is not None:
            assert_close(parameter.grad, other.grad, name)
    for (name, buffer), other in zip(found.named_buffers(), expected.buffers(), strict=True):
        assert_close(buffer, other, name)


@pytest.mark.parametrize("kind", ["alone", "fused"])
def test_an_adjoint_solver_advances_u_and_v_as_in_pytorch(kind):
    """The forwards without gradients in its forward are not mistaken for those of a checkpoint."""
    models = []
    for name in ("stock", kind):
        model = model_of(name)
        for i in range(3):
            z = sample(i)
            Adjoint.apply(model, z, 5, *model.parameters()).square().sum().backward()
        models.append(model)
    assert_same(models[1], models[0])


@pytest.mark.parametrize("kind", ["alone", "fused"])
def test_a_model_that_only_runs_in_hooks_of_a_backward_advances(kind):
    models = []
    for name in ("stock", kind):
        model = model_of(name)

        def hook(grad, model=model):
            with torch.enable_grad():
                model(grad.detach()).square().sum().backward()
            return grad

        for i in range(4):
            q = sample(i) * 1
            q.register_hook(hook)
            q.sum().backward()
        models.append(model)
    assert_same(models[1], models[0])


@pytest.mark.parametrize("update", ["step", "manual"])
def test_weights_that_are_kept_stay_kept_in_a_backward(update):
    model, plain = model_of("fused", update=update), model_of("stock")
    if update == "step":
        plain(sample())  # the one update between two steps
    plain.eval()
    model(sample())
    for net in (plain, model):
        z = sample()
        Adjoint.apply(net, z, 5, *net.parameters()).square().sum().backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["alone", "fused"])
def test_checkpoints_in_a_forward_in_a_backward(kind, reentrant):
    """The solver's function is checkpointed: its recomputation uses the vectors of its own forward."""
    models = []
    for checkpointed in (False, True):
        model = model_of(kind)

        def run(z, model=model, checkpointed=checkpointed):
            return checkpoint(model, z, use_reentrant=reentrant) if checkpointed else model(z)

        def hook(grad, run=run):
            with torch.enable_grad():
                x = grad.detach().requires_grad_()
                y = run(run(x)).square().sum()
                run(x)
                y.backward()
            return grad

        for i in range(3):
            q = sample(i) * 1
            q.register_hook(hook)
            q.sum().backward()
        models.append(model)
    assert_same(models[1], models[0])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["alone", "fused"])
def test_an_adjoint_solver_in_a_checkpoint(kind, reentrant):
    """The forwards of the solver belong to the checkpoint; those of its backward advance u and v."""
    models = []
    for checkpointed in (False, True):
        model = model_of(kind)

        def solve(z, model=model):
            return Adjoint.apply(model, z, 3, *model.parameters())

        z = sample()
        for _ in range(3):
            z = checkpoint(solve, z, use_reentrant=reentrant) if checkpointed else solve(z)
        z.square().sum().backward()
        models.append(model)
    assert_same(models[1], models[0])


class WithGradients(nn.Module):
    """Its forward turns gradients on, whatever they were on entry."""

    def __init__(self, gain):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Linear(4, 4, dtype=torch.float64)
        self.layer = spectral_ext.spectral_norm(layer, gain=gain)
        self.layer.parametrizations.weight.original.requires_grad_(False)

    def forward(self, x):
        with torch.enable_grad():
            return self.layer(x)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("update", ["forward", "step", "manual"])
@pytest.mark.parametrize("gain", ["one", "sigma_per_channel"])
def test_the_gain_of_a_frozen_weight_has_its_gradient(gain, update, no_grad):
    alone, fused = WithGradients(gain), WithGradients(gain)
    spectral_ext.fuse(fused, update=update)
    if update == "manual":
        fused._spectral_group.iterate()
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for model in (alone, fused):
        with no_grad():
            y = model(x)
        y.square().sum().backward()
    found, expected = (m.layer.parametrizations.weight[0].gain.grad for m in (fused, alone))
    assert_close(found, expected, "gradient of the gain")
    assert fused.layer.parametrizations.weight.original.grad is None
