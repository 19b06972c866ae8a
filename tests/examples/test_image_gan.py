"""SNGAN on digits runs and reports, its measures are right, and fused gives stock's numbers."""

import sys

import pytest
import torch
from example import FOLDER, run, tables

sys.path.insert(0, str(FOLDER))
import image_gan
from digits import digits, split
from gan import hinge_loss, tile
from quality import class_coverage, frechet_distance, train_classifier


@pytest.fixture(scope="module")
def judge():
    real, labels, test, _ = split(*digits(image_gan.SIZE))
    return image_gan.Judge(real, labels, len(test))


def losses(judge, norms, seed=0, steps=4):
    torch.manual_seed(99)  # what was drawn before does not matter
    real = split(*digits(image_gan.SIZE))[0]
    trained = image_gan.train(norms, seed, steps, real, judge)
    return {norm: (part.training.losses, part.verdicts) for norm, part in trained.items()}


def test_it_writes_pictures_and_a_report_with_a_row_for_each_norm(tmp_path):
    run("image_gan", tmp_path, "--steps", "3", "--seeds", "2")
    for name in ("samples", "quality"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    judged, same = tables(tmp_path / "report.md")
    rows = {row[0]: [cell.split(" / ") for cell in row[1:]] for row in judged + same}
    assert (
        float(rows["real test images"][0][0]) < 20 and float(rows["real test images"][2][0]) > 9.9
    )
    for norm, seeds in (("none", 2), ("fused", 2), ("stock", 1)):
        distance, smallest, classes, loss, ms = rows[image_gan.NORMS[norm]]
        assert all(len(values) == seeds for values in (distance, smallest, classes, loss, ms))
        assert 20 < float(smallest[0]) <= float(distance[0]) and float(ms[0]) > 0
        assert all(1 <= float(value) <= 10 for value in classes)
    assert float(rows["largest difference of losses, whole run"][2][0]) < 1e-4


def test_fused_gives_the_losses_of_stock_and_no_norm_other_ones(judge):
    found = losses(judge, ("none", "stock", "fused"))
    assert found["fused"][0] == pytest.approx(found["stock"][0], abs=1e-4)
    assert abs(found["none"][0][0] - found["stock"][0][0]) > 1e-3


def test_a_run_repeats_from_its_seed(judge):
    first, second, other = (losses(judge, ("fused",), seed) for seed in (0, 0, 1))
    assert first == second
    assert first["fused"][0] != other["fused"][0]


def test_the_first_weights_are_the_same_for_all_norms():
    nets = []
    for norm in image_gan.NORMS:
        torch.manual_seed(0)
        nets.append(image_gan.discriminator(norm).state_dict())
    for name in ("0", "4", "11"):
        weights = [
            net.get(f"{name}.weight", net.get(f"{name}.parametrizations.weight.original"))
            for net in nets
        ]
        assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    normalized = [sum("original" in key for key in net) for net in nets]
    assert normalized == [0, 6, 6]  # every layer, or none


def test_the_judge_looks_after_the_last_step():
    assert image_gan.looks(3) == [1, 2, 3]
    assert len(image_gan.looks(1000)) == image_gan.LOOKS and image_gan.looks(1000)[-1] == 1000


def test_the_frechet_distance_of_a_shift_and_of_a_scale_is_known():
    features = torch.randn(500, 6)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)
    shift = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    assert frechet_distance(features + shift, features) == pytest.approx(25, rel=1e-5)
    centred = features - features.mean(0)
    spread = centred.T.cov().trace().item()
    assert frechet_distance(3 * centred, centred) == pytest.approx(4 * spread, rel=1e-4)


def test_the_classes_are_counted_by_their_shares():
    assert class_coverage(torch.tensor([3, 3, 7, 7])) == pytest.approx(2)
    assert class_coverage(torch.arange(10).repeat(5)) == pytest.approx(10)
    assert 1 < class_coverage(torch.tensor([3, 3, 3, 7])) < 2


def test_the_classifier_knows_digits_that_it_has_not_seen_and_repeats():
    images, labels, test, test_labels = split(*digits(8))
    state = torch.get_rng_state()
    first, second = (train_classifier(images, labels, steps=300) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(test), second(test))
    assert (first.classify(test) == test_labels).float().mean() > 0.93


def test_the_hinge_loss_asks_for_a_margin_of_one():
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])).item() == 0.5 + 1.0


def test_tiles_stand_in_rows():
    images = torch.arange(6.0).view(6, 1, 1, 1)
    assert tile(images, 3)[1::3, 1::3].tolist() == [[0, 1, 2], [3, 4, 5]]
