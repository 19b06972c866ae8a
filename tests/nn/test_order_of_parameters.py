"""The order of parameters, by which optimizers save and load their state."""

import copy
import warnings

import pytest
import torch
from nets import assert_close
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import spectral_ext


class Block(nn.Module):
    """A weight of its own, and a child."""

    def __init__(self, norm=spectral_norm):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4, bias=False)
        norm(self)

    def forward(self, x):
        return self.inner(x @ self.weight)


class Both(Block):
    """A parametrization and a hook on one module."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.randn(4, 4))
        self.third = nn.Parameter(torch.randn(4, 4))
        spectral_norm(self, "other")
        spectral_norm(self, "third")

    def forward(self, x):
        return super().forward(x @ self.other @ self.third)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4, 4))
        parametrizations.spectral_norm(self, "weight")
        spectral_norm(self, "bias")

    def forward(self, x):
        return x @ self.weight @ self.bias


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4)
        spectral_norm(self.lstm, "weight_hh_l0")
        spectral_norm(self.lstm, "weight_ih_l0")

    def forward(self, x):
        return self.lstm(x[None])[0][0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = spectral_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Late(nn.Linear):
    """A parameter that follows the weight."""

    def __init__(self):
        super().__init__(4, 4)
        spectral_norm(self)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return super().forward(x) * self.scale


class Stock(Block):
    """PyTorch's parametrization is the last child, and stays it."""

    def __init__(self):
        super().__init__(parametrizations.spectral_norm)


SAME = {
    "block": Block,
    "both": Both,
    "mixed": Mixed,
    "recurrent": Recurrent,
    "attention": Attention,
    "parametrization": Stock,
    "layers": lambda: nn.Sequential(spectral_norm(nn.Linear(4, 4)), spectral_norm(nn.Linear(4, 4))),
}


def make(cls):
    torch.manual_seed(0)
    return nn.Sequential(cls(), nn.Linear(4, 4)).double()


def step(net, optimizer):
    optimizer.zero_grad()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    net(x).sub(1).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", SAME)
def test_fuse_and_unfuse_keep_the_order(kind):
    net = make(SAME[kind])
    parameters = list(map(id, net.parameters()))
    names, children = [n for n, _ in net.named_parameters()], [n for n, _ in net.named_modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            spectral_ext.fuse(net)
            assert list(map(id, net.parameters())) == parameters
        copied = copy.deepcopy(net)
        assert [n for n, _ in copied.named_parameters()] == [n for n, _ in net.named_parameters()]
    spectral_ext.unfuse(net)
    assert list(map(id, net.parameters())) == parameters
    assert [n for n, _ in net.named_parameters()] == names
    assert [n for n, _ in net.named_modules()] == children


@pytest.mark.parametrize("kind", SAME)
def test_a_checkpoint_of_an_optimizer_goes_on_with_the_fused_model(kind):
    stock, net = make(SAME[kind]), make(SAME[kind])
    before = torch.optim.Adam(stock.parameters(), 1e-2)
    for _ in range(3):
        step(stock, before)
    spectral_ext.fuse(net)
    net.load_state_dict(stock.state_dict())
    after = torch.optim.Adam(net.parameters(), 1e-2)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for _ in range(3):
        step(stock, before)
        step(net, after)
    for found, expected in zip(net.parameters(), stock.parameters(), strict=True):
        assert_close(found, expected, rtol=1e-9)


def test_an_order_that_cannot_be_kept_is_said():
    net = make(Late)
    before = list(map(id, net.parameters()))
    with pytest.warns(UserWarning, match=r"^0\.weight of Late: fuse changes the order") as caught:
        spectral_ext.fuse(net)
    assert len(caught) == 1
    assert "load no optimizer checkpoint" in str(caught[0].message)
    assert list(map(id, net.parameters())) != before
    spectral_ext.unfuse(net)
    assert list(map(id, net.parameters())) == before


def test_a_warning_that_is_an_error_changes_nothing():
    net = make(Late)
    before, keys = list(map(id, net.parameters())), list(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="changes the order"):
            spectral_ext.fuse(net)
    assert (list(map(id, net.parameters())), list(net.state_dict())) == (before, keys)
    assert type(net) is nn.Sequential
