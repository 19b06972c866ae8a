"""Pictures of σ: what is drawn, and how."""

import builtins
import math

import pytest
import torch

from spectral_ext import plot

plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


HISTORY = torch.tensor([[1.0, 2.0], [1.5, 3.0], [2.0, 4.0]])
FORMS = {
    "tensor": HISTORY,
    "tensors": list(HISTORY),
    "lists": HISTORY.tolist(),
    "log_dict": [
        {"n/sigma/a.weight": a, "n/sigma/b.weight": b, "n/sigma_min": 0.0}
        for a, b in HISTORY.tolist()
    ],
}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("form", FORMS)
def test_few_layers_are_lines(form):
    ax = plot.sigmas(FORMS[form])
    assert [list(line.get_ydata()) for line in ax.lines] == HISTORY.T.tolist()
    assert legend(ax) == (["a.weight", "b.weight"] if form == "log_dict" else ["0", "1"])
    assert ax.get_yscale() == "linear"
    ax.figure.canvas.draw()


def test_many_layers_are_bands():
    history = torch.arange(13.0).repeat(2, 1)
    ax = plot.sigmas(history)
    (median,) = ax.lines
    assert list(median.get_ydata()) == [6, 6]
    extents = [band.get_paths()[0].get_extents() for band in ax.collections]
    assert [(box.y0, box.y1) for box in extents] == [(0, 12), (3, 9)]
    assert legend(ax) == ["min to max", "25% to 75%", "median of 13 layers"]
    assert len(plot.sigmas(history[:, :12]).lines) == 12


@pytest.mark.parametrize(
    ("largest", "scale"), [(100.0, "linear"), (101.0, "log"), (math.inf, "linear")]
)
def test_a_wide_range_is_logarithmic(largest, scale):
    assert plot.sigmas([[1.0, 2.0], [1.0, largest]]).get_yscale() == scale
    assert plot.sigmas([[-1.0, largest]]).get_yscale() == "linear"


@pytest.mark.parametrize("layers", [2, 13])
def test_values_that_are_not_finite_are_left_out(layers):
    history = torch.ones(3, layers)
    history[1] = math.nan
    history[2, : (layers + 1) // 2] = math.inf
    ax = plot.sigmas(history)
    ax.figure.canvas.draw()
    assert all(map(math.isfinite, ax.get_ylim()))
    assert math.isnan(ax.lines[0].get_ydata()[1])
    assert ax.lines[-1].get_ydata()[2] == 1


def test_it_draws_where_it_is_told_with_the_names_that_it_is_told():
    ax = plt.subplots()[1]
    assert plot.sigmas(HISTORY, names=["first", "last"], ax=ax) is ax
    assert legend(ax) == ["first", "last"]
    assert len(plt.get_fignums()) == 1


def test_tensors_in_a_graph_are_drawn():
    plot.sigmas(HISTORY.clone().requires_grad_())
    plot.sigmas([row.bfloat16().requires_grad_() for row in HISTORY])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"history": 3}, TypeError, "history must be a sequence or a tensor, got int"),
        ({"history": "steps"}, TypeError, "got str"),
        ({"history": []}, ValueError, "history is empty"),
        ({"history": [1.0, 2.0]}, ValueError, r"got shape \(2,\)"),
        ({"history": torch.ones(2, 0)}, ValueError, r"got shape \(2, 0\)"),
        ({"history": torch.ones(2, 2, 2)}, ValueError, r"got shape \(2, 2, 2\)"),
        ({"history": torch.ones(2, 2) * 1j}, ValueError, "must give real"),
        ({"history": [[1.0], [1.0, 2.0]]}, ValueError, r"history\[1\] has shape \(2,\)"),
        ({"history": [["a"]]}, TypeError, r"history\[0\] is not a row of numbers"),
        ({"history": [{"sigma/a": 1.0}, {"sigma/b": 1.0}]}, ValueError, r"history\[1\] does not"),
        ({"history": [{"loss": 1.0}]}, ValueError, "at least one layer"),
        ({"history": HISTORY, "names": ["a"]}, ValueError, "names has 1 entries for 2 layers"),
        ({"history": HISTORY, "ax": 1}, TypeError, "ax must be matplotlib.axes.Axes, got int"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        plot.sigmas(**arguments)
    assert plt.get_fignums() == []


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'spectral-ext\[report\]'"):
        plot.sigmas(HISTORY)
