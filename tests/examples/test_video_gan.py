"""The GAN of videos runs, and what it measures of videos is right."""

import pytest
import torch
from example import load, numbers, run, tables
from torch.nn import functional as F


@pytest.fixture
def video_gan(monkeypatch):
    return load("video_gan", monkeypatch)


@pytest.fixture
def scans(video_gan):
    return video_gan.digits()[0]


def test_it_writes_pictures_and_a_report(tmp_path):
    run("video_gan", tmp_path, "--steps", "3", "--seeds", "2", "--videos", "64")
    for name in ("strips", "training"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows, comparison = tables(tmp_path / "report.md")
    found = {name: numbers(cells) for name, *cells in rows[1:]}
    real, shuffled, exchanged, *generated = found.values()
    assert [*found][3:] == ["stock", "fused", "none"]
    off_the_line, speed, change, one_digit, digits = zip(*found.values(), strict=True)
    assert min(off_the_line) >= 0 and min(speed) >= 0 and min(change) >= 0
    assert all(0 < share <= 1 for share in one_digit) and all(1 <= n <= 10 for n in digits)
    assert real[0] < 0.1 and shuffled[0] > 10 * real[0]  # shuffled frames do not move steadily
    assert exchanged[2] > 10 * real[2] and exchanged[3] < 0.6 < 0.95 < real[3]  # nor are one digit
    assert all(off > 2 * real[0] for off, *_ in generated)  # three steps train nothing
    assert numbers(comparison[2])[-1] < 1e-3


def test_the_tracker_finds_the_velocities_of_real_videos(video_gan, scans):
    video, _, velocity = video_gan.videos(scans, 100)
    assert velocity.abs().amax() > 0.9
    left, found = video_gan.straight_motion(video_gan.centres(video))
    assert left.max() < 0.15
    torch.testing.assert_close(found, velocity, atol=0.03, rtol=0)


def test_a_line_is_fitted_by_least_squares(video_gan):
    time = torch.arange(8.0)
    line = torch.stack([2 + 0.5 * time, -0.25 * time], dim=1)[None]
    left, velocity = video_gan.straight_motion(line)
    torch.testing.assert_close(velocity, torch.tensor([[0.5, -0.25]]))
    assert left.item() < 1e-5
    there_and_back = torch.stack([torch.tensor([1.0, -1.0] * 4), torch.zeros(8)], dim=1)[None]
    slope = torch.linalg.lstsq(torch.stack([time, torch.ones(8)], 1), there_and_back[0]).solution
    left, velocity = video_gan.straight_motion(there_and_back)
    torch.testing.assert_close(velocity[0], slope[0])
    assert 0.9 < left.item() <= 1


def test_the_ink_of_a_real_video_stays_on_the_canvas_and_the_digit_the_same(video_gan, scans):
    video, chosen, _ = video_gan.videos(scans, 50)
    ink = (video + 1).sum((1, 3, 4))
    expected = (scans[chosen] + 1).sum((1, 2, 3))[:, None].expand(-1, video_gan.FRAMES)
    torch.testing.assert_close(ink, expected, rtol=1e-3, atol=1e-2)


def test_a_frame_is_moved_by_whole_pixels_exactly(video_gan):
    image = torch.full((1, 1, 16, 16), -1.0)
    image[0, 0, 4, 5] = 1
    moved = video_gan.moved(image, torch.tensor([[3.0, 2.0]]))
    expected = torch.roll(image, (2, 3), (2, 3))
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
    middle = video_gan.centres(moved[:, :, None])[0, 0]
    torch.testing.assert_close(middle, torch.tensor([8 - 7.5, 6 - 7.5]))


def test_a_step_repeats_from_its_seed(video_gan, scans):
    def losses(seed):
        training = video_gan.Training("fused", seed, scans)
        return list(training.steps(2)), training.samples(4)

    (first, images), (second, others), (third, _) = map(losses, (0, 0, 1))
    assert first == second != third
    assert torch.equal(images, others)


def test_every_layer_has_a_spectral_norm_and_is_fused(video_gan, scans):
    assert len(video_gan.Training("fused", 0, scans).group.layers) == 4
    assert video_gan.Training("none", 0, scans).group is None


def test_fused_equals_stock(video_gan, scans):
    torch.set_default_dtype(torch.float64)  # where roundings do not hide an error
    try:
        trainings = {
            norm: video_gan.Training(norm, 0, scans.double()).steps(4) for norm in video_gan.NORMS
        }
        compared = video_gan.compare(4, **trainings)
    finally:
        torch.set_default_dtype(torch.float32)
    assert compared.difference(4) < 1e-10
    assert F.l1_loss(*map(torch.tensor, (compared.losses["none"], compared.losses["fused"]))) > 1e-3
