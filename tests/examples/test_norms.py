"""The example of five norms runs, keeps its bounds and gives the same for the same seed."""

import example
import pytest
import torch
from rich.progress import Progress

BOUNDED = ("spectral norm", "projection", "soft bound")


@pytest.fixture
def norms(monkeypatch):
    return example.load("norms", monkeypatch)


def run(norms, kind, seed=0):
    torch.manual_seed(99)  # what was drawn before does not matter
    digits = torch.linspace(-1, 1, 40 * 64).view(40, 1, 8, 8)
    with Progress(disable=True) as progress:
        return norms.train(kind, 3, seed, digits, progress)


def test_it_writes_a_picture_and_a_report_with_a_row_for_each_kind(tmp_path):
    example.run("norms", tmp_path, "--steps", "3", "--seeds", "2")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "report.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert [row[0] for row in rows[3:]] == ["none", "weight norm", *BOUNDED]
    for row in rows[3:]:
        values = [float(cell.split()[0]) for cell in row[1:]]
        assert min(values) > 0 and "/" in row[1]
        assert (row[0] in BOUNDED) == (values[4] < 1.03)


def test_all_kinds_start_from_the_same_weights_and_see_the_same_numbers(norms):
    found = {kind: run(norms, kind) for kind in norms.KINDS}
    assert found["none"].losses[0] == pytest.approx(found["weight norm"].losses[0], rel=1e-5)
    assert found["projection"].losses[0] == pytest.approx(found["soft bound"].losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "weight norm", *BOUNDED])
def test_a_run_repeats_from_its_seed(norms, kind):
    first, second, other = (run(norms, kind, seed) for seed in (0, 0, 1))
    assert first.losses == second.losses and first.gradients == second.gradients
    assert first.sigmas == second.sigmas and torch.equal(first.samples, second.samples)
    assert first.losses != other.losses


def test_the_distance_is_zero_for_the_digits_and_grows_with_a_shift(norms):
    digits = torch.rand(200, 1, 8, 8) * 2 - 1
    quality = norms.Quality(digits, torch.arange(200) % 10)
    assert quality.distance(digits) == pytest.approx(0, abs=1e-6)
    shift = quality.axes[:, -1].view(1, 1, 8, 8)  # a unit vector among the components
    assert quality.distance(digits + 3 * shift) == pytest.approx(9, rel=1e-5)


def test_the_classes_are_counted_by_their_shares(norms):
    scans, labels = norms.digits()
    quality = norms.Quality(scans, labels)
    of_two = torch.cat([scans[labels == digit][:100] for digit in (3, 7)])
    assert quality.classes(of_two) == pytest.approx(2, abs=0.2)
    assert quality.classes(scans) == pytest.approx(10, abs=0.05)
