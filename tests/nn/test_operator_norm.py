"""The parametrization that divides a convolution by its norm as an operator."""

import copy
import pickle

import pytest
import torch
from nets import assert_close
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as hook_spectral_norm

from spectral_ext.nn.operator_norm import convolution_of, operator_norm
from spectral_ext.spectrum import Convolution

MODULES = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), 6),
    "conv2d": (lambda: nn.Conv2d(4, 2, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2), (7, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), 5),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2), (3, 4, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), 5),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 2, 3, groups=2, padding=1), (5, 4)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 2, 2, dilation=2), 3),
}


def normalized(kind="conv1d", **settings):
    make, input_size = MODULES[kind]
    return operator_norm(make().double(), input_size=input_size, **settings)


def original(module):
    return module.parametrizations.weight.original


def norm_of(module):
    return module.parametrizations.weight[0]


def settled(module):
    """Iterate until u and v are the singular vectors."""
    norm_of(module)._power_iteration(original(module).detach(), 500)
    return module.eval()


def true_norm(module):
    """Return the norm of what the module computes, found from the matrix of its forward."""
    plain = copy.deepcopy(module)
    parametrize.remove_parametrizations(plain, "weight")
    plain.bias = None
    basis = torch.eye(norm_of(module)._v.numel(), dtype=torch.float64)
    images = plain(basis.unflatten(1, norm_of(module)._v.shape)).detach()
    return torch.linalg.matrix_norm(images.flatten(1), 2)


@pytest.mark.parametrize("kind", MODULES)
def test_the_module_has_norm_one(kind):
    module = settled(normalized(kind))
    assert_close(true_norm(module), torch.tensor(1.0).double(), rtol=1e-4)


def test_scale_is_the_norm_that_it_gets():
    module = settled(normalized(scale=0.3))
    assert_close(true_norm(module), torch.tensor(0.3).double(), rtol=1e-4)


def test_bound_leaves_a_smaller_norm_alone():
    module = settled(normalized(bound=1e3))
    assert torch.equal(module.weight, original(module))
    module = settled(normalized(bound=0.1))
    assert_close(true_norm(module), torch.tensor(0.1).double(), rtol=1e-4)


@pytest.mark.parametrize("n_power_iterations", [1, 3])
def test_a_training_access_takes_its_steps_u_first(n_power_iterations):
    module = normalized(n_power_iterations=n_power_iterations)
    norm, weight = norm_of(module), original(module).detach()
    v = norm._v.clone()
    for _ in range(n_power_iterations):
        u = norm.convolution.apply(weight, v)
        u /= u.norm()
        v = norm.convolution.adjoint(weight, u)
        v /= v.norm()
    sigma = (u * norm.convolution.apply(weight, v)).sum()
    assert_close(module.weight, weight / sigma)
    assert_close(norm._u, u)
    assert_close(norm._v, v)


def test_evaluation_leaves_the_vectors_alone():
    module = normalized().eval()
    before = [vector.clone() for vector in norm_of(module).buffers()]
    first = module.weight
    assert torch.equal(module.weight, first)
    assert all(map(torch.equal, before, norm_of(module).buffers()))


@pytest.mark.parametrize("training", [False, True])
def test_the_start_is_15_steps_as_in_stock(training):
    """And one more in training, by the check of the registration."""
    make, input_size = MODULES["conv1d"]
    module = make().double().train(training)
    torch.manual_seed(1)
    norm = norm_of(operator_norm(module, input_size=input_size))
    assert norm.training == training
    torch.manual_seed(1)
    u, v = (torch.randn(3, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64))
    v /= v.norm()
    for _ in range(15 + training):
        u = norm.convolution.apply(original(module).detach(), v)
        u /= u.norm()
        v = norm.convolution.adjoint(original(module).detach(), u)
        v /= v.norm()
    assert_close(norm._u, u)
    assert_close(norm._v, v)


@pytest.mark.parametrize("settings", [{}, {"scale": 2.0}, {"bound": 0.05}])
@pytest.mark.parametrize("kind", MODULES)
def test_the_gradient_goes_through_sigma(kind, settings):
    norm = norm_of(normalized(kind, **settings)).eval()
    make, _ = MODULES[kind]
    weight = make().double().weight.detach().requires_grad_()
    for vector in norm.buffers():  # σ away from zero
        vector.copy_(torch.randn_like(vector))
    assert torch.autograd.gradcheck(norm, weight)


def test_two_forwards_then_backward_of_the_first():
    module = normalized()
    twin = copy.deepcopy(module)
    first, _ = module.weight, module.weight
    first.square().sum().backward()
    twin.weight.square().sum().backward()
    assert_close(original(module).grad, original(twin).grad)


@pytest.mark.parametrize("settings", [{}, {"bound": 0.05}])
def test_an_optimizer_may_step_before_the_backward(settings):
    module = normalized(**settings)
    twin = copy.deepcopy(module)
    weight = module.weight
    with torch.no_grad():
        original(module).mul_(3)
    weight.square().sum().backward()
    twin.weight.square().sum().backward()
    assert_close(original(module).grad, original(twin).grad)


@pytest.mark.parametrize("settings", [{}, {"scale": 2.0}, {"bound": 0.5}])
def test_a_zero_weight_passes_through_and_recovers(settings):
    module = nn.Conv1d(2, 3, 3).double()
    nn.init.zeros_(module.weight)
    operator_norm(module, input_size=6, **settings)
    before = [vector.clone() for vector in norm_of(module).buffers()]
    module.weight.sum().backward()
    assert torch.equal(module.weight, torch.zeros(3, 2, 3).double())
    assert torch.equal(original(module).grad, torch.ones(3, 2, 3).double())
    assert all(map(torch.equal, before, norm_of(module).buffers()))
    with torch.no_grad():
        original(module).normal_()
    settled(module)
    expected = settings.get("scale", settings.get("bound", 1.0))
    assert_close(true_norm(module), torch.tensor(expected).double(), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    torch.manual_seed(3)
    module = operator_norm(nn.Conv1d(2, 3, 3).to(dtype), input_size=6)
    torch.manual_seed(3)
    single = operator_norm(nn.Conv1d(2, 3, 3).to(dtype).float(), input_size=6)
    assert module.weight.dtype == dtype
    for vector, expected in zip(norm_of(module).buffers(), norm_of(single).buffers(), strict=True):
        assert vector.dtype == torch.float32
        vector.copy_(expected)
    assert torch.equal(module.weight, single.weight.to(dtype))


def test_conversion_to_half_keeps_the_vectors_single():
    module = operator_norm(nn.Conv1d(2, 3, 3), input_size=6).half()
    assert original(module).dtype == torch.float16
    assert [vector.dtype for vector in norm_of(module).buffers()] == [torch.float32] * 2
    assert module.double().weight.dtype == torch.float64
    assert norm_of(module)._u.dtype == torch.float64


def test_a_state_dict_makes_another_module_the_same():
    module, other = normalized("circular"), normalized("circular")
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes == {
        "bias": (3,),
        "parametrizations.weight.original": (3, 2, 3, 3),
        "parametrizations.weight.0._u": (3, 5, 5),
        "parametrizations.weight.0._v": (2, 5, 5),
    }
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_stand_alone(copied_by):
    module = normalized("conv_transpose2d")
    module.weight.sum().backward()
    copied = copied_by(module)
    before = norm_of(module)._u.clone()
    assert type(copied) is not type(module)
    assert torch.equal(copied.weight, module.eval().weight) is False  # one step further
    assert torch.equal(norm_of(module)._u, before)
    assert norm_of(copied).convolution == norm_of(module).convolution
    copied.load_state_dict(module.state_dict())
    assert torch.equal(copied.eval().weight, module.weight)


def test_removal_gives_the_parameter_back():
    make, input_size = MODULES["conv1d"]
    module = make()
    weight = module.weight
    operator_norm(module, input_size=input_size)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert module.weight is weight
    assert type(module) is nn.Conv1d


def test_an_assigned_weight_is_the_one_before_normalization():
    module = normalized()
    value = torch.randn(3, 2, 3).double()
    module.weight = value
    assert torch.equal(original(module), value)


def test_a_weight_of_another_shape_names_the_layer_and_moves_nothing():
    module = normalized()
    before = [vector.clone() for vector in norm_of(module).buffers()]
    for shape in [(3, 2, 2), (4, 2, 3), (3, 2)]:
        original(module).data = torch.randn(shape).double()
        with pytest.raises(ValueError, match=r"Conv1d\.weight: .*weight"):
            module.weight  # noqa: B018
    assert all(map(torch.equal, before, norm_of(module).buffers()))


def test_one_input_size_stands_for_all_dimensions():
    convolution = convolution_of(nn.Conv3d(1, 1, 2, stride=2), 4)
    assert convolution.input_size == (4, 4, 4)
    assert convolution.stride == (2, 2, 2)


def test_the_settings_are_read_from_the_module():
    settings = {"stride": 3, "padding": 1, "output_padding": 2, "dilation": 2, "groups": 2}
    found = convolution_of(nn.ConvTranspose1d(4, 2, 3, **settings), 5)
    assert found == Convolution((5,), transposed=True, **settings)
    settings = {"padding": "same", "padding_mode": "circular", "dilation": 2, "groups": 2}
    found = convolution_of(nn.Conv1d(4, 2, 3, **settings), [5])
    assert found == Convolution((5,), **settings)


def test_repr_shows_the_input_size_and_what_is_not_the_default():
    module = normalized("conv2d", scale=0.5, n_power_iterations=2)
    assert "OperatorNorm(input_size=(7, 6), n_power_iterations=2, scale=0.5)" in repr(module)
    assert "OperatorNorm(input_size=(6,), eps=1e-06, bound=2.0)" in repr(
        normalized(eps=1e-6, bound=2)
    )


BAD = {
    "no convolution": (lambda: nn.Linear(3, 2), {}, TypeError, "Linear.weight: the operator norm"),
    "the bias": (lambda: nn.Conv1d(2, 3, 3), {"name": "bias"}, ValueError, "Conv1d.bias: weight"),
    "no such name": (lambda: nn.Conv1d(2, 3, 3), {"name": "gain"}, ValueError, "Conv1d.gain"),
    "lazy": (lambda: nn.LazyConv1d(3, 3), {}, ValueError, "not initialized"),
    "complex": (
        lambda: nn.Conv1d(2, 3, 3, dtype=torch.complex64), {}, TypeError, "Conv1d.weight: .* real"
    ),
    "reflect": (
        lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"),
        {}, ValueError, "Conv1d.weight: padding_mode",
    ),
    "sizes": (lambda: nn.Conv1d(2, 3, 3), {"input_size": (6, 6)}, ValueError, "weight: input_size"),
    "size zero": (lambda: nn.Conv1d(2, 3, 3), {"input_size": 0}, ValueError, "weight: input_size"),
    "size text": (lambda: nn.Conv1d(2, 3, 3), {"input_size": "6"}, TypeError, "weight: input_size"),
    "size bool": (lambda: nn.Conv1d(2, 3, 3), {"input_size": True}, TypeError, "weight: input_size"),
    "small": (lambda: nn.Conv1d(2, 3, 3), {"input_size": 2}, ValueError, "weight: the kernel"),
    "eps": (lambda: nn.Conv1d(2, 3, 3), {"eps": -1.0}, ValueError, "eps"),
    "steps": (lambda: nn.Conv1d(2, 3, 3), {"n_power_iterations": 0}, ValueError, "Conv1d.weight"),
    "scale": (lambda: nn.Conv1d(2, 3, 3), {"scale": 0}, ValueError, "weight: scale must"),
    "scale text": (lambda: nn.Conv1d(2, 3, 3), {"scale": "1"}, TypeError, "weight: scale must"),
    "bound": (lambda: nn.Conv1d(2, 3, 3), {"bound": float("inf")}, ValueError, "bound must"),
    "both": (lambda: nn.Conv1d(2, 3, 3), {"bound": 1, "scale": 2}, ValueError, "exclude"),
    "hook": (
        lambda: hook_spectral_norm(nn.Conv1d(2, 3, 3)), {}, ValueError, "normalizes .* already"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_name_the_layer_and_change_nothing(case):
    make, arguments, error, message = BAD[case]
    module = make()
    before = (type(module), list(module.__dict__), dict(module._parameters), dict(module._modules))
    with pytest.raises(error, match=message) as raised:
        operator_norm(module, **{"input_size": 6, **arguments})
    assert str(raised.value).count(type(module).__name__ + ".") == 1
    assert before == (
        type(module), list(module.__dict__), dict(module._parameters), dict(module._modules)
    )  # fmt: skip


def test_no_module_is_refused():
    with pytest.raises(TypeError, match="module must be"):
        operator_norm("Conv1d", input_size=6)


def test_compiled_code_computes_the_same():
    module = normalized("conv2d")
    twin = copy.deepcopy(module)
    x = torch.randn(2, 4, 7, 6).double()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_close(compiled(x), module(x))
    assert_close(norm_of(twin)._u, norm_of(module)._u)
