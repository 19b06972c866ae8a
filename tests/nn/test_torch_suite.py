"""What PyTorch's own suite checks of parametrizations, for its spectral norm, ours, and a fused model.

PyTorch runs most of these tests twice, the second time with ``swap_tensors``: then conversions, loading
and removal exchange the contents of a parameter, which nothing else may refer to.
"""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from nets import assert_close
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import spectral_ext

F64 = torch.float64
APPLY = {
    "stock": parametrizations.spectral_norm,
    "ours": spectral_ext.spectral_norm,
    "fused": parametrizations.spectral_norm,
}


@pytest.fixture(params=[False, True], ids=["", "swap"])
def swaps(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture(params=APPLY)
def kind(request: pytest.FixtureRequest, swaps: bool) -> str:
    return request.param


class Rooted:
    """A layer inside of a model, whose call enters the group where there is one."""

    def __init__(self, kind: str, layer: nn.Module, *names: str) -> None:
        self.kind, self.layer, self.root = kind, layer, nn.Sequential(layer)
        self.normalize(*(names or ("weight",)))

    def normalize(self, *names: str) -> None:
        for name in names:
            APPLY[self.kind](self.layer, name)
        self.fuse()

    def fuse(self) -> None:
        if self.kind == "fused":
            spectral_ext.fuse(self.root)

    @property
    def norm(self) -> nn.Module:
        return self.layer.parametrizations.weight[0]

    @property
    def original(self) -> nn.Parameter:
        return self.layer.parametrizations.weight.original

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.norm._u.clone(), self.norm._v.clone()

    def remove(self, name: str = "weight", **settings: bool) -> None:
        parametrize.remove_parametrizations(self.layer, name, **settings)

    def __call__(self, x: Tensor) -> Tensor:
        return self.root(x)


def linear(*shape: int) -> nn.Linear:
    return nn.Linear(*shape, dtype=F64)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


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


def test_weight_and_vectors_are_where_the_layer_keeps_them(kind):
    layer = linear(5, 7)
    size, stride = layer.weight.size(), layer.weight.stride()
    model = Rooted(kind, layer)
    for _ in range(2):
        assert model.norm._u.shape == (7,) and model.norm._v.shape == (5,)
        assert {"_u", "_v"} <= model.norm._buffers.keys()
        lists = layer.parametrizations.weight
        assert isinstance(lists._parameters["original"], nn.Parameter)
        assert "weight" not in layer._parameters and "weight" not in layer._buffers
        for weight in (layer.weight, model.original):
            assert (weight.size(), weight.stride()) == (size, stride)
        model(noise(2, 5))
    del weight, lists
    model.remove()
    assert type(layer) is nn.Linear and not hasattr(layer, "parametrizations")
    assert isinstance(layer._parameters["weight"], nn.Parameter)


def test_a_tensor_takes_two_norms_and_a_layer_two_tensors(kind):
    layer = linear(5, 7)
    model = Rooted(kind, layer, "weight", "weight", "bias")
    model(noise(2, 5))
    assert len(layer.parametrizations.weight) == 2
    model.remove("bias")
    assert "bias" in layer._parameters and "weight" not in layer._parameters
    assert parametrize.is_parametrized(layer, "weight")
    model(noise(2, 5))
    model.remove()
    assert not parametrize.is_parametrized(layer) and "weight" in layer._parameters
    model(noise(2, 5))


@pytest.mark.parametrize("trained", [True, False])
def test_vectors_move_where_the_weight_does(kind, trained):
    layer = linear(3, 4)
    layer.weight.requires_grad_(trained)
    model, x = Rooted(kind, layer), noise(2, 3)
    before = model.vectors()
    optimizer = torch.optim.SGD(model.root.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    output = model(x)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.vectors(), strict=True)]
    if trained:
        assert all(moved)
        (gradient,) = torch.autograd.grad(output.sum(), model.original)
        assert gradient.abs().sum() > 0
    else:
        assert model.original.grad is None and not layer.weight.requires_grad
    # Finite differences ask for a function: every call begins with the same vectors.
    u, v = model.vectors()

    def twice(x: Tensor) -> Tensor:
        model.norm._u.data.copy_(u)
        model.norm._v.data.copy_(v)
        return model(x) + model(x)

    twice(x.clone().requires_grad_()).sum().backward()
    assert gradcheck(twice, (x.clone().requires_grad_(),))


@pytest.mark.parametrize("trained", [True, False])
def test_eval_mode_repeats_the_last_output_of_training(kind, trained):
    layer = linear(3, 4)
    layer.weight.requires_grad_(trained)
    model, x = Rooted(kind, layer), noise(2, 3)
    model(x)
    last = model(x).detach()
    u, v = model.vectors()
    model.root.eval()
    for _ in range(2):
        assert_close(model(x), last)
    assert torch.equal(model.norm._u, u) and torch.equal(model.norm._v, v)

    def in_turns(x: Tensor) -> Tensor:
        model.norm._u.data.copy_(u)
        model.norm._v.data.copy_(v)
        return sum(model.root.train(mode)(x) for mode in (True, False, True, False))

    assert gradcheck(in_turns, (x.clone().requires_grad_(),))
    model.root.eval()
    if trained:
        assert gradcheck(lambda _: model(x), (model.original,))


def test_removal_keeps_the_output(kind):
    layer, x = linear(3, 4), noise(2, 3)
    model = Rooted(kind, layer)
    for forwards in (1, 3):
        for _ in range(forwards):
            output = model(x).detach()
        model.root.eval()
        model.remove()
        assert type(layer) is nn.Linear
        assert_close(model(x), output)
        model.root.train()
        model.normalize("weight")
        assert parametrize.is_parametrized(layer)


@pytest.mark.parametrize("forwards", [0, 3])
def test_what_loads_strictly_and_what_only_otherwise(kind, forwards):
    model, x = Rooted(kind, linear(3, 5)), noise(2, 3)
    layer = model.layer
    for _ in range(forwards):
        model(x)
    state = copy.deepcopy(layer.state_dict())
    inner = "parametrizations.weight"
    keys = ["bias", f"{inner}.original", f"{inner}.0._u", f"{inner}.0._v"]
    assert sorted(state) == sorted(keys)
    less = copy.deepcopy(state)
    less["unknown"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "unknown"'):
        layer.load_state_dict(less)
    for key in (None, *keys[1:]):
        less.pop(key, None)
        layer.load_state_dict(less, strict=False)
    less["weight"] = layer.weight.detach().clone()
    layer.load_state_dict(less, strict=False)
    del less._metadata[f"{inner}.0"]
    layer.load_state_dict(less, strict=False)
    del less["weight"], less["bias"]
    layer.load_state_dict(less, strict=False)

    def answers() -> list[Tensor]:
        with torch.no_grad():
            modes = (False, True, True, False)
            return [model.root.train(mode)(x).clone() for mode in modes]

    found = []
    for _ in range(2):
        model.remove()
        model.normalize("weight")
        layer.load_state_dict(state)
        found.append(answers())
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_transposed_convolution_has_its_rows_in_dimension_1(kind):
    layer = nn.ConvTranspose2d(3, 4, (5, 6), dtype=F64)
    model = Rooted(kind, layer)
    assert model(noise(2, 3, 10, 12)).shape[1] == 4
    assert model.norm._u.shape == (4,) and model.norm._v.shape == (3 * 5 * 6,)


def test_a_forward_is_one_step_and_a_division(kind):
    model, x = Rooted(kind, linear(5, 7)), noise(3, 5)
    weight = model.original.detach().clone()
    u = F.normalize(weight @ model.norm._v, dim=0, eps=1e-12)
    v = F.normalize(weight.T @ u, dim=0, eps=1e-12)
    expected = F.linear(x, weight / (u @ weight @ v), model.layer.bias)
    assert_close(model(x), expected)
    for found, vector in zip(model.vectors(), (u, v), strict=True):
        assert_close(found, vector)


def test_of_a_diagonal_weight_sigma_is_the_largest_entry(kind):
    layer = linear(2, 2)
    layer.weight = nn.Parameter(torch.tensor([0.1, -0.4], dtype=F64).diag())
    model = Rooted(kind, layer)
    for mode in (True, False):
        weight = model.root.train(mode)[0].weight
        assert_close(weight, torch.tensor([0.25, -1], dtype=F64).diag())


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


def without_graph(function: Callable[[], Tensor]) -> Tensor:
    """A graph that is alive refers to the weight, and swap_tensors refuses it."""
    return function().detach().clone()


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
