"""The benchmark measures what it says: right numbers, each provider alike, lines that are kept."""

import csv
import json
import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrizations

from spectral_ext import reference
from spectral_ext.__main__ import main
from spectral_ext.benchmark import measure as measuring
from spectral_ext.benchmark import models, peers, results
from spectral_ext.benchmark.measure import Case, WrongNumbersError, largest_error, measure, prepare
from spectral_ext.benchmark.models import Model, load, random_layer
from spectral_ext.benchmark.peers import PEERS, Setting

BENCH = Path(__file__).parent.parent / "bench"
QUICK = ("stock", "foreach", "biggan", "ours")


@pytest.fixture
def small():
    shapes = ([6, 5], 0), ([4, 3, 2, 2], 0), ([3, 4, 2], 1)
    return Model("small", [random_layer("layer", *each) for each in shapes])


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import plot

    return plot


def error_of(name, model, setting):
    layers = [replace(x, weight=x.weight.to(setting.dtype)) for x in model.layers]
    peer = PEERS[name](layers, setting)
    assert [x.data_ptr() for x in peer.originals] == [x.weight.data_ptr() for x in layers]
    if peer.vectors is None:
        return None
    grads = measuring.random_like(peer.originals)
    largest_error(peer, layers, grads, setting)
    return largest_error(peer, layers, grads, setting)  # of the second call: states went on


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("order", ["u_first", "v_first"])
@pytest.mark.parametrize("training", [True, False])
def test_every_peer_computes_what_the_reference_does(name, order, training, small):
    setting = Setting(3, order, training, torch.float64)
    error = error_of(name, small, setting)
    assert (error is None) == (name == "biggan" and not training)  # which iterates in evaluation
    assert error is None or error < 1e-12


def test_compiled_stock_does(small):
    assert error_of("compiled", small, Setting(dtype=torch.float64)) < 1e-12


def test_wrong_numbers_are_not_timed(small, monkeypatch):
    def wrong(layers, setting):
        peer = peers.ours(layers, setting)
        return replace(peer, run=lambda: [1.001 * weight for weight in peer.run()])

    monkeypatch.setitem(PEERS, "ours", wrong)
    monkeypatch.setattr(measuring, "_in_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongNumbersError, match=r"ours differs .* on small"):
        measure(Case(small, "forward"), QUICK)


@pytest.mark.parametrize("mode", measuring.MODES)
def test_every_provider_is_timed_and_what_it_moves_is_counted(mode, small):
    found = measure(Case(small, mode), [*QUICK, "copy_", "read"], seconds=0)
    assert [each.provider for each in found] == [*QUICK, "copy_", "read"]
    assert all(min(each.times) > 0 and len(each.times) >= 5 for each in found)
    numel = 30 + 48 + 24
    passes = {"forward": 2, "backward": 3, "forward+backward": 5}[mode]
    assert [each.bytes for each in found] == [4 * numel * passes] * 4 + [8 * numel, 4 * numel]
    assert found[0].gigabytes_per_second == pytest.approx(found[0].bytes / found[0].median / 1e6)


def test_three_passes_of_a_step_are_computed_once_by_ours(small, monkeypatch):
    made = []
    make = PEERS["ours"]
    monkeypatch.setitem(PEERS, "ours", lambda *of: made.append(make(*of)) or made[-1])
    case = Case(small, "forward+backward", Setting(update="step"), passes=3)
    job, _ = prepare(case, "ours", checked=False)
    for _ in range(2):
        before = [(u.clone(), v.clone()) for u, v in made[0].vectors()]
        assert len(job.run(job.start())) == 3
        for layer, old, new in zip(small.layers, before, made[0].vectors(), strict=True):
            once = reference.spectral_normalize(layer.weight, *old, dim=layer.dim)
            torch.testing.assert_close(new, (once.u, once.v))


FACTORIES = """
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

def half():
    return nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 1))

def plain():
    return nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.ReLU()), torch.randn(1, 2, 4)

def nothing():
    return 5
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own_models.py"
    path.write_text(FACTORIES)
    return path


def test_own_models_are_loaded_with_the_layers_that_have_norms_or_else_would(file):
    half, plain = load(f"{file}:half"), load(f"{file}:plain")
    assert [(x.name, tuple(x.weight.shape), x.dim) for x in half.layers] == [
        ("0.weight", (5, 4), 0)
    ]
    assert [(x.name, x.dim) for x in plain.layers] == [("0.weight", 1)]
    for model in (half, plain):
        assert type(model.net[0].parametrizations.weight[0]) is parametrizations._SpectralNorm
    assert len(plain.inputs) == 1 and half.inputs == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_model", "there is no model 'no_such_model'"),
        ("{}:missing", "has no function 'missing'"),
        ("{}:nothing", "must return a torch.nn.Module"),
        ("/nowhere/own.py:f", "No such file"),
    ],
)
def test_what_is_no_model_is_an_error_in_words(name, message, file, capsys):
    assert main(["bench", name.format(file)]) == 2
    assert message in capsys.readouterr().err


def test_the_known_models_have_the_shapes_of_their_file():
    model = load("convtranspose_dim1_case")
    assert [x.dim for x in model.layers] == [1, 1] and model.numel == 6291456


def test_layers_that_are_alike_have_a_name():
    model = load("3 x 4x5")
    assert [(tuple(x.weight.shape), x.dim) for x in model.layers] == [((4, 5), 0)] * 3
    with pytest.raises(ValueError, match="there is no model '0 x 4x5'"):
        load("0 x 4x5")


def test_bench_prints_a_table_and_puts_lines_in_the_place_of_older_ones(file, tmp_path, capsys):
    pytest.importorskip("rich")
    path = tmp_path / "results.csv"
    command = ["bench", f"{file}:half", "--modes", "forward", "--threads", "1", "--seconds", "0"]
    command += ["--providers", "stock", "ours", "copy_", "--memory", "--results", str(path)]
    for iterations in ("1", "2", "1"):
        assert main([*command, "--iterations", iterations]) == 0
    shown = capsys.readouterr().out
    assert "half, forward, float32" in shown and "2 iterations" in shown
    rows = list(csv.DictReader(path.read_text().splitlines()))
    kinds = [(row["provider"], row["n_power_iterations"]) for row in rows]
    assert kinds == [(name, n) for name in ("copy_", "ours", "stock") for n in ("1", "2")]
    for row in rows:
        assert 0 < float(row["q20_ms"]) <= float(row["median_ms"]) <= float(row["q80_ms"])
        is_measured = row["provider"] != "copy_" and row["n_power_iterations"] == "1"
        assert bool(row["peak_mb"]) == (is_measured and Path("/proc/self/clear_refs").exists())
        assert row["threads"] == "1" and row["torch"] == torch.__version__ and row["device"]


def test_no_two_set_ups_ask_the_same_question(monkeypatch):
    """The later answer would take the place of the earlier one, which may have the peak memory, too."""
    monkeypatch.syspath_prepend(str(BENCH))
    import run

    def without_numbers(name, shape, dim):
        return models.Layer(name, torch.empty(shape, device="meta"), dim)

    monkeypatch.setattr(models, "random_layer", without_numbers)
    asked = [
        (q.case.model.name, q.case.mode, q.case.setting, q.case.passes, q.threads, provider)
        for setup in run.SETUPS.values()
        for q in setup()
        for provider in q.providers or peers.CPU_PEERS
    ]
    assert len(asked) == len(set(asked)) > 500


def test_lines_of_other_machines_stay(tmp_path):
    path = tmp_path / "results.csv"
    row = dict.fromkeys(results.COLUMNS, "x")
    results.upsert(path, [row, row | {"device": "y"}])
    results.upsert(path, [row | {"median_ms": "2"}])
    assert [(r["device"], r["median_ms"]) for r in results.read(path)] == [("x", "2"), ("y", "x")]


@pytest.mark.parametrize("name", ["half", "plain"])
def test_profile_writes_traces_and_shows_where_a_step_goes(name, file, tmp_path, capsys):
    pytest.importorskip("rich")
    command = [
        "profile",
        f"{file}:{name}",
        "--steps",
        "2",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "norms, backward" in shown and "spectral_ext::backward" in shown
    found = {}
    for kind in ("stock", "fused"):
        trace = json.loads((tmp_path / name / f"{kind}.json").read_text())
        found[kind] = [event.get("name") for event in trace["traceEvents"]]
        assert found[kind].count("spectral norm") == 2  # there is one layer, and two steps
    assert "spectral_ext::forward_" in found["fused"]
    assert "spectral_ext::forward_" not in found["stock"]


def test_the_operators_of_spectral_ext_are_shown_however_little_they_take():
    from spectral_ext.benchmark.profiling import Profile, operations_table

    slow = {f"aten::slow{i}": (30.0 - i, 1.0) for i in range(20)}
    quick = {"spectral_ext::forward_": (0.2, 2.0), "aten::quick": (0.1, 1.0)}
    last = {"spectral_ext::backward": (0.001, 1.0)}
    table = operations_table(Profile({}, slow), Profile({}, slow | quick | last), count=3)
    stock, *_, fused, milliseconds, calls = (list(column.cells) for column in table.columns)
    assert stock == ["slow0", "slow1", "slow2", "", ""]
    assert fused == ["slow0", "slow1", "slow2", "spectral_ext::forward_", "spectral_ext::backward"]
    assert milliseconds[3:] == ["0.200", "0.001"] and calls[3:] == ["2", "1"]


def test_a_backward_belongs_to_the_norms_whose_forward_made_it(file):
    from spectral_ext.benchmark.profiling import profile_step

    model = load(f"{file}:plain")
    trace, device = file.parent / "trace.json", torch.device("cpu")
    for is_fused in (False, True):
        found = profile_step(model, is_fused, trace, steps=2, device=device)
        assert all(value > 0 for value in found.parts.values())
        assert found.total == pytest.approx(sum(found.parts.values()))
    frozen = load(f"{file}:plain")
    frozen.net[0].parametrizations.weight.original.requires_grad_(False)
    found = profile_step(frozen, True, trace, steps=2, device=device)
    assert found.parts["norms, backward"] == 0 < found.parts["rest of backward"]


def table_of(script, *arguments):
    """Run a script; return the cells of the rows that it printed."""
    command = [sys.executable, str(BENCH / script), *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="its loops are for AVX2")
def test_ceilings_measures_every_loop_at_every_size():
    rows = table_of("ceilings.py", "--megabytes", "1", "2", "--threads", "1", "2", "--repeats", "2")
    assert [row[0] for row in rows] == ["1, 1", "1, 2", "2, 1", "2, 2"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


def test_host_shows_what_a_layer_costs():
    rows = table_of("host.py", "--counts", "2", "60", "--seconds", "0.2")
    assert len(rows) == 5
    assert all(float(cell) > 0 for row in rows for cell in row[1:3])


def test_the_fit_finds_start_and_slope(plot):
    xs = [1, 10, 100, 1000]
    start, slope = plot.fit(xs, [0.02 + 0.005 * x for x in xs])
    assert math.isclose(start, 0.02, rel_tol=1e-6) and math.isclose(slope, 0.005, rel_tol=1e-6)


def test_pages_show_the_tables_that_the_results_give(plot):
    found = plot.Results.of(results.read(plot.DATA / "results.csv"))
    shown = [name for page in plot.PAGES for _, name, _ in plot.MARKED.findall(page.read_text())]
    assert sorted(set(shown)) == sorted(plot.TABLES)
    for page in plot.PAGES:
        assert plot.filled(page.read_text(), found) == page.read_text(), f"{page}: make bench-plots"
