"""spectral_ext.spectral_norm on one layer: a drop-in for both of stock's."""

import pytest
import torch
from nets import OURS, STOCK, access, assert_close, hook_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext

MODULES = {
    "linear": lambda: nn.Linear(5, 3),
    "conv1d": lambda: nn.Conv1d(2, 4, 3),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(4, 2, 3),
    "embedding": lambda: nn.Embedding(6, 3),
    "channels_last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "float64": lambda: nn.Linear(4, 4).double(),
}


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


@pytest.mark.parametrize("order", ["u_first", "v_first"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_same_start_and_random_numbers_as_stock(kind, training, order, backend):
    modules = []
    for apply in (STOCK[order], OURS[order]):
        module = seeded(MODULES[kind]).train(training)
        apply(module, "weight", n_power_iterations=2)
        modules.append((module, torch.rand(1)))
    (stock, stock_random), (ours, our_random) = modules
    assert torch.equal(stock_random, our_random)
    rtol = 1e-12 if kind == "float64" else 1e-5
    for _ in range(3):
        expected, found = access(stock, "weight"), access(ours, "weight")
        assert_close(found, expected, rtol=rtol)
        assert found.stride() == expected.stride()
        vectors = [
            [module.weight_u, module.weight_v]
            if hook_of(module, "weight")
            else list(module.parametrizations.weight[0].buffers())
            for module in (stock, ours)
        ]
        for u, expected_u in zip(vectors[1], vectors[0], strict=True):
            assert_close(u, expected_u, rtol=rtol)


def test_a_start_without_iterations_is_the_very_start_of_stock():
    """The vectors are drawn bit by bit as stock draws them."""
    stock = hook_spectral_norm(seeded(MODULES["linear"]))
    ours = spectral_ext.spectral_norm(seeded(MODULES["linear"]), order="v_first")
    norm = ours.parametrizations.weight[0]
    assert torch.equal(norm._u, stock.weight_u)
    assert torch.equal(norm._v, stock.weight_v)


def test_is_a_parametrization_of_stock():
    module = spectral_ext.spectral_norm(nn.Linear(3, 2))
    assert isinstance(module, nn.Linear)
    assert isinstance(module.parametrizations.weight[0], parametrizations._SpectralNorm)
    stock = parametrizations.spectral_norm(nn.Linear(3, 2))
    assert list(module.state_dict()) == list(stock.state_dict())
    assert type(module).__name__ == type(stock).__name__
    assert parametrize.type_before_parametrizations(module) is nn.Linear
    value = torch.randn(2, 3)
    module.weight = value
    assert torch.equal(module.parametrizations.weight.original, value)


def test_conv_transpose_takes_its_outputs_for_rows():
    module = spectral_ext.spectral_norm(nn.ConvTranspose1d(4, 7, 2))
    assert module.parametrizations.weight[0]._u.shape == (7,)


@pytest.mark.parametrize("leave_parametrized", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_removal_is_that_of_stock(training, leave_parametrized):
    modules = []
    for apply in (STOCK["u_first"], OURS["u_first"]):
        module = seeded(MODULES["float64"]).train(training)
        parameter = module.weight
        apply(module, "weight")
        apply(module, "bias")
        for name in ("weight", "bias"):
            parametrize.remove_parametrizations(module, name, leave_parametrized=leave_parametrized)
        assert module.weight is parameter
        assert type(module) is nn.Linear
        modules.append(module)
    assert_close(modules[1].weight, modules[0].weight)
    assert_close(modules[1].bias, modules[0].bias)


def test_u_first_stacks_like_stock():
    modules = []
    for apply in (STOCK["u_first"], OURS["u_first"]):
        module = seeded(MODULES["float64"])
        apply(module, "weight")
        apply(module, "weight", n_power_iterations=2)
        (module.weight * 3).sum().backward()
        modules.append(module)
    for a, b in zip(
        modules[0].state_dict().values(), modules[1].state_dict().values(), strict=True
    ):
        assert_close(b, a)
    assert_close(
        modules[1].parametrizations.weight.original.grad,
        modules[0].parametrizations.weight.original.grad,
    )


def test_other_parametrizations_of_the_module_stay():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    module = nn.Linear(3, 2)
    bias = module.bias.detach().clone()
    parametrize.register_parametrization(module, "bias", Double())
    spectral_ext.spectral_norm(module)
    parametrize.register_parametrization(module, "weight", Double())
    assert torch.equal(module.bias, 2 * bias)
    weight = module.eval().parametrizations.weight
    assert torch.equal(module.weight, 2 * weight[0](weight.original))
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module.bias, 2 * bias)
    parametrize.remove_parametrizations(module, "bias")
    assert type(module) is nn.Linear


def test_cached_computes_once():
    module = spectral_ext.spectral_norm(nn.Linear(3, 2))
    with parametrize.cached():
        assert module.weight is module.weight
    assert module.weight is not module.weight


def test_zero_weight_gives_zeros_and_recovers():
    """A documented difference: stock gives NaN for good."""
    module = nn.Linear(3, 2)
    nn.init.zeros_(module.weight)
    spectral_ext.spectral_norm(module)
    module.weight.sum().backward()
    assert torch.equal(module.weight, torch.zeros(2, 3))
    assert module.parametrizations.weight.original.grad.isfinite().all()
    with torch.no_grad():
        module.parametrizations.weight.original.copy_(torch.tensor([[30.0, 0, 0], [0, 0.2, 7]]))
    for _ in range(60):
        weight = module.weight
    assert_close(torch.linalg.matrix_norm(weight, 2), torch.tensor(1.0), rtol=1e-4)


INTEGER = nn.Linear(3, 2)
INTEGER.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int32), requires_grad=False)
BAD = {
    "no module": (lambda: "Linear", {}, TypeError),
    "no such parameter": (lambda: nn.Linear(3, 2), {"name": "gain"}, ValueError),
    "a None parameter": (lambda: nn.Linear(3, 2, bias=False), {"name": "bias"}, ValueError),
    "integer": (lambda: INTEGER, {}, TypeError),
    "empty": (lambda: nn.Linear(3, 0), {}, ValueError),
    "dim too large": (lambda: nn.Linear(3, 2), {"dim": 2}, IndexError),
    "dim too large, as a ValueError": (lambda: nn.Linear(3, 2), {"dim": -3}, ValueError),
    "dim no integer": (lambda: nn.Linear(3, 2), {"dim": 1.0}, TypeError),
    "eps negative": (lambda: nn.Linear(3, 2), {"eps": -1e-12}, ValueError),
    "eps NaN": (lambda: nn.Linear(3, 2), {"eps": float("nan")}, ValueError),
    "no iterations": (lambda: nn.Linear(3, 2), {"n_power_iterations": 0}, ValueError),
    "half an iteration": (lambda: nn.Linear(3, 2), {"n_power_iterations": 0.5}, TypeError),
    "order": (lambda: nn.Linear(3, 2), {"order": "w_first"}, ValueError),
    "unknown backend": (lambda: nn.Linear(3, 2), {"backend": "gpu"}, ValueError),
    "backend that cannot run": (lambda: nn.Linear(3, 2), {"backend": "cuda"}, RuntimeError),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_bad_input_names_the_layer_and_changes_nothing(case, order):
    make, arguments, error = BAD[case]
    module = make()
    cls = type(module)
    keys = list(module.__dict__) if isinstance(module, nn.Module) else None
    parameters = dict(module._parameters) if isinstance(module, nn.Module) else None
    with pytest.raises(error) as raised:
        spectral_ext.spectral_norm(module, **{"order": order, **arguments})
    name = arguments.get("name", "weight")
    if isinstance(module, nn.Module):
        if "backend" not in arguments:
            assert f"{cls.__name__}.{name}" in str(raised.value)
        assert type(module) is cls
        assert list(module.__dict__) == keys
        assert dict(module._parameters) == parameters


@pytest.mark.parametrize("first", ["u_first", "v_first"])
@pytest.mark.parametrize("made_by", [STOCK, OURS], ids=["stock", "ours"])
def test_a_second_norm_is_refused_where_stock_refuses(made_by, first):
    module = nn.Linear(3, 2)
    made_by[first](module, "weight")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Linear\.weight.*"):
        spectral_ext.spectral_norm(module, order="v_first")
    if made_by is STOCK and first == "v_first":
        with pytest.raises(ValueError, match=r"Linear\.weight.*"):
            spectral_ext.spectral_norm(module)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("buffer", "wrong", "error"),
    [
        ("_u", torch.ones(7), ValueError),
        ("_v", torch.ones(1), ValueError),
        ("_u", torch.ones(2).double(), TypeError),
    ],
)
def test_vectors_exchanged_for_bad_ones(buffer, wrong, error, backend):
    module = spectral_ext.spectral_norm(nn.Linear(3, 2), backend=backend)
    norm = module.parametrizations.weight[0]
    setattr(norm, buffer, wrong)
    before = [vector.clone() for vector in norm.buffers()]
    with pytest.raises(error, match=rf"Linear\.weight: {buffer[1:]} "):
        module.weight  # noqa: B018
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


def test_repr_shows_what_is_not_the_default():
    module = spectral_ext.spectral_norm(nn.ConvTranspose2d(2, 3, 1), order="v_first", eps=1e-6)
    assert "SpectralNorm(eps=1e-06, dim=1, order='v_first')" in repr(module)
