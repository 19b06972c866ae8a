"""Reports of models: the numbers against torch.linalg, the product against dense operators."""

import builtins
import io
import json
import math
import re

import nets
import pytest
import torch
from nets import OURS, STOCK, equal_states, inputs, make, state
from torch import nn
from torch.nn.utils import parametrizations

import spectral_ext
from spectral_ext.nn.report import Report, log_dict, report

SOURCES = {
    "stock": (STOCK["u_first"], STOCK["v_first"]),
    "ours": (OURS["u_first"], OURS["v_first"]),
}


def singular_value(weight, dim=0):
    matrix = weight.detach().double().movedim(dim, 0)
    return torch.linalg.matrix_norm(matrix.reshape(len(matrix), -1), 2).item()


def linear(weight, u, v, norm=spectral_ext.spectral_norm):
    """A layer with given vectors."""
    layer = norm(nn.Linear(*reversed(weight.shape), bias=False))
    list_ = layer.parametrizations.weight
    with torch.no_grad():
        for old, new in ((list_.original, weight), (list_[0]._u, u), (list_[0]._v, v)):
            old.copy_(new)
    return layer


# ---- Rows


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_every_norm_has_a_row_with_its_settings(source, fused):
    net = make(*SOURCES[source])
    if fused:
        spectral_ext.fuse(net)
    rows = {row.name: row for row in report(net).rows}
    assert len(rows) == len(nets.NORMS)
    for i, (layer, name, settings) in enumerate(nets.NORMS):
        row = rows[f"{layer}.{name}"]
        module = net.get_submodule(layer)
        assert row.layer_type in type(module).__name__
        assert row.order == ("u_first", "v_first")[i % 2]
        if name == "weight":
            assert row.n_power_iterations == settings.get("n_power_iterations", 1)
            dim = settings.get("dim", int(layer == "up"))
            assert row.rows == row.shape[dim]
            assert row.rows * row.columns == math.prod(row.shape)
    assert (rows["conv.weight"].shape, rows["conv.weight"].dtype) == ((5, 2, 3, 3), "float64")


@pytest.mark.parametrize("source", SOURCES)
def test_sigma_is_that_of_the_stored_vectors(source):
    net = make(*SOURCES[source])
    net(inputs())
    found = state(net)
    for row in report(net).rows:
        if row.shape == (row.rows,):  # the vector
            assert row.sigma == pytest.approx(found[row.name].norm().item(), rel=1e-12)
            continue
        weight, u, v = (found[row.name + end] for end in ("", " u", " v"))
        matrix = weight.movedim(row.shape.index(len(u)), 0).reshape(len(u), -1)
        sigma = (u @ matrix @ v).item()
        assert row.sigma == pytest.approx(sigma, rel=1e-12)
        misses = ((matrix @ v - sigma * u).norm(), (matrix.mT @ u - sigma * v).norm())
        assert row.residual == pytest.approx(max(misses).item() / abs(sigma), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("source", SOURCES)
def test_the_exact_factor_is_that_of_the_weight_in_use(source):
    net = make(*SOURCES[source])
    exact, estimated = report(net, exact=True), report(net)
    net.eval()(inputs())  # stock's hook computes its weight in a forward only
    assert exact.exact and not estimated.exact
    for row, estimate in zip(exact.rows, estimated.rows, strict=True):
        module, _, name = row.name.rpartition(".")
        weight = getattr(net.get_submodule(module), name)
        dim = weight.shape.index(row.rows)
        assert row.lipschitz == pytest.approx(singular_value(weight, dim), rel=1e-12)
        assert estimate.exact is None
        assert 1 - 1e-12 <= estimate.lipschitz <= row.lipschitz * (1 + 1e-12)


@pytest.mark.parametrize("norm", [spectral_ext.spectral_norm, parametrizations.spectral_norm])
def test_vectors_of_other_lengths_count_as_they_do_in_evaluation(norm):
    weight = torch.diag(torch.tensor([2.0, 1.0]))
    axis = torch.tensor([1.0, 0.0])
    layer = linear(weight, 0.5 * axis, 0.8 * axis, norm).eval()
    (row,) = report(layer).rows
    assert row.sigma == pytest.approx(2)
    assert row.residual == 0
    assert row.lipschitz == pytest.approx(singular_value(layer.weight), rel=1e-6)


def test_a_residual_shows_a_stale_vector():
    weight = torch.diag(torch.tensor([2.0, 1.0]))
    one, two = torch.eye(2)
    assert report(linear(weight, one, one)).rows[0].residual == 0
    # Singular vectors, but not of the largest singular value.
    (row,) = report(linear(weight, two, two), exact=True).rows
    assert (row.sigma, row.residual, row.exact, row.lipschitz) == (1, 0, 2, 2)
    mixed = (one + two) / math.sqrt(2)
    (row,) = report(linear(weight, mixed, mixed)).rows
    assert (row.sigma, row.residual) == pytest.approx((1.5, 1 / 3))
    assert row.lipschitz == pytest.approx(math.sqrt(1 + 1 / 9))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [({"scale": 3.0}, (3, 3)), ({"bound": 1.5}, (1.5, 1.5)), ({"bound": 5.0}, (5, 2))],
)
def test_a_target_is_shown_and_counts(setting, expected):
    layer = linear(torch.diag(torch.tensor([2.0, 1.0])), *torch.eye(2)[[0, 0]])
    for name, value in setting.items():
        setattr(layer.parametrizations.weight[0], name, value)
    (row,) = report(layer, exact=True).rows
    assert (row.bound, row.lipschitz) == pytest.approx(expected)


@pytest.mark.parametrize("exact", [False, True])
def test_a_zero_weight(exact):
    axis = torch.eye(2)[0]
    ours = report(linear(torch.zeros(2, 2), axis, axis), exact=exact).rows[0]
    assert (ours.sigma, ours.residual, ours.lipschitz) == (0, 0, 0)
    stock = linear(torch.zeros(2, 2), axis, axis, parametrizations.spectral_norm)
    assert math.isnan(report(stock, exact=exact).rows[0].lipschitz)


def test_numbers_that_are_not_finite_are_null_in_json():
    axis = torch.eye(2)[0]
    found = report(linear(torch.full((2, 2), math.nan), axis, axis), exact=True)
    assert math.isnan(found.rows[0].exact)
    (row,) = json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"]
    assert row["sigma"] is row["exact"] is None
    assert row["shape"] == [2, 2]


def test_complex_weights():
    layer = spectral_ext.spectral_norm(nn.Linear(4, 3, dtype=torch.complex64))
    (row,) = report(layer, exact=True).rows
    original = layer.parametrizations.weight.original.detach()
    assert row.exact == pytest.approx(torch.linalg.matrix_norm(original, 2).item(), rel=1e-5)
    assert 0 < row.sigma <= row.exact * (1 + 1e-12)
    assert row.lipschitz >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_measured_in_float64(dtype):
    layer = spectral_ext.spectral_norm(nn.Linear(4, 3, dtype=dtype))
    (row,) = report(layer, exact=True).rows
    original = layer.parametrizations.weight.original
    assert row.exact == pytest.approx(singular_value(original), rel=1e-14)


def test_a_norm_on_another_parametrization_is_named_as_skipped():
    layer = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(3, 2)))
    found = report(nn.Sequential(layer))
    assert found.rows == ()
    assert list(found.skipped) == ["0.weight"]
    assert "0.weight: not measured" in str(found)


# ---- Nothing changes


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_a_report_changes_nothing(source, fused, mode):
    net = make(*SOURCES[source]).train(mode)
    if fused:
        spectral_ext.fuse(net)
    net.body.eval()
    tensors = [*net.parameters(), *net.buffers()]
    before, versions = state(net), [tensor._version for tensor in tensors]
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    report(net, exact=True)
    assert equal_states(state(net), before)
    assert [tensor._version for tensor in tensors] == versions
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a is b for a, b in zip([*net.parameters(), *net.buffers()], tensors, strict=True))


# ---- The product


def dense(function, shape):
    """The norm of a linear function on inputs of a shape."""
    size = math.prod(shape)
    images = function(torch.eye(size, dtype=torch.float64).reshape(size, *shape))
    images = images - function(torch.zeros(1, *shape, dtype=torch.float64))  # without the bias
    return torch.linalg.matrix_norm(images.reshape(size, -1), 2).item()


CONVOLUTIONS = [
    (cls, dict(zip(("kernel_size", "stride", "dilation", "groups"), settings, strict=True)), dim)
    for cls in (nn.Conv2d, nn.ConvTranspose2d)
    for settings in (
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        ((3, 2), (1, 3), 1, 2),
        (3, 2, 2, 1),
        (2, 3, 1, 1),
        (3, 4, 2, 2),
    )
    for dim in (0, 1)
]


@pytest.mark.parametrize("fill", ["ones", "random"])
@pytest.mark.parametrize(("cls", "settings", "dim"), CONVOLUTIONS)
def test_a_convolution_amplifies_no_more_than_its_factor(cls, settings, dim, fill):
    layer = cls(2, 4, padding=1, dtype=torch.float64, **settings)
    if fill == "ones":  # the worst case: windows add up
        nn.init.ones_(layer.weight)
    parametrizations.spectral_norm(layer, dim=dim).eval()
    factor = report(layer, exact=True).lipschitz_product
    amplified = dense(layer, (2, 9, 8))
    assert amplified <= factor * (1 + 1e-12)
    if fill == "ones" and layer.stride == (1, 1):
        assert factor <= 1.3 * amplified  # not a bound of no use


@pytest.mark.parametrize("kind", [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d])
@pytest.mark.parametrize(("kernel_size", "stride"), [(2, 2), (3, 1), (3, 2), (2, 3)])
def test_an_average_pooling_amplifies_no_more_than_its_factor(kind, kernel_size, stride):
    layer = kind(kernel_size, stride, padding=1, count_include_pad=False)
    n = int(kind.__name__[-2])
    assert dense(layer, (1, *(5,) * n)) <= report(layer).lipschitz_product * (1 + 1e-12)


def test_overlapping_max_poolings_count_their_windows():
    peak = torch.zeros(1, 1, 5, 5)
    peak[..., 2, 2] = 1
    for layer in (nn.MaxPool2d(3, 1), nn.MaxPool2d(2), nn.MaxPool2d(2, 2, dilation=2)):
        assert layer(peak).norm() <= report(layer).lipschitz_product
    assert report(nn.MaxPool2d(2)).lipschitz_product == 1
    assert report(nn.MaxPool2d(3, 1)).lipschitz_product == 3


def test_the_product_of_a_sequential_model():
    shared = spectral_ext.spectral_norm(nn.Linear(3, 3))
    shared.parametrizations.weight[0].scale = 2.0
    head = parametrizations.spectral_norm(nn.Linear(3, 2))
    model = nn.Sequential(
        nn.Flatten(), shared, nn.LeakyReLU(3.0), nn.Sequential(shared, shared, nn.Sigmoid()), head
    )
    spectral_ext.fuse(model)
    a, b = report(model, exact=True).rows
    expected = a.lipschitz**3 * 3 * 0.25 * b.lipschitz
    assert a.lipschitz >= 2
    assert report(model, exact=True).lipschitz_product == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(2, 2), r"1 \(Linear\) is not normalized"),
        (nn.GELU(), r"1 \(GELU\) has no factor that is known"),
        (nn.BatchNorm1d(2), r"1 \(BatchNorm1d\)"),
        (nn.Dropout(), r"1 \(Dropout\) is in training"),
        (nn.AvgPool2d(2, divisor_override=1), "divisor_override"),
        (spectral_ext.spectral_norm(nn.Conv1d(2, 2, 3, padding_mode="circular")), "circular"),
        (spectral_ext.spectral_norm(nn.Conv1d(2, 2, 3), dim=2), "dim=2"),
        (
            parametrizations.orthogonal(parametrizations.spectral_norm(nn.Linear(2, 2))),
            "has a parametrization on",
        ),
        (type("MyReLU", (nn.ReLU,), {})(), r"1 \(MyReLU\)"),
        (make(OURS["u_first"]), r"1 \(Net\)"),
    ],
)
def test_no_product_names_the_layer(layer, reason):
    found = report(nn.Sequential(nn.ReLU(), layer))
    assert found.lipschitz_product is None
    assert re.search(reason, found.why), found.why


# ---- What is shown


def test_text_and_table_show_every_row():
    console = pytest.importorskip("rich.console")
    found = report(make(OURS["u_first"]), exact=True)
    screen = io.StringIO()
    console.Console(file=screen, width=120).print(found)
    for text in (str(found), screen.getvalue()):
        for row in found.rows:
            (line,) = [
                line for line in text.splitlines() if line.strip().startswith(row.name + " ")
            ]
            assert f"{row.exact:.5g}" in line and f"{row.residual:.1e}" in line
        assert "All: dtype float64, order u_first, bound 1." in text
        assert "Whole model: no factor, the model (Net) has no factor that is known." in text


def test_an_estimate_is_called_one():
    layer = spectral_ext.spectral_norm(nn.Linear(3, 2))
    assert "Whole model: about" in str(report(layer))
    assert "Whole model: at most" in str(report(layer, exact=True))


def test_without_rich_text_is_left(monkeypatch):
    real = builtins.__import__

    def without_rich(name, *rest):
        if name.partition(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    found = report(spectral_ext.spectral_norm(nn.Linear(3, 2)))
    with pytest.raises(ImportError, match=r"pip install 'spectral-ext\[report\]'"):
        found.table()
    assert "Linear" in str(found)


def test_an_empty_report_prints():
    assert "Whole model: no factor, nothing." in str(Report((), why="nothing"))


# ---- Loggers


def test_log_dict_has_sigma_of_every_layer():
    group = spectral_ext.fuse(make(OURS["u_first"]))
    values = log_dict(group, "D/")
    assert {type(value) for value in values.values()} == {float}
    sigmas = group.sigmas.tolist()
    names = [f"D/sigma/{layer.qualified_name}" for layer in group.layers]
    assert values == dict(zip(names, sigmas, strict=True)) | {
        "D/sigma_min": min(sigmas),
        "D/sigma_max": max(sigmas),
    }


def test_log_dict_of_a_group_without_layers_is_empty():
    net = make(OURS["u_first"])
    group = spectral_ext.fuse(net)
    spectral_ext.unfuse(net)
    assert log_dict(group) == {}


# ---- Errors


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        report({})
    with pytest.raises(TypeError, match="exact must be a bool, got int"):
        report(nn.ReLU(), exact=1)
    with pytest.raises(TypeError, match="prefix must be a str, got int"):
        log_dict(spectral_ext.fuse(make(OURS["u_first"])), 1)


def test_vectors_that_do_not_fit_are_named():
    net = make(OURS["u_first"])
    net.conv.parametrizations.weight[0]._u = torch.ones(3, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"conv\.weight: u and v must have shapes \(5,\) and \(18,\)"
    ):
        report(net)


def test_weights_without_values_are_named():
    net = nn.Sequential(spectral_ext.spectral_norm(nn.Linear(2, 2))).to("meta")
    with pytest.raises(ValueError, match=r"0\.weight: .* meta device"):
        report(net)


def test_gains_count_as_bounds_and_blocks_have_rows_of_their_own():
    norm = spectral_ext.spectral_norm
    net = nn.Sequential(norm(nn.Linear(4, 6), init="svd", gain="one_per_channel"))
    net.append(norm(nn.Linear(6, 4), init="svd", blocks=2))
    with torch.no_grad():
        net[0].parametrizations.weight[0].gain.copy_(torch.tensor([1.0, -3, 2, 0, 1, 1]))
    rows = report(net, exact=True).rows
    assert [row.name for row in rows] == ["0.weight", "1.weight[0]", "1.weight[1]"]
    assert rows[0].bound == 3 and rows[0].lipschitz == pytest.approx(3, rel=1e-5)
    largest = torch.linalg.matrix_norm(net.eval()[0].weight, 2)
    assert largest < rows[0].lipschitz
    parts = net[1].parametrizations.weight.original.detach().chunk(2)
    for row, part in zip(rows[1:], parts, strict=True):
        assert row.sigma == pytest.approx(torch.linalg.matrix_norm(part, 2).item(), rel=1e-5)
        assert row.lipschitz == pytest.approx(1, rel=1e-5)


def test_iterations_of_the_last_forward_are_shown():
    net = nn.Sequential(spectral_ext.spectral_norm(nn.Linear(4, 6), tol=0.9))
    net.append(spectral_ext.spectral_norm(nn.Linear(6, 4), n_power_iterations=3))
    assert [row.iterations for row in report(net).rows] == [None, None]
    spectral_ext.fuse(net)
    net(torch.randn(1, 4))
    found = report(net)
    assert [row.iterations for row in found.rows] == [1, 3]
    assert "made" in str(found) and found.to_dict()["rows"][1]["iterations"] == 3
