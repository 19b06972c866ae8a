"""The example of uncertainty runs, and its mathematics is right."""

import pytest
import torch
from example import load, numbers, run, tables

COLUMNS = 7


@pytest.fixture
def uncertainty(monkeypatch):
    return load("uncertainty", monkeypatch)


def test_it_writes_pictures_and_a_report(tmp_path):
    run("uncertainty", tmp_path, "--steps", "3", "--seeds", "2", "--compared-steps", "3")
    for name in ("moons", "unknown"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    measures, comparison = tables(tmp_path / "report.md")
    assert [len(row) for row in measures] == [COLUMNS] * len(measures)
    found = {name: numbers(cells) for name, *cells in measures[1:]}
    assert list(found)[:4] == ["accuracy", "NLL", "ECE", "held out"]
    for name in ("accuracy", "held out", "rotated", "inverted", "noisy", "photographs"):
        assert all(0 <= found[name][i] <= 1 for i in (0, 1, 3, 4))
    free, bounded = found["largest σ"][0], found["largest σ"][1]
    assert bounded < 0.95 < free  # power iteration is from below
    assert numbers(comparison[2])[-1] < 1e-4


@pytest.mark.parametrize(("unknown", "expected"), [([0.6, 0.9], 1.0), ([0.0, 0.05], 0.0)])
def test_a_perfect_detector_has_an_auroc_of_one(uncertainty, unknown, expected):
    assert uncertainty.auroc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor(unknown)) == expected


def test_the_calibration_error_is_the_gap_of_confidence_and_accuracy(uncertainty):
    probabilities = torch.tensor([[0.8, 0.2]]).expand(10, 2)
    right = torch.tensor([0] * 8 + [1] * 2)
    assert uncertainty.calibration_error(probabilities, right) == pytest.approx(0, abs=1e-6)
    assert uncertainty.calibration_error(probabilities, 1 - right) == pytest.approx(0.6)
    # Half too sure and half not sure enough: gaps of two bins do not cancel.
    probabilities = torch.tensor([[0.8, 0.2]] * 5 + [[0.6, 0.4]] * 5)
    labels = torch.tensor([0, 0, 0, 1, 1] + [0] * 4 + [1])
    assert uncertainty.calibration_error(probabilities, labels) == pytest.approx(0.2)


def test_the_variance_is_that_of_the_exact_process_and_grows_away_from_the_data(uncertainty):
    process = uncertainty.GaussianProcess(2, length_scale=4.0)
    seen = torch.randn(50, uncertainty.WIDTH) / 4
    process.fit_covariance(seen)
    asked = torch.cat([seen[:3], seen[:1] + 0.1, seen[:1] + 0.3, seen[:1] + 5])
    variance = process.variance(asked)
    assert variance[0] < variance[3] < variance[4] < variance[5]
    assert variance[:3].max() < 0.7
    assert 0.8 < variance[5] < 1.2
    # By the matrix inversion lemma the variance is that of a process with the kernel φᵀφ and noise 1.
    phi, at = process.fourier(seen).double(), process.fourier(asked).double()
    weights = torch.linalg.solve(phi @ phi.T + torch.eye(50).double(), phi @ at.T)
    exact = (at * at).sum(1) - ((at @ phi.T) * weights.T).sum(1)
    torch.testing.assert_close(variance.double(), exact, atol=1e-5, rtol=1e-5)


def test_the_fourier_features_approximate_the_kernel(uncertainty):
    process = uncertainty.GaussianProcess(2, length_scale=4.0)
    h = torch.randn(20, uncertainty.WIDTH) / 4
    phi = process.fourier(h)
    kernel = torch.exp(-torch.cdist(h, h).square() / (2 * 4.0**2))
    torch.testing.assert_close(phi @ phi.T, kernel, atol=0.15, rtol=0)


def test_a_large_variance_makes_the_classes_equally_probable(uncertainty):
    model = uncertainty.SNGP(4, 2, 2.0, None)
    x = torch.randn(5, 4)
    torch.testing.assert_close(model.predict(x)[0].sum(1), torch.ones(5))
    sure, _ = model.predict(x)
    model.process.covariance *= 1e8
    unsure, _ = model.predict(x)
    assert (unsure.amax(1) - 0.5 < 1e-2 * (sure.amax(1) - 0.5)).all()


def test_the_two_held_out_digits_are_not_trained(uncertainty):
    images, labels, *_ = uncertainty.split(*uncertainty.digits())
    task = uncertainty.Task(seed=6)  # holds out 2 and 3
    kept = [image.flatten().tolist() for image in images[(labels != 2) & (labels != 3)]]
    assert [image.flatten().tolist() for image in task.train[0]] == kept
    assert set(task.train[1].tolist()) == set(range(8))


def test_fused_equals_plain_torch(uncertainty):
    torch.set_default_dtype(torch.float64)  # where roundings do not hide an error
    try:
        task = uncertainty.Task(0)
        task.train = task.train[0].double(), task.train[1]
        compared = uncertainty.compare_with_plain_torch(task, 12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert compared.difference(12) < 1e-10
    assert compared.losses["fused"][0] != compared.losses["fused"][-1]


def test_a_training_repeats_from_its_seed(uncertainty):
    def losses(seed):
        torch.manual_seed(seed)
        model = uncertainty.SNGP(2, 2, 2.0, 0.9)
        x = torch.linspace(-1, 1, 20).view(10, 2)
        return list(uncertainty.train(model, x, torch.arange(10) % 2, 3))

    assert losses(0) == losses(0) != losses(1)
