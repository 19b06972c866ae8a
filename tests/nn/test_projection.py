"""Projection of weights after the optimizer's step, and what it leaves alone."""

import copy
import inspect
import io
import pickle

import pytest
import samples
import torch
from nets import Net, inputs
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils import weight_norm as hook_weight_norm

import spectral_ext
from spectral_ext import backends, functional
from spectral_ext.nn.projection import ProjectionSettings, SpectralProjection, project_

NAMES = ("conv.weight", "up.weight", "body.0.weight", "body.2.weight", "head.weight")
DIMS = (0, 1, 0, 0, 0)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=1e-3),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.02, max_iter=3),
}


def net(dtype=torch.float32):
    """Return a net whose weights have one large singular value, about 4, that iterations soon find."""
    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        for weight, dim in zip(weights(model), DIMS, strict=True):
            rows = weight.movedim(dim, 0)  # a view
            u, v = (
                samples.unit(len(rows), weight.dtype),
                samples.unit(rows[0].numel(), weight.dtype),
            )
            rows.add_(4 * torch.outer(u, v).view(rows.shape))
    return model.to(dtype)


def weights(model):
    return [model.get_parameter(name) for name in NAMES]


def sigma(weight, dim=0):
    matrix = weight.detach().double().movedim(dim, 0).flatten(1)
    return torch.linalg.matrix_norm(matrix, 2).item()


def sigmas(model):
    return [sigma(w, dim) for w, dim in zip(weights(model), DIMS, strict=True)]


def clones(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def loss(model, seed=0):
    """Return a loss that wants the weights to grow."""
    return -model(inputs(seed, next(model.parameters()).dtype)).square().mean()


def train(model, optimizer, seeds=range(4)):
    for seed in seeds:

        def closure(seed=seed):
            optimizer.zero_grad()
            value = loss(model, seed)
            value.backward()
            return value

        optimizer.step(closure)


# The constraint.


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_bound_holds_after_every_step(backend, make):
    model = net()
    options = {"bound": 0.7, "n_power_iterations": 3, "backend": backend}
    projection = SpectralProjection(model, **options)
    projection.project()
    optimizer = make(model.parameters())
    projection.attach(optimizer)
    for seed in range(2):
        train(model, optimizer, [seed])
        assert max(projection.sigmas) > 0.7  # there was something to do
        assert max(sigmas(model)) <= 0.7 + 1e-5


def test_one_iteration_from_the_last_vectors_follows_small_steps(backend):
    """A step goes 1e-3 beyond the bound, and the projection comes back to within 1e-4."""
    model = net()
    projection = SpectralProjection(model, backend=backend)
    projection.project()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    projection.attach(optimizer)
    for seed in range(5):
        train(model, optimizer, [seed])
        assert max(sigmas(model)) <= 1 + 1e-4
        assert max(projection.sigmas) > 1 + 5e-4


@pytest.mark.parametrize("target", [{"bound": 1.5}, {"scale": 1.5}], ids=str)
@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_the_projection_is_that_of_an_svd(backend, target, order):
    model = net()
    with torch.no_grad():
        model.head.weight.div_(10)  # below the bound
    before, norms = clones(weights(model)), sigmas(model)
    assert norms[-1] < 1.5 < min(norms[:-1])
    projection = SpectralProjection(model, **target, order=order, backend=backend)
    found = projection.project()
    assert projection.sigmas is found
    for weight, old, norm, value in zip(weights(model), before, norms, found, strict=True):
        factor = 1.5 / norm if "scale" in target else min(1.0, 1.5 / norm)
        assert abs(value / norm - 1) < 1e-6
        assert (weight - factor * old).abs().max() < 1e-6 * factor * norm


@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_every_setting_counts(order):
    model, other = net(), net()
    settings = {"n_power_iterations": 2, "eps": 5.0, "order": order, "tol": 0.5, "scale": 0.3}
    projection = SpectralProjection(model, max_power_iterations=2, **settings)
    vectors = projection.state_dict()
    us, vs = ([vectors[f"{name}.{key}"].clone() for name in NAMES] for key in "uv")
    for _ in range(2):
        expected = functional.project_(weights(other), us, vs, dims=list(DIMS), **settings)
        assert torch.equal(projection.project(), expected)
    assert all(map(torch.equal, weights(model), weights(other)))


def test_random_vectors_begin_with_15_iterations(backend):
    model = nn.Linear(6, 5)
    torch.manual_seed(1)
    stock = parametrizations.spectral_norm(copy.deepcopy(model).eval())
    torch.manual_seed(1)
    vectors = SpectralProjection(model, init="randn", backend=backend).state_dict()
    norm = stock.parametrizations.weight[0]
    assert torch.allclose(vectors["weight.u"], norm._u, atol=1e-6)
    assert torch.allclose(vectors["weight.v"], norm._v, atol=1e-6)


def test_exact_vectors_leave_the_random_numbers_alone():
    model = net()
    before = torch.get_rng_state()
    SpectralProjection(model).project()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tolerance_makes_as_many_iterations_as_it_needs(backend):
    layer = nn.Linear(4, 3, dtype=torch.float64)
    options = {"init": "randn", "backend": backend}
    norm = sigma(layer.weight)
    one, many = (
        project_(copy.deepcopy(layer), **options, **settings)
        for settings in ({}, {"tol": 1e-6, "max_power_iterations": 100})
    )
    assert abs(many / norm - 1) < 1e-12 < abs(one / norm - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_vectors_of_half_precision_weights_are_float32(backend, dtype):
    model = net().to(dtype)
    projection = SpectralProjection(model, backend=backend)
    before = sigmas(model)
    found = projection.project()
    assert all(vector.dtype == torch.float32 for vector in projection.state_dict().values())
    assert torch.allclose(found, torch.tensor(before), rtol=1e-5)
    assert max(sigmas(model)) <= 1 + 2 * torch.finfo(dtype).eps


def test_a_complex_weight_is_projected(backend):
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
    project_([weight], scale=2.0, backend=backend)
    assert abs(torch.linalg.matrix_norm(weight.detach(), 2) - 2) < 1e-5


def test_a_model_that_went_to_another_dtype_takes_its_vectors_along(backend):
    model = net()
    projection = SpectralProjection(model, backend=backend)
    model.double()
    projection.project()
    assert max(abs(s - 1) for s in sigmas(model)) < 1e-9
    assert projection.state_dict()["conv.weight.u"].dtype == torch.float64


# What is left alone.


def test_weights_below_the_bound_keep_their_bits(backend):
    model = net()
    bound = 1.01 * max(sigmas(model))
    before = clones(model.parameters())
    SpectralProjection(model, bound=bound, backend=backend).project()
    assert all(map(torch.equal, before, model.parameters()))


def test_momentum_and_gradients_are_untouched(backend):
    model, plain = net(), net()
    optimizer, reference = (OPTIMIZERS["sgd"](m.parameters()) for m in (model, plain))
    SpectralProjection(model, backend=backend).attach(optimizer)
    for m, o in ((model, optimizer), (plain, reference)):
        train(m, o, [0])
    assert not torch.equal(model.conv.weight, plain.conv.weight)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        buffers = optimizer.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"]
        assert torch.equal(*buffers)


def test_the_gradient_knows_nothing_of_the_projection():
    model = net()
    projection = SpectralProjection(model)
    projection.project()
    plain = copy.deepcopy(model)
    for m in (model, plain):
        loss(m).backward()
    projection.project()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.is_leaf and a.requires_grad and torch.equal(a.grad, b.grad)


def test_a_projection_between_forward_and_backward_is_noticed():
    model = net()
    value = loss(model)
    project_(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# One call.


def test_all_weights_are_one_call_of_the_backend(backend, monkeypatch):
    model = net()
    projection = SpectralProjection(model, backend=backend)
    chosen = backends.select(backend, torch.device("cpu"))
    original, calls = chosen.forward_, []

    def counted(written, *arguments):
        calls.append([tensor.data_ptr() for tensor in written])
        return original(written, *arguments)

    monkeypatch.setattr(chosen, "forward_", counted)
    projection.project()
    assert calls == [[weight.data_ptr() for weight in weights(model)]]


# The optimizer.


def test_a_second_attach_changes_nothing_and_detach_ends_it():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    projection = SpectralProjection(model)
    assert projection.attach(optimizer).attach(optimizer) is projection
    assert len(optimizer._optimizer_step_post_hooks) == 1
    projection.detach()
    train(model, optimizer, [0])
    assert projection.sigmas is None and min(sigmas(model)) > 1
    projection.attach(optimizer)
    train(model, optimizer, [0])
    assert projection.sigmas is not None


def test_detach_leaves_other_hooks():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    first, second = (SpectralProjection(model).attach(optimizer) for _ in range(2))
    first.detach()
    train(model, optimizer, [0])
    assert first.sigmas is None and second.sigmas is not None


def test_an_optimizer_of_a_part_projects_all_weights():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.head.parameters())
    SpectralProjection(model).attach(optimizer)
    train(model, optimizer, [0])
    assert max(sigmas(model)) <= 1 + 1e-5


def test_an_optimizer_without_any_of_the_weights_is_refused():
    projection = SpectralProjection(net())
    optimizer = OPTIMIZERS["sgd"](net().parameters())
    with pytest.raises(ValueError, match=r"SGD has none of the weights \('conv.weight', 'up"):
        projection.attach(optimizer)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got Net"):
        projection.attach(net())
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_that_the_scaler_skips_is_not_projected(backend):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    projection = SpectralProjection(model, backend=backend).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = clones([*model.parameters(), *projection.state_dict().values()])

    scaler.scale(loss(model)).backward()
    model.head.weight.grad.fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    after = [*model.parameters(), *projection.state_dict().values()]
    assert projection.sigmas is None and all(map(torch.equal, before, after))
    optimizer.zero_grad()
    scaler.scale(loss(model)).backward()
    scaler.step(optimizer)
    assert projection.sigmas is not None


def test_a_fused_optimizer_that_skips_leaves_projected_weights_where_they_are(backend):
    model = net()
    optimizer = OPTIMIZERS["adam fused"](model.parameters())
    projection = SpectralProjection(model, backend=backend).attach(optimizer)
    projection.project()
    before = clones(weights(model))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(model)).backward()
    model.head.weight.grad.fill_(torch.inf)
    scaler.step(optimizer)
    for old, weight in zip(before, weights(model), strict=True):
        assert (weight - old).abs().max() < 1e-6


def test_weight_decay_takes_weights_below_the_bound_and_not_below_the_scale():
    norms = {}
    for target in ("bound", "scale"):
        model = net()
        projection = SpectralProjection(model, **{target: 1.0})
        projection.project()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
        projection.attach(optimizer)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        norms[target] = torch.tensor(sigmas(model))
    assert (norms["bound"] - 0.95**3).abs().max() < 1e-5
    assert (norms["scale"] - 1).abs().max() < 1e-5


# Which weights.


def test_the_weights_of_a_model_are_those_of_apply_spectral_norm():
    model = net()
    projection = SpectralProjection(model, include="body|up", exclude="2")
    applied = spectral_ext.apply_spectral_norm(net(), include="body|up", exclude="2")
    assert projection.names == applied.normalized == ("up.weight", "body.0.weight")
    assert projection.skipped == applied.skipped
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Conv1d(3, 0, 1))
    projection = SpectralProjection(model)
    assert projection.names == ("0.weight",)
    assert projection.skipped == {
        "1.weight": "BatchNorm1d is not among the types",
        "2.weight": "it has no elements",
    }
    assert SpectralProjection(model, types=nn.Linear).skipped.keys() == projection.skipped.keys()


def test_transposed_convolutions_have_their_outputs_in_dimension_1():
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.Linear(4, 2))
    vectors = SpectralProjection(model).state_dict()
    assert [vectors[f"{i}.weight.u"].numel() for i in range(2)] == [5, 2]
    vectors = SpectralProjection([model[0].weight], dim=-2).state_dict()
    assert vectors["0.u"].numel() == 2


def test_tied_weights_are_projected_once_and_reported():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    model.again = model[1]
    projection = SpectralProjection(model)
    assert projection.names == ("0.weight",)
    assert projection.skipped == {
        "1.weight": "the same parameter as 0.weight",
        "again.weight": "the same parameter as 0.weight",
    }
    assert projection.project().shape == (1,)


def test_parameters_have_the_names_that_came_with_them_or_positions():
    model = net()
    bias = model.conv.bias.detach().clone()
    named = SpectralProjection(model.named_parameters(), bound=0.5)
    assert named.names == NAMES
    assert named.skipped["conv.bias"] == "it has fewer than two dimensions"
    positions = SpectralProjection(model.parameters(), bound=0.5)
    assert positions.names == ("0", "2", "4", "6", "8")
    positions.project()
    assert max(sigma(weight) for weight in weights(model)) <= 0.5 + 1e-5
    assert torch.equal(model.conv.bias, bias)


def test_frozen_weights_are_projected_like_others():
    model = net().requires_grad_(False)
    project_(model)
    assert max(sigmas(model)) <= 1 + 1e-5


def test_project_once_gives_the_norms_and_takes_all_settings(backend):
    model = net()
    before = sigmas(model)
    found = project_(model, scale=2.0, exclude="head", backend=backend)
    assert torch.allclose(found, torch.tensor(before[:-1]), rtol=1e-6)
    after = sigmas(model)
    assert max(abs(s - 2) for s in after[:-1]) < 1e-5 and after[-1] == before[-1]


# Saving and copies.


def test_the_typed_keywords_are_those_of_the_class():
    parameters = list(inspect.signature(SpectralProjection).parameters)
    assert list(ProjectionSettings.__annotations__) == parameters[1:]


def test_a_run_that_was_saved_goes_on_with_the_same_bits(backend):
    model = net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    projection = SpectralProjection(model, backend=backend).attach(optimizer)
    train(model, optimizer, range(2))
    saved = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, projection)], saved)
    train(model, optimizer, range(2, 4))

    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    again = Net()
    others = OPTIMIZERS["adam"](again.parameters())
    resumed = SpectralProjection(again, backend=backend).attach(others)
    for x, state in zip((again, others, resumed), states, strict=True):
        x.load_state_dict(state)
    train(again, others, range(2, 4))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert torch.equal(projection.sigmas, resumed.sigmas)
    for key, vector in projection.state_dict().items():
        assert torch.equal(vector, resumed.state_dict()[key])


def test_a_state_that_does_not_fit_is_named_and_changes_nothing():
    projection = SpectralProjection(net())
    before = {key: vector.clone() for key, vector in projection.state_dict().items()}
    wrong = {key: -vector for key, vector in before.items()}
    del wrong["conv.weight.u"]
    wrong["other.u"] = torch.ones(1)
    wrong["up.weight.v"] = torch.ones(3)
    wrong["head.weight.u"] = [1.0]
    wrong["head.weight.v"] = torch.ones(6, dtype=torch.complex64)
    with pytest.raises(ValueError, match="state_dict does not fit") as error:
        projection.load_state_dict(wrong)
    for words in (
        "conv.weight.u is missing",
        "other.u is unknown",
        r"up.weight.v must have shape (20,), got (3,)",
        "head.weight.u must be a tensor, got list",
        "head.weight.v must be torch.float32, got torch.complex64",
    ):
        assert words in str(error.value)
    assert all(torch.equal(vector, before[key]) for key, vector in projection.state_dict().items())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_with_its_model_projects_the_copied_weights(way):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    projection = SpectralProjection(model).attach(optimizer)
    other, of_other = way((model, projection))
    of_other.project()
    assert max(sigmas(other)) <= 1 + 1e-5 < min(sigmas(model))
    assert projection.sigmas is None and len(optimizer._optimizer_step_post_hooks) == 1
    of_other.attach(OPTIMIZERS["sgd"](other.parameters()))


def test_the_repr_shows_target_weights_and_what_was_skipped():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert repr(SpectralProjection(model, n_power_iterations=3)).splitlines() == [
        "SpectralProjection(bound=1.0, n_power_iterations=3",
        "  0.weight  (2, 3)",
        "  1.weight  skipped: BatchNorm1d is not among the types",
        ")",
    ]
    assert repr(SpectralProjection(model, scale=1.0)).startswith("SpectralProjection(scale=1.0\n")


# What is refused.


def with_head(function, *arguments):
    model = net()
    function(model.head, *arguments)
    return model


@pytest.mark.parametrize(
    "normalize",
    [
        spectral_ext.spectral_norm,
        parametrizations.spectral_norm,
        hook_spectral_norm,
        parametrizations.weight_norm,
        pytest.param(
            hook_weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
        ),
    ],
)
def test_a_weight_that_is_computed_is_refused(normalize):
    model = with_head(normalize)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"head.weight: a parametrization or a hook"):
        SpectralProjection(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert SpectralProjection(model, exclude="head").names == NAMES[:-1]


def test_a_result_in_place_of_a_parameter_is_refused():
    layer = parametrizations.spectral_norm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="0: it is the result of a computation"):
        SpectralProjection([layer.weight])


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_layer_is_refused():
    with pytest.raises(ValueError, match=r"0.weight: the weight of a lazy module is not init"):
        SpectralProjection(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"bound": 0.0}, ValueError, "SpectralProjection: bound must be positive"),
        ({"bound": 1.0, "scale": 0.5}, ValueError, "scale=0.5 and bound=1.0 exclude each other"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
        ({"scale": 2.0, "bound": 2.0}, ValueError, "scale=2.0 and bound=2.0 exclude each other"),
        ({"n_power_iterations": 0}, ValueError, "n_power_iterations=0"),
        ({"eps": "1"}, TypeError, "eps must be a float"),
        ({"max_power_iterations": 9}, ValueError, "max_power_iterations is for tol > 0"),
        ({"order": "w_first"}, ValueError, "order must be"),
        ({"init": "zeros"}, ValueError, "init must be one of"),
        ({"dim": 2}, IndexError, "but got 2. for body.0.weight"),
        ({"include": 3}, TypeError, "include must be a regular expression"),
        ({"exclude": "("}, ValueError, "exclude='.' is no regular expression"),
        ({"include": "nothing"}, ValueError, "there is nothing to project"),
        ({"backend": "abacus"}, ValueError, "backend='abacus' is unknown"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, kind, message):
    model = net()
    before = clones(model.parameters())
    with pytest.raises(kind, match=message):
        SpectralProjection(model, **options)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        (torch.ones(2, 2), TypeError, "weights must be a torch.nn.Module, or parameters"),
        (3, TypeError, "got int"),
        ([[1.0]], TypeError, "0: the weight must be a tensor, got list"),
        ([("w", 1.0)], TypeError, "w: the weight must be a tensor, got float"),
        ([torch.ones(2, 2).int()], TypeError, "0: the weight must be floating point"),
        ([("w", torch.ones(2, 2)), ("w", torch.ones(3, 2))], ValueError, "w: two parameters"),
        ([torch.full((2, 2), torch.nan)], ValueError, "0: the weight is not finite"),
        ([torch.ones(3)], ValueError, "there is nothing to project"),
        ([], ValueError, "there is nothing to project"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, kind, message):
    with pytest.raises(kind, match=message):
        SpectralProjection(weights)


@pytest.mark.parametrize(
    "option", [{"types": nn.Linear}, {"include": "x"}, {"exclude": "x"}, {"name": "bias"}]
)
def test_what_selects_in_a_model_is_refused_for_parameters(option):
    with pytest.raises(ValueError, match="types, include, exclude and name are for a model"):
        SpectralProjection(net().parameters(), **option)


def test_a_weight_that_got_another_shape_is_named():
    model = net()
    projection = SpectralProjection(model)
    model.head.weight.data = torch.ones(1, 7)
    before = clones(model.parameters())
    with pytest.raises(ValueError, match=r"head.weight: v must have shape \(7,\)"):
        projection.project()
    assert all(map(torch.equal, before, model.parameters()))
