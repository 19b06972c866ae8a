"""Reports of checkpoints: the same rows as of the model, and messages instead of tracebacks."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as hook_spectral_norm

import spectral_ext
from spectral_ext.__main__ import main
from spectral_ext.checkpoint_report import load_state_dict, report_state_dict
from spectral_ext.nn.report import report

KINDS = {
    "ours": spectral_ext.spectral_norm,
    "parametrization": parametrizations.spectral_norm,
    "hook": hook_spectral_norm,
}
MEASURED = ("name", "shape", "rows", "columns", "dtype", "sigma", "exact", "residual")


def make(norm):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ConvTranspose2d(8, 8, 3),  # its sizes do not say which dimension gives the rows
        nn.ConvTranspose2d(8, 5, 3),
        nn.Flatten(),
        nn.Linear(500, 4),
    )
    for layer in net:
        if hasattr(layer, "weight"):
            norm(layer)
    for _ in range(20):
        net(torch.randn(1, 3, 8, 8))
    return net


@pytest.fixture(scope="module", params=KINDS)
def net(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(KINDS[request.param])


@pytest.fixture
def checkpoint(net, tmp_path):
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize("exact", [False, True])
def test_a_checkpoint_has_the_rows_of_its_model(net, checkpoint, exact):
    found = report_state_dict(load_state_dict(checkpoint), exact=exact)
    of_net = report(net, exact=exact)
    for row, expected in zip(found.rows, of_net.rows, strict=True):
        assert all(getattr(row, name) == getattr(expected, name) for name in MEASURED)
        assert row.lipschitz == pytest.approx(expected.lipschitz, rel=1e-6)
    assert [row.rows for row in found.rows] == [8, 8, 5, 4]
    assert found.lipschitz_product is None
    assert "does not say how layers follow" in found.why


def test_only_the_hooks_layout_tells_the_order():
    for kind, order in (("parametrization", None), ("hook", "v_first")):
        (row,) = report_state_dict(KINDS[kind](nn.Linear(3, 2)).state_dict()).rows
        assert row.order == order


@pytest.mark.parametrize(
    ("wrapped", "key"),
    [
        (lambda state: {"state_dict": state, "epoch": 3}, None),
        (lambda state: {"model": state}, None),
        (lambda state: {"nets": {"D": state}}, "nets.D"),
        (lambda state: {"state_dict": {}, "ema": state}, "ema"),
    ],
)
def test_state_dicts_are_found_where_they_are(tmp_path, wrapped, key):
    state = KINDS["parametrization"](nn.Linear(3, 2)).state_dict()
    torch.save(wrapped(state), tmp_path / "nested.pt")
    assert load_state_dict(tmp_path / "nested.pt", key).keys() == state.keys()


def test_other_parametrizations_are_no_spectral_norms():
    pruned = prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=1)
    others = {**pruned.state_dict(), **parametrizations.orthogonal(nn.Linear(2, 2)).state_dict()}
    assert report_state_dict(others).rows == ()


def test_tensors_that_do_not_fit_are_named():
    state = KINDS["hook"](nn.Linear(3, 2)).state_dict()
    with pytest.raises(ValueError, match=r"weight: u and v must have shapes \(2,\) and \(3,\)"):
        report_state_dict({**state, "weight_u": torch.ones(5)})
    with pytest.raises(TypeError, match="weight_v must be a tensor, got str"):
        report_state_dict({**state, "weight_v": "v"})
    with pytest.raises(TypeError, match="state_dict must be a mapping, got list"):
        report_state_dict([])
    with pytest.raises(TypeError, match="exact must be a bool, got int"):
        report_state_dict(state, exact=1)
    with pytest.raises(TypeError, match="path must be a str or a Path, got int"):
        load_state_dict(0)


# ---- The command line


def test_the_command_prints_the_rows(net, checkpoint, capsys):
    assert main(["report", str(checkpoint), "--exact"]) == 0
    text = capsys.readouterr().out
    for row in report(net, exact=True).rows:
        assert f"{row.exact:.5g}" in text and row.name in text


def test_the_command_prints_json(net, checkpoint, capsys):
    assert main(["report", str(checkpoint), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["sigma"] for row in rows] == [row.sigma for row in report(net).rows]


def test_a_terminal_gets_a_table(checkpoint, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["report", str(checkpoint), "--exact"]) == 0
    assert "────" in capsys.readouterr().out


def failure(capsys, *arguments):
    """Return the message of a command that must fail."""
    assert main(["report", *map(str, arguments)]) == 2
    out, message = capsys.readouterr()
    assert out == ""
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_a_missing_file_is_named(capsys, tmp_path):
    assert "missing.pt" in failure(capsys, tmp_path / "missing.pt")
    assert str(tmp_path) in failure(capsys, tmp_path)


class Malicious:
    def __reduce__(self):
        return open, ("malicious.txt", "w")


@pytest.mark.parametrize("damage", ["code", "text", "empty", "cut", "module"])
def test_files_that_cannot_be_loaded_say_so(capsys, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pt"
    torch.save({"code": Malicious(), "module": nn.Linear(2, 2)}.get(damage, {}), path)
    if damage in ("text", "empty"):
        path.write_text("a text" if damage == "text" else "")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    message = failure(capsys, path)
    assert str(path) in message and "cannot be loaded" in message
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_norm_the_keys_are_shown(capsys, tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"step": 3, "generator": nn.Linear(2, 2).state_dict()}, path)
    assert failure(capsys, path).endswith("no spectral norm; seen: step, generator\n")
    assert "seen: weight, bias" in failure(capsys, path, "--key", "generator")
    assert "seen: step, generator" in failure(capsys, path, "--key", "generator.missing")
    torch.save([1], path)
    assert failure(capsys, path).endswith("seen: a list\n")
    torch.save(nn.Sequential(*(nn.Linear(1, 1) for _ in range(7))).state_dict(), path)
    assert failure(capsys, path).endswith("5.bias, … (14 keys)\n")


def test_the_exit_status_reaches_the_shell(tmp_path):
    command = [sys.executable, "-m", "spectral_ext", "report", str(tmp_path / "missing.pt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
