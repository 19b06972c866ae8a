"""``torch.compile`` of a fused model whose forward cannot be one graph, and of one with buckets."""

import pytest
import torch
from nets import assert_close
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext

NORMS = {"parametrization": parametrizations.spectral_norm, "hook": hook_spectral_norm}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def reads_a_number(net, x):
    y = net.a(x)
    return net.b(y * (1 + abs(y.sum().item()) * 1e-3))


def branches_on_data(net, x):
    y = net.a(x)
    return net.b(y) if y.sum() > 0 else net.b(-y)


def prints(net, x):
    y = net.a(x)
    print("between")
    return net.b(y)


def breaks(net, x):
    y = net.a(x)
    torch._dynamo.graph_break()
    return net.b(y)


def breaks_in_a_part(net, x):
    return net.b(net.inner(net.a(x)))


def has_an_rnn(net, x):
    return net.b(net.rnn(net.a(x).unsqueeze(0))[0].squeeze(0))


def catches(net, x):
    try:
        if x.sum() > 1e9:
            raise ValueError("large")
        return net.b(net.a(x))
    except ValueError:
        return x


class Inner(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return torch.tanh(x)


class Net(nn.Module):
    def __init__(self, norm, run):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (NORMS[norm](nn.Linear(4, 4, dtype=torch.float64)) for _ in "ab")
        self.rnn, self.inner, self.run = nn.LSTM(4, 4, dtype=torch.float64), Inner(), run

    def forward(self, x):
        return self.run(self, x)


RUNS = [
    reads_a_number,
    branches_on_data,
    prints,
    breaks,
    breaks_in_a_part,
    has_an_rnn,
    catches,
]


def x(seed=0):
    return torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_a_model_with_graph_breaks_trains_like_the_uncompiled(run, norm, update):
    eager, net = Net(norm, run), Net(norm, run)
    for model in (eager, net):
        spectral_ext.fuse(model, update=update)
    compiled = torch.compile(net, backend="aot_eager")
    for training in (True, False):
        for step in range(3):
            losses = []
            for model, call in ((eager, eager), (net, compiled)):
                model.train(training).zero_grad()
                losses.append(call(x(step)).square().sum())
                losses[-1].backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.grad is not None:
                            parameter -= 0.02 * parameter.grad
            assert_close(losses[1], losses[0], f"loss of step {step}")
            for (name, found), expected in zip(
                net.state_dict().items(), eager.state_dict().values(), strict=True
            ):
                assert_close(found, expected, f"{name}, step {step}")
    assert_close(net(x()), eager(x()), "eager after compiled")


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("eager_first", [True, False])
@pytest.mark.parametrize("bucket_mb", [None, 1e-6, 25])
def test_buckets(bucket_mb, eager_first, fullgraph):
    def run(net, x):
        return net.b(net.a(x))

    eager, net = Net("parametrization", run), Net("parametrization", run)
    spectral_ext.fuse(eager)
    spectral_ext.fuse(net, bucket_mb=bucket_mb)
    if eager_first:
        for model in (eager, net):
            model(x()).sum().backward()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=fullgraph)
    for call in (eager, compiled):
        call(x(1)).square().sum().backward()
    for (name, found), expected in zip(net.named_parameters(), eager.parameters(), strict=True):
        if expected.grad is not None:
            assert_close(found.grad, expected.grad, name)


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layer = NORMS[norm](nn.Linear(4, 4, dtype=torch.float64))

    def forward(self, x):
        return x + self.layer(x)


class Blocks(nn.Module):
    """More equal blocks than Dynamo compiles their forward for; it runs the others in eager mode."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(4, 4, dtype=torch.float64)
        self.blocks = nn.Sequential(*[Block(norm) for _ in range(4)])

    def forward(self, x):
        return self.blocks(self.rnn(x)[0])


@torch._dynamo.config.patch(recompile_limit=2)
@pytest.mark.parametrize("eager_first", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("norm", NORMS)
def test_blocks_that_the_compiler_gives_up_train_like_the_uncompiled(norm, backend, eager_first):
    plain, net = Blocks(norm), Blocks(norm)
    for model in (plain, net):
        spectral_ext.fuse(model)
    if eager_first:
        for model in (plain, net):
            model(x())
    compiled = torch.compile(net, backend=backend)
    for step in range(4):
        losses = []
        for model, call in ((plain, plain), (net, compiled)):
            if step == 3:
                model.eval()
            model.zero_grad()
            losses.append(call(x(step)).square().sum())
            losses[-1].backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.02 * parameter.grad
        assert_close(losses[1], losses[0], f"loss of step {step}")
        for (name, found), expected in zip(
            net.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            assert_close(found, expected, f"{name}, step {step}")
