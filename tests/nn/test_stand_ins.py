"""After any kind of tracing the next forward is right: nothing that was made of stand-ins is kept."""

import copy

import pytest
import torch
from nets import assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext


def x(seed=0):
    return torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NORMS = {"parametrization": parametrizations.spectral_norm, "hook": hook_spectral_norm}


def model(norm):
    torch.manual_seed(0)
    layers = [NORMS[norm](nn.Linear(6, n, dtype=torch.float64)) for n in (6, 6)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def parameters_and_buffers(net):
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def fake(net):
    with FakeTensorMode(allow_non_fake_inputs=True):
        net(x())


def fake_whole(net):
    with FakeTensorMode() as mode:
        tensors = {k: mode.from_tensor(v) for k, v in parameters_and_buffers(net).items()}
        functional_call(net, tensors, mode.from_tensor(x()))


def proxies(tracing_mode):
    def trace(net):
        tensors = {k: v.detach().clone() for k, v in parameters_and_buffers(net).items()}
        call = make_fx(lambda t, y: functional_call(net, t, y), tracing_mode=tracing_mode)
        call(tensors, x())

    return trace


def batched(net):
    tensors = {k: torch.stack([v, v]).detach() for k, v in parameters_and_buffers(net).items()}
    vmap(lambda t, y: functional_call(net, t, y), (0, None))(tensors, x())


def transformed(net):
    tensors = {k: v.detach().clone() for k, v in net.named_parameters()}
    grad(lambda t: functional_call(net, t, x()).sum())(tensors)


def dual(net):
    buffers = dict(net.named_buffers())
    tensors = {k: v.detach().clone() for k, v in net.named_parameters()}
    jvp(lambda t: functional_call(net, {**t, **buffers}, x()), (tensors,), (tensors,))


TRACES = {
    "FakeTensorMode": fake,
    "FakeTensorMode, whole": fake_whole,
    "make_fx": proxies("real"),
    "make_fx, fake": proxies("fake"),
    "FX": lambda net: torch.fx.symbolic_trace(net),
    "jit.trace": lambda net: torch.jit.trace(net, x(), check_trace=False),
    "export": lambda net: torch.export.export(net, (x(),)),
    "vmap": batched,
    "grad": transformed,
    "jvp": dual,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "case", ["forward train first", "forward eval later", "step train later", "manual eval first"]
)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("trace", TRACES)
def test_the_next_forward_is_right(trace, norm, case):
    update, training, trained = case.split()
    net = model(norm)
    group = spectral_ext.fuse(net, update=update, check_finite=True)
    if trained == "later":
        net(x(1))
    net.train(training == "train")
    TRACES[trace](net)
    lone = model(norm)
    lone.load_state_dict(
        spectral_ext.stock_state_dict(net, "hook" if norm == "hook" else "parametrization")
    )
    junk = [torch.full((6, 6), float(i)) for i in range(50)]  # takes the memory that was let go
    del junk
    for training_now in (False, True):
        for m in (net, lone):
            m.train(training_now)
        if training_now and (update != "forward" or norm == "hook"):
            continue
        y = net(x(2))
        assert type(y) is torch.Tensor
        assert_close(y, lone(x(2)), "output")
    for report in (group.sigmas, group.iterations, group.residuals):
        assert type(report) is torch.Tensor
        report.tolist()
    group.check()
    net(x(2)).sum().backward()
    assert all(type(p.grad) is torch.Tensor for p in net.parameters())
    copy.deepcopy(net)(x(2))


@pytest.mark.parametrize("mode", ["fake", "FX"])
def test_a_dry_run_leaves_u_and_v(mode):
    net = model("parametrization")
    spectral_ext.fuse(net)
    before = copy.deepcopy(net.state_dict())
    TRACES["FX" if mode == "FX" else "FakeTensorMode"](net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_fx_has_traced_follows_the_weights():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (
                parametrizations.spectral_norm(nn.Linear(6, 6).double()) for _ in "ab"
            )

        def forward(self, x):
            return nn.functional.linear(self.a(x), self.b.weight * 2, self.b.bias)

    net = Functional().eval()
    spectral_ext.fuse(net)
    traced = torch.fx.symbolic_trace(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert_close(traced(x()), net(x()), "output")
    traced(x()).sum().backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())
