"""The example of certified classifiers: what it certifies holds, and its attack refutes what does not."""

import math

import pytest
import torch
from example import load, numbers, run, tables
from torch import nn

import spectral_ext


@pytest.fixture
def robust(monkeypatch):
    return load("robust_classifier", monkeypatch)


@pytest.fixture
def examination(robust):
    """A network after some steps, for 40 test images."""
    images, labels, test, test_labels = robust.split(*robust.digits())
    model = robust.classifier("operator norm")
    list(robust.train(model, images, labels, 60))
    return robust.Examination(model, test[:40], test_labels[:40])


def test_it_writes_pictures_and_a_report_in_which_no_certificate_falls(tmp_path):
    options = {"steps": 20, "attack-steps": 3, "test": 20, "compared-steps": 3}
    run("robust_classifier", tmp_path, *(f"--{name}={n}" for name, n in options.items()))
    for name in ("radius", "attacked"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    shares, falls, comparison = tables(tmp_path / "report.md")
    for certified, attacked in zip(shares[1::2], shares[2::2], strict=True):
        pairs = list(zip(numbers(certified[3:]), numbers(attacked[3:]), strict=True))
        assert pairs and all(0 <= below <= above <= 100 for below, above in pairs)
        assert pairs[0][0] == pairs[0][1]  # within a radius of 0 both are the accuracy
    for _, certified, at_once, *_ in falls[1:]:
        assert int(certified) > 0 and int(at_once) == 0
    assert numbers(comparison[2])[-1] < 1e-4


def test_no_certified_image_falls_but_with_a_lipschitz_bound_that_is_too_small_some_do(examination):
    assert (examination.radius > 0).sum() > 20
    assert examination.falls(1.0, steps=20) == 0
    examination.radius *= 10  # as if L were a tenth
    assert examination.falls(1.0, steps=20) > 10


def test_the_bound_is_near_one_and_above_the_slope_between_any_two_images(robust, examination):
    assert 0.99 < examination.bound < 1.5
    x = examination.images
    other = x + 1e-4 * torch.randn_like(x)
    with torch.no_grad():
        moved = (examination.model(x) - examination.model(other)).norm(dim=1)
    assert (moved <= examination.bound * (x - other).flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("kind", ["operator norm", "matrix norm", "no norm"])
def test_the_bound_is_the_product_of_the_layers_norms(robust, kind):
    model = robust.classifier(kind).eval().double()
    exact, size = 1.0, (1, 8, 8)
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            bias = layer(torch.zeros(1, *size).double())
            columns = torch.eye(math.prod(size)).double().view(-1, *size)
            exact *= torch.linalg.matrix_norm((layer(columns) - bias).flatten(1), 2).item()
        size = layer(torch.zeros(1, *size).double()).shape[1:]
    assert exact <= robust.lipschitz_bound(model) < 1.15 * exact


def test_an_unknown_layer_has_no_bound(robust):
    with pytest.raises(TypeError, match="Softplus"):
        robust.lipschitz_bound(nn.Sequential(nn.Softplus()))


def test_the_radius_is_exact_for_a_linear_map_of_two_classes(robust):
    """Logits ±⟨w, x⟩/√2 are 1-Lipschitz for a unit vector w; the boundary is at the distance ⟨w, x⟩."""
    w = nn.functional.normalize(torch.randn(64).double(), dim=0)
    linear = nn.Linear(64, 2, bias=False).double()
    linear.weight.data = torch.stack([w, -w]) / math.sqrt(2)
    model = nn.Sequential(nn.Flatten(), linear)
    images = torch.randn(30, 1, 8, 8).double()
    distance = images.flatten(1) @ w
    labels = (distance < 0).long()
    bound = robust.lipschitz_bound(model)
    assert bound == pytest.approx(1, rel=1e-2)
    radius = robust.certified_radius(model, images, labels, bound)
    torch.testing.assert_close(radius, distance.abs(), rtol=1e-2, atol=0)
    for factor, falls in ((0.99, False), (1.05, True)):
        _, least = robust.attack(model, images, labels, factor * distance.abs(), steps=10)
        assert ((least <= 0) == falls).all()
    assert (robust.certified_radius(model, images, 1 - labels, bound) == 0).all()


def test_the_attack_stays_within_its_radius(robust, examination):
    radius = torch.linspace(0.1, 2, 40).double()
    found, _ = robust.attack(examination.model, examination.images, examination.labels, radius, 5)
    length = (found - examination.images).flatten(1).norm(dim=1)
    assert (length <= radius * (1 + 1e-9)).all() and (length > 0.5 * radius).any()


def test_maxmin_keeps_norms(robust):
    x = torch.randn(5, 6, 3, 3)
    y = robust.MaxMin()(x)
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    assert (y[:, :3] >= y[:, 3:]).all()


@pytest.mark.parametrize(("kind", "layers"), [("operator norm", 2), ("matrix norm", 4)])
def test_the_norms_are_fused(robust, kind, layers):
    model = robust.classifier(kind)
    assert len(spectral_ext.group_of(model).layers) == layers


def test_fused_equals_stock(robust):
    images, labels, *_ = robust.split(*robust.digits())
    torch.set_default_dtype(torch.float64)  # where roundings do not hide an error
    try:
        compared = robust.compare_with_stock(images.double(), labels, 10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert compared.difference(10) < 1e-10
    assert compared.losses["fused"][0] != compared.losses["fused"][-1]


def test_a_training_repeats_from_its_seed(robust):
    def losses(seed):
        torch.manual_seed(seed)
        model = robust.classifier("operator norm")
        return list(robust.train(model, torch.randn(30, 1, 8, 8), torch.arange(30) % 10, 3))

    assert losses(0) == losses(0) != losses(1)
