"""What PyTorch's own suite checks of parametrizations, for its spectral norm, ours, and a fused model.

PyTorch runs most of these tests twice, the second time with ``swap_tensors``: then conversions, loading
and removal exchange the contents of a parameter, which nothing else may refer to.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from nets import assert_close
from rooted import APPLY, Rooted, linear, noise, swapping, without_graph
from torch import Tensor, nn
from torch.autograd import gradcheck
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
    vectors = model.vectors()

    def twice(x: Tensor) -> Tensor:
        model.set_vectors(vectors)
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
    vectors = model.vectors()
    model.root.eval()
    for _ in range(2):
        assert_close(model(x), last)
    assert all(map(torch.equal, model.buffers, vectors))

    def in_turns(x: Tensor) -> Tensor:
        model.set_vectors(vectors)
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


def test_a_conversion_keeps_parameters_that_the_optimizer_has(kind, swaps):
    model = Rooted(kind, nn.Linear(3, 4))
    identity = id(model.original)
    without_graph(lambda: model(torch.ones(2, 3)))
    model.root.to(F64)
    assert id(model.original) == identity
    assert {t.dtype for t in model.root.state_dict().values()} == {F64}
    x = noise(2, 3)
    output = without_graph(lambda: model(x))
    assert output.dtype == F64
    assert_close(model.root.eval()(x), output)
    weight, (u, v) = model.original.detach().clone(), model.buffers
    assert_close(output, F.linear(x, weight / (u @ weight @ v), model.layer.bias))
    scaled = {key: 2 * t if t.ndim == 2 else t for key, t in model.root.state_dict().items()}
    model.root.load_state_dict(scaled)
    assert torch.equal(model.original, 2 * weight)
    assert_close(model(x), output)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_diagonal_weight(kind, dtype):
    layer = nn.Linear(2, 2, dtype=dtype)
    layer.weight = nn.Parameter(torch.tensor([0.1j, -0.4], dtype=dtype).diag())
    model = Rooted(kind, layer)
    weight = model.root.eval()[0].weight
    torch.testing.assert_close(weight.detach(), torch.tensor([0.25j, -1], dtype=dtype).diag())
    assert model(torch.ones(1, 2, dtype=dtype)).dtype == dtype
