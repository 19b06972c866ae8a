"""What PyTorch's own suite checks of ``torch.nn.utils.spectral_norm``, for it and after ``fuse``."""

import copy
import pickle

import pytest
import torch
from nets import assert_close
from rooted import HookRooted, linear, noise, without_graph
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.nn.utils import remove_spectral_norm
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext


@pytest.fixture(params=["stock", "fused"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_before_the_first_call_the_weight_is_the_raw_one(kind):
    layer = linear(5, 7)
    size, stride = layer.weight.size(), layer.weight.stride()
    model = HookRooted(kind, layer)
    assert layer.weight_u.shape == (7,) and layer.weight_v.shape == (5,)
    assert isinstance(layer.weight_orig, nn.Parameter)
    assert not isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    assert "weight" not in layer._buffers and "weight" not in layer._parameters
    assert layer.weight_orig.data_ptr() == layer.weight.data_ptr()
    assert (layer.weight.size(), layer.weight.stride()) == (size, stride)
    model.remove()
    for name in ("weight_orig", "weight_u", "weight_v", "parametrizations"):
        assert not hasattr(layer, name)
    assert isinstance(layer._parameters["weight"], nn.Parameter)


def test_a_tensor_takes_one_hook(kind):
    model = HookRooted(kind, linear(5, 7))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Cannot register two spectral_norm hooks"):
            hook_spectral_norm(model.layer)
        model(noise(2, 5))
    model.remove()
    with pytest.raises(ValueError, match="spectral_norm of 'weight' not found"):
        remove_spectral_norm(model.layer)


def test_a_read_gives_what_the_last_call_used(kind):
    model, x = HookRooted(kind, linear(3, 4)), noise(2, 3)
    for training in (True, True, False, True):
        output = model.root.train(training)(x)
        vectors = model.vectors()
        for _ in range(2):
            assert_close(F.linear(x, model.layer.weight, model.layer.bias), output)
        assert all(map(torch.equal, model.buffers, vectors))
        (gradient,) = torch.autograd.grad(model.layer.weight.square().sum(), model.original)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("trained", [True, False])
def test_vectors_move_in_training_and_stay_in_eval_mode(kind, trained):
    layer = linear(3, 4)
    layer.weight.requires_grad_(trained)
    model, x = HookRooted(kind, layer), noise(2, 3)
    before = model.vectors()
    output = model(x)
    assert not any(map(torch.equal, before, model.buffers))
    if trained:
        (gradient,) = torch.autograd.grad(output.sum(), model.original)
        assert gradient.abs().sum() > 0
    vectors = model.vectors()

    def calls(*modes: bool):
        def function(x: Tensor) -> Tensor:
            model.set_vectors(vectors)
            return sum(model.root.train(mode)(x) for mode in modes)

        return function

    for modes in ((True, True), (True, False, True, False)):
        assert gradcheck(calls(*modes), (x.clone().requires_grad_(),))
    last = model.root.train()(x).detach()
    vectors = model.vectors()
    model.root.eval()
    for _ in range(2):
        assert_close(model(x), last)
    assert all(map(torch.equal, model.buffers, vectors))
    if trained:
        assert gradcheck(lambda _: model(x), (model.original,))


def test_removal_keeps_the_output(kind):
    model, x = HookRooted(kind, linear(3, 4)), noise(2, 3)
    for forwards in (1, 3):
        for _ in range(forwards):
            output = without_graph(lambda: model(x))
        model.remove()
        assert type(model.layer) is nn.Linear
        assert_close(model(x), output)
        model.normalize("weight")


@pytest.mark.parametrize("forwards", [0, 3])
def test_what_loads_strictly_and_what_only_otherwise(kind, forwards):
    model, x = HookRooted(kind, linear(3, 5)), noise(2, 3)
    layer = model.layer
    for _ in range(forwards):
        without_graph(lambda: model(x))
    state = copy.deepcopy(spectral_ext.stock_state_dict(layer, layout="hook"))
    assert set(state) == {"bias", "weight_orig", "weight_u", "weight_v"}
    assert state._metadata[""]["spectral_norm"] == {"weight.version": 1}
    less = copy.deepcopy(state)
    less["unknown"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "unknown"'):
        layer.load_state_dict(less)
    for key in ("unknown", "weight_orig", "weight_u", "weight_v"):
        less.pop(key)
        layer.load_state_dict(less, strict=False)
    less["weight"] = layer.weight.detach().clone()
    layer.load_state_dict(less, strict=False)
    del less._metadata[""]["spectral_norm"]
    layer.load_state_dict(less, strict=False)
    del less["weight"], less["bias"]
    layer.load_state_dict(less, strict=False)

    old = copy.deepcopy(state)  # of before v was a buffer: the normalized weight is stored beside u
    del old._metadata[""]["spectral_norm"], old["weight_v"]
    reference = hook_spectral_norm(linear(3, 5))
    reference.load_state_dict(state)
    reference.eval()(x)
    old["weight"] = reference.weight.detach().clone()
    without = copy.deepcopy(state)
    del without._metadata[""]["spectral_norm"]

    def answers(written: dict[str, Tensor]) -> list[Tensor]:
        model.remove()
        model.normalize("weight")
        layer.load_state_dict(written)
        with torch.no_grad():
            modes = (False, True, True, False)
            return [model.root.train(mode)(x).clone() for mode in modes]

    expected = answers(state)
    for written in (state, without) if forwards == 0 else (state, without, old):
        for a, b in zip(answers(written), expected, strict=True):
            assert_close(a, b, rtol=1e-10)


def test_a_transposed_convolution_has_its_rows_in_dimension_1(kind):
    layer = nn.ConvTranspose2d(3, 4, (5, 6)).double()
    model = HookRooted(kind, layer)
    assert model(noise(2, 3, 10, 12)).shape[1] == 4
    assert layer.weight_u.shape == (4,)


def test_a_forward_is_one_step_and_a_division(kind):
    model, x = HookRooted(kind, linear(5, 7)), noise(3, 5)
    weight = model.original.detach().clone()
    v = F.normalize(weight.T @ model.layer.weight_u, dim=0, eps=1e-12)
    u = F.normalize(weight @ v, dim=0, eps=1e-12)
    expected = F.linear(x, weight / (u @ weight @ v), model.layer.bias)
    assert_close(model(x), expected)
    for found, vector in zip(model.vectors(), (u, v), strict=True):
        assert_close(found, vector)


def test_a_pickled_layer_goes_on(kind):
    model, x = HookRooted(kind, nn.Linear(5, 7)), torch.ones(2, 5)
    for again in (pickle.loads(pickle.dumps(model.root)), pickle.loads(pickle.dumps(model.layer))):
        layer = again[0] if isinstance(again, nn.Sequential) else again
        assert isinstance(layer, nn.Linear)
        torch.testing.assert_close(again(x), copy.deepcopy(model.root)(x))


def test_a_conversion_after_a_forward(kind):
    model = HookRooted(kind, nn.Linear(3, 4))
    without_graph(lambda: model(torch.ones(2, 3)))
    model.root.double()
    output = model(noise(2, 3))
    assert output.dtype == model.layer.weight_u.dtype == torch.float64
    assert output.isfinite().all()
