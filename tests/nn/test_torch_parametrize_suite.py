"""What PyTorch's own suite checks of ``parametrize``, on a layer that has a spectral norm.

The cases of ``test_torch_suite.py``, and the second run with ``swap_tensors``, are those of PyTorch.
"""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from nets import assert_close
from rooted import APPLY, Rooted, linear, noise, swapping, without_graph
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

F64 = torch.float64


@pytest.fixture(params=[False, True], ids=["", "swap"])
def swaps(request: pytest.FixtureRequest) -> Iterator[bool]:
    with swapping(request.param):
        yield request.param


@pytest.fixture(params=APPLY)
def kind(request: pytest.FixtureRequest, swaps: bool) -> str:
    return request.param


class AddOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


class Skew(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tril(-1) - x.tril(-1).T


def test_reads_inside_of_cached_are_one_tensor(kind):
    model, other = Rooted(kind, linear(5, 5)), linear(5, 5)
    parametrize.transfer_parametrizations_and_params(model.layer, other)
    with parametrize.cached():
        first, second = model.layer.weight, other.weight
        assert model.layer.weight is first and other.weight is second
        assert first is not second
    assert model.layer.weight is not first


def test_a_transfer_gives_a_layer_of_its_own(kind):
    model, other = Rooted(kind, linear(4, 4)), linear(4, 4)
    parametrize.register_parametrization(model.layer, "weight", AddOne())
    model(noise(2, 4))
    model.root.eval()
    other.eval()
    parametrize.transfer_parametrizations_and_params(model.layer, other)
    assert len(other.parametrizations.weight) == 2
    assert_close(other.weight, model.layer.weight)
    assert torch.equal(other.parametrizations.weight.original, model.original)
    parametrize.remove_parametrizations(other, "weight")
    assert type(other) is nn.Linear and parametrize.is_parametrized(model.layer, "weight")
    assert model(noise(2, 4)).shape == (2, 4)


def test_a_parametrization_takes_the_mode_of_its_layer(kind):
    layer = linear(4, 4).eval()
    model = Rooted(kind, layer)
    assert not model.norm.training
    layer.train()
    parametrize.register_parametrization(layer, "weight", AddOne().eval())
    assert all(p.training for p in layer.parametrizations.weight)


def test_the_type_before_parametrizations(kind):
    model = Rooted(kind, linear(4, 4))
    assert parametrize.type_before_parametrizations(model.layer) is nn.Linear
    assert isinstance(model.layer, nn.Linear) and isinstance(model.root, nn.Sequential)


class WithNotes(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3, dtype=F64)
        self.notes = [1.0, 2.0]


class CopiesItself(WithNotes):
    def __deepcopy__(self, memo: dict[int, object]) -> "CopiesItself":
        result = self.__new__(self.__class__)
        memo[id(self)] = result
        result.__dict__ = copy.deepcopy(self.__dict__, memo)
        return result


@pytest.mark.parametrize("cls", [WithNotes, CopiesItself])
def test_a_deep_copy_shares_nothing(kind, cls):
    model = Rooted(kind, cls())
    for more in ((), ("bias",)):
        for name in more:
            model.normalize(name)
        model(noise(2, 3))
        layer, copied = model.layer, copy.deepcopy(model.root)[0]
        assert layer.__dict__.keys() == copied.__dict__.keys()
        assert layer.notes == copied.notes and layer.notes is not copied.notes
        ours, theirs = dict(layer.named_parameters()), dict(copied.named_parameters())
        assert list(ours) == list(theirs)
        for key, parameter in ours.items():
            assert torch.equal(parameter, theirs[key]) and parameter is not theirs[key]
        x = noise(2, 3)
        assert_close(copied.eval()(x), model.root.eval()(x))
        model.root.train()


def test_a_parametrized_module_of_torch_is_not_pickled_and_ours_is(kind):
    model, x = Rooted(kind, linear(4, 5)), noise(2, 4)
    model(x)
    if kind == "stock":
        with pytest.raises(RuntimeError, match="state_dict"):
            pickle.dumps(model.root)
        return
    again = pickle.loads(pickle.dumps(model.root))
    assert_close(again.eval()(x), model.root.eval()(x))


@pytest.mark.parametrize("when", ["before a forward", "after a forward"])
def test_a_parametrization_of_the_original(kind, when):
    model, x = Rooted(kind, linear(4, 4)), noise(2, 4)
    if when == "after a forward":
        without_graph(lambda: model(x))
    list_ = model.layer.parametrizations.weight
    parametrize.register_parametrization(list_, "original", Skew())
    assert parametrize.is_parametrized(list_, "original") and "original" not in list_._parameters
    skew = without_graph(lambda: list_.original)
    assert torch.equal(skew, -skew.T)
    norm = list_[0]
    u = F.normalize(skew @ norm._v, dim=0, eps=1e-12)
    v = F.normalize(skew.T @ u, dim=0, eps=1e-12)
    expected = F.linear(x, skew / (u @ skew @ v), model.layer.bias)
    output = model(x)
    assert_close(output, expected)
    output.square().sum().backward()
    gradient = list_.parametrizations.original.original.grad
    assert gradient.tril(-1).abs().sum() > 0 and not gradient.triu().any()
    del output
    parametrize.remove_parametrizations(list_, "original", leave_parametrized=False)
    assert type(list_) is parametrize.ParametrizationList
    model(x)
    model.remove(leave_parametrized=False)
    assert type(model.layer) is nn.Linear


class OneRowLess(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:-1]


class Boolean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bool()


@pytest.mark.parametrize("cls", [OneRowLess, Boolean])
def test_a_refused_parametrization_leaves_the_layer_as_it_was(kind, cls):
    model, x = Rooted(kind, linear(4, 4)), noise(2, 4)
    output = without_graph(lambda: model.root.eval()(x))
    with pytest.raises(ValueError, match="may not change the"):
        parametrize.register_parametrization(model.layer, "weight", cls())
    with pytest.raises(ValueError, match="does not have a parametrization"):
        parametrize.remove_parametrizations(model.layer, "bias")
    assert len(model.layer.parametrizations.weight) == 1
    assert_close(model(x), output)


def test_assignment_goes_to_the_original(kind):
    model, x = Rooted(kind, linear(4, 4)), noise(2, 4)
    without_graph(lambda: model(x))
    original, value = model.original, noise(4, 4)
    model.layer.weight = value
    assert model.original is original and torch.equal(original, value)
    u, v = model.root.eval() and model.buffers
    assert_close(model(x), F.linear(x, value / (u @ value @ v), model.layer.bias))


def test_parametrizations_are_stacked_trained_and_removed(kind):
    layer, x = linear(4, 4), noise(3, 4)
    identities = id(layer.weight), id(layer.bias)
    model = Rooted(kind, layer)
    parametrize.register_parametrization(layer, "weight", Double())
    parametrize.register_parametrization(layer, "bias", AddOne())
    optimizer = torch.optim.SGD(model.root.parameters(), lr=0.1)

    def step() -> None:
        before = [p.detach().clone() for p in model.root.parameters()]
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert len(before) == 2
        assert not any(map(torch.equal, model.root.parameters(), before))

    step()
    model.root.eval()
    weight = without_graph(lambda: layer.weight)
    model.remove()
    assert torch.equal(layer.weight, weight) and parametrize.is_parametrized(layer, "bias")
    step()
    parametrize.remove_parametrizations(layer, "bias", leave_parametrized=False)
    assert type(layer) is nn.Linear and (id(layer.weight), id(layer.bias)) == identities
    step()
