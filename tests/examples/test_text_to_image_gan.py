"""Images from captions: attributes are measured right, and fused gives stock's numbers."""

import sys

import pytest
import torch
from example import FOLDER, run, tables
from torch.nn.utils import parametrize

sys.path.insert(0, str(FOLDER))
import text_to_image_gan
from digits import digits, split
from quality import train_classifier
from text_to_image_gan import (
    EVERY,
    Attributes,
    Discriminator,
    Tokenizer,
    accuracy,
    caption,
    ink,
    is_held_out,
    lean,
)


def bar(shear, width=3.0, size=16):
    """Return a bar ``(1, 1, size, size)`` whose top is ``shear`` pixels per row right of its middle."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    middle = (size - 1) / 2
    distance = (x - middle - shear * (middle - y)).abs()
    inside = (width / 2 + 0.5 - distance).clamp(0, 1) * ((y > 2) & (y < size - 3))
    return 2 * inside[None, None] - 1


def train(seed=0):
    torch.manual_seed(99)  # what was drawn before does not matter
    images, labels, *_ = split(*digits(text_to_image_gan.SIZE))
    tokenizer = Tokenizer([caption(row) for row in EVERY])
    tokens = tokenizer([caption(row) for row in Attributes(images, labels)(images, labels)])
    trainings = text_to_image_gan.train([images, tokens], len(tokenizer), 3, seed)
    return {
        name: (training.losses, training.sample(4, tokens[:4]))
        for name, training in trainings.items()
    }


def test_it_writes_pictures_and_a_report_with_accuracies(tmp_path):
    run("text_to_image_gan", tmp_path, "--steps", "3")
    for name in ("samples", "styles", "held_out"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    shares, same = tables(tmp_path / "report.md")
    rows = {row[0]: row[1:] for row in shares + same}
    assert rows["chance"] == ["10.0%", "33.3%", "33.3%", "1.1%"]
    digit, weight, slant, all_three = (float(cell[:-1]) for cell in rows["real test images"])
    assert digit > 95 and weight == slant == 100 and all_three == digit
    for norm in ("stock", "fused"):
        for captions in ("trained", "held-out"):
            shares = [float(cell[:-1]) for cell in rows[f"{norm}, {captions} captions"]]
            assert 0 <= shares[3] <= min(shares[:3]) and max(shares) < 60
    assert float(rows["largest difference of losses, whole run"][2]) < 1e-4


def test_a_sheared_bar_leans_and_a_wide_one_has_more_ink():
    assert lean(bar(0.0)).item() == pytest.approx(0, abs=1e-5)
    for shear in (-0.4, 0.3):
        assert lean(bar(shear)).item() == pytest.approx(shear, rel=0.05)
    assert lean(bar(0.3, width=5.0)).item() == pytest.approx(0.3, rel=0.05)
    assert ink(bar(0.0, width=4.0)) == pytest.approx(2 * ink(bar(0.0, width=2.0)), rel=1e-4)
    assert ink(torch.ones(1, 1, 16, 16)).item() == 1 and ink(-torch.ones(1, 1, 16, 16)).item() == 0


def test_an_image_without_ink_has_a_finite_lean():
    assert lean(-torch.ones(1, 1, 16, 16)).isfinite().all()


def test_attributes_are_thirds_of_the_scans_of_each_digit():
    shears, widths = torch.linspace(-0.3, 0.5, 9), (2.0, 3.0, 5.0)
    bars = torch.cat([bar(shear.item(), width) for width in widths for shear in shears])
    images, labels = torch.cat([bars] * 10), torch.arange(10).repeat_interleave(27)
    images[labels == 1] = images[labels == 1].flip(3)  # what is relative to the digit stays so
    found = Attributes(images, labels)(images, labels)
    assert torch.equal(found[:, 0], labels)
    of_three = found[labels == 3]
    assert of_three[:, 1].tolist() == [0] * 9 + [1] * 9 + [2] * 9
    assert of_three[:9, 2].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found[labels == 1][:9, 2].tolist() == [2, 2, 2, 1, 1, 1, 0, 0, 0]


def test_captions_differ_and_tokens_keep_their_words():
    captions = [caption(row) for row in EVERY]
    assert len(set(captions)) == len(captions) == 90
    assert caption(torch.tensor([3, 2, 0])) == "a bold three, leaning left"
    tokenizer = Tokenizer(captions)
    tokens = tokenizer(["a bold three, leaning left", "a thin one, upright"])
    assert tokens.shape == (2, 6) and (tokens == 0).nonzero().tolist() == [[1, 5]]
    assert tokens.max() < len(tokenizer)
    back = {number: word for word, number in tokenizer.numbers.items()}
    assert [back[n] for n in tokens[0].tolist()] == ["a", "bold", "three", ",", "leaning", "left"]
    assert len(tokenizer(captions).unique(dim=0)) == 90


def test_one_style_of_each_digit_is_held_out():
    held = EVERY[is_held_out(EVERY)]
    assert held[:, 0].tolist() == list(range(10))
    assert len(held[:, 1:].unique(dim=0)) == 9  # all styles, and the first one twice


def test_accuracy_counts_each_attribute_and_all_of_them():
    images, labels, *_ = split(*digits(16))
    measured = Attributes(images, labels)
    wanted = measured(images, labels)
    wanted[::2, 1] = (wanted[::2, 1] + 1) % 3
    wanted[::3, 2] = (wanted[::3, 2] + 1) % 3

    classifier = train_classifier(images, labels, steps=300)
    shares = accuracy(images, wanted, measured, classifier)
    assert shares.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 3], abs=0.01)
    wanted[:, 0] = (wanted[:, 0] + 1) % 10
    shares = accuracy(images, wanted, measured, classifier)
    assert shares[0] < 0.01 and shares[3] < 0.01


def test_every_layer_of_the_discriminator_is_normalized_and_it_hears_the_caption():
    discriminator = Discriminator(20)
    layers = [m for m in discriminator.modules() if not list(m.children()) and list(m.parameters())]
    assert not layers  # parameters are in parametrized modules alone, and in their lists
    normalized = [m for m in discriminator.modules() if parametrize.is_parametrized(m)]
    kinds = [type(m).__name__ for m in normalized]
    assert kinds == ["ParametrizedConv2d"] * 5 + ["ParametrizedLinear", "ParametrizedEmbedding"]
    images, tokens = torch.randn(2, 1, 16, 16), torch.tensor([[1, 2, 0], [1, 2, 0]])
    discriminator.eval()
    same, other = discriminator(images, tokens), discriminator(images, tokens + 3 * (tokens > 0))
    assert torch.equal(discriminator(images, tokens[:, :2]), same)  # 0 fills up and says nothing
    assert (same - other).abs().min() > 0


def test_fused_gives_the_losses_of_stock_and_a_run_repeats_from_its_seed():
    first, second, other = train(), train(), train(seed=1)
    assert first["fused"][0] == pytest.approx(first["stock"][0], abs=1e-4)
    for name in ("stock", "fused"):
        assert first[name][0] == second[name][0] != other[name][0]
        assert torch.equal(first[name][1], second[name][1])
