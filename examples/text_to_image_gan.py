"""Generate images from captions such as "a bold three, leaning left", stock and fused from one seed.

    python examples/text_to_image_gan.py [--steps N] [--threads T] [--out FOLDER]

Captions of handwritten digits are made from what is measured in the scans. A generator learns to draw what
a caption says; the projection discriminator (Miyato and Koyama, 2018) has spectral norm on all layers, the
embedding of the words included. One style of each digit is held out of the training. Written to the folder:
``samples.png``, ``styles.png``, ``held_out.png`` and ``report.md``.
"""

import re
from collections.abc import Sequence

import torch
from digits import digits, split
from gan import CHAOS, COMPARED, LATENT, Training, compare, tile
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from quality import Classifier, train_classifier
from report import Report, argument_parser
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import spectral_ext

SIZE = 16
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "regular", "bold")
LEANS = ("leaning left", "upright", "leaning right")
Images = dict[str, Tensor]  # by their captions
EVERY = torch.cartesian_prod(*(torch.arange(len(words)) for words in (DIGITS, WEIGHTS, LEANS)))
EACH = 25
SHOWN = 8
ABOUT = """\
A GAN learns to draw digits from captions. A caption names the digit, its weight (thin, regular, bold: thirds
of the digit's scans by their ink) and its lean (left, upright, right: thirds by the shear of the ink). That
is nine styles of ten digits; one style of each digit is held out of the training.
"""
NOTES = f"""\
Shares of images that show what their captions say; {EACH} images are generated for each caption. The digit
is found by a classifier that was trained on real digits. Weight and lean are measured as they were for the
captions, so real images have them right by construction. Held-out captions show whether words that were
learnt apart are understood together.
"""


def ink(images: Tensor) -> Tensor:
    """Return the share of ink in each image, from 0 to 1: how heavy its strokes are."""
    return (images.mean((1, 2, 3)) + 1) / 2


def lean(images: Tensor) -> Tensor:
    """Return how far the ink of each image moves right per unit of height, ``cov(x, y) / var(y)``."""
    mass = (images[:, 0] + 1) / 2
    mass = mass / mass.sum((1, 2), keepdim=True).clamp(min=1e-6)
    y, x = torch.meshgrid(
        *(torch.arange(n, dtype=mass.dtype) for n in mass.shape[1:]), indexing="ij"
    )
    x = x - (mass * x).sum((1, 2), keepdim=True)
    y = (mass * y).sum((1, 2), keepdim=True) - y  # upwards
    return (mass * x * y).sum((1, 2)) / (mass * y * y).sum((1, 2)).clamp(min=1e-6)


class Attributes:
    """What captions say: digit, weight and lean, each a number that counts from 0.

    Weight and lean are relative to the digit, since every seven leans: one third of the scans of each
    digit is thin, and one third is bold.

    Args:
        images: Scans from which the thresholds are taken.
        labels: The digits that they show.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        thirds = torch.tensor([1 / 3, 2 / 3])
        self.thresholds = torch.stack(
            [
                torch.stack(
                    [measure(images[labels == digit]).quantile(thirds) for digit in range(10)]
                )
                for measure in (ink, lean)
            ]
        )

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the attributes ``(n, 3)`` of images that show these digits."""
        weight, slant = (
            (measure(images)[:, None] > threshold[labels]).sum(1)
            for measure, threshold in zip((ink, lean), self.thresholds, strict=True)
        )
        return torch.stack([labels, weight, slant], 1)


def is_held_out(attributes: Tensor) -> Tensor:
    """Return which rows have the one style of their digit that is not trained with."""
    digit, weight, slant = attributes.T
    return 3 * weight + slant == digit % 9


def caption(attributes: Tensor) -> str:
    """Return the caption of an image with these three attributes."""
    digit, weight, slant = attributes.tolist()
    return f"a {WEIGHTS[weight]} {DIGITS[digit]}, {LEANS[slant]}"


class Tokenizer:
    """Numbers the words and commas of captions, from 1 on; 0 fills up shorter captions."""

    def __init__(self, captions: Sequence[str]) -> None:
        words = {word for text in captions for word in self.words(text)}
        self.numbers = {word: i for i, word in enumerate(sorted(words), 1)}

    def __len__(self) -> int:
        return len(self.numbers) + 1

    @staticmethod
    def words(text: str) -> list[str]:
        """Split a caption."""
        return re.findall(r"\w+|,", text.lower())

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return the words' numbers, ``(n, length of the longest)``."""
        rows = [torch.tensor([self.numbers[w] for w in self.words(text)]) for text in captions]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


class Generator(nn.Module):
    """Draws images in [−1, 1] from noise and a caption: the embeddings of its words, summed."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 32, padding_idx=0)
        self.layers = nn.Sequential(
            nn.Linear(LATENT + 32, 64 * 16, bias=False), nn.Unflatten(1, (64, 4, 4)),
            nn.BatchNorm2d(64), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False),
            nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 3, 1, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor, tokens: Tensor) -> Tensor:
        """Return an image for each row of ``noise`` and of ``tokens``."""
        return self.layers(torch.cat([noise, self.embedding(tokens).sum(1)], 1))


class Discriminator(nn.Module):
    """A projection discriminator, ``ψ(φ(x)) + Σ ⟨e(word), φ(x)⟩``, with stock spectral norm on all layers.

    The sum is over the words of the caption: each adds its part to the log-odds that such an image is real.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = ((1, 16, 3, 1), (16, 32, 4, 2), (32, 32, 3, 1), (32, 64, 4, 2), (64, 64, 3, 1))
        for before, after, kernel, stride in sizes:
            conv = nn.Conv2d(before, after, kernel, stride, 1)
            layers += [spectral_norm(conv), nn.LeakyReLU(0.1)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.score = spectral_norm(nn.Linear(64 * 16, 1))
        self.embedding = spectral_norm(nn.Embedding(words, 64 * 16, padding_idx=0))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return how real each image looks as one of its caption, ``(n, 1)``."""
        features = self.features(images)
        wanted = self.embedding(tokens).sum(1)
        return self.score(features) + (wanted * features).sum(1, keepdim=True)


def train(real: Sequence[Tensor], words: int, steps: int, seed: int = 0) -> dict[str, Training]:
    """Train with stock and with fused spectral norm from one seed, in turns."""
    trainings = {}
    for name in ("stock", "fused"):
        torch.manual_seed(seed)
        generator, discriminator = Generator(words), Discriminator(words)
        if name == "fused":
            spectral_ext.fuse(discriminator)
        trainings[name] = Training(generator, discriminator, real, seed)
    for _ in track(range(steps), "stock and fused"):
        for training in trainings.values():
            training.step()
    return trainings


def accuracy(
    images: Tensor, wanted: Tensor, measured: Attributes, classifier: Classifier
) -> Tensor:
    """Return the shares of images with the wanted digit, weight and lean, and with all three."""
    found = measured(images, wanted[:, 0])
    found[:, 0] = classifier.classify(images)
    right = found == wanted
    return torch.cat([right, right.all(1, keepdim=True)], 1).double().mean(0)


def draw(captions: Tensor, generated: Images, real: Images, columns: int) -> Figure:
    """Draw under each caption a row of generated images, and one of what there is of real ones."""
    rows = len(captions) // columns
    figure = plt.figure(figsize=(4.8 * columns, 1.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns).flat
    for axis, row in zip(axes, captions, strict=True):
        text = caption(row)
        white = torch.full((SHOWN, 1, SIZE, SIZE), -1.0)
        both = torch.cat([generated[text][:SHOWN], torch.cat([real[text], white])[:SHOWN]])
        axis.imshow(tile(both, SHOWN), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_title(text + ", held out" * bool(is_held_out(row[None])), fontsize=11)
        axis.set(
            xticks=[], yticks=[SIZE // 2, SIZE + 2 + SIZE // 2], yticklabels=["generated", "real"]
        )
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def rows_of(
    images: dict[str, Tensor], wanted: Tensor, measured: Attributes, classifier: Classifier
) -> list[list[str]]:
    """Return a row of accuracies for each training: with captions of the training, then with others."""
    held = is_held_out(wanted)
    rows = []
    for name, chosen in (("trained captions", ~held), ("held-out captions", held)):
        for norm, generated in images.items():
            shares = accuracy(generated[chosen], wanted[chosen], measured, classifier)
            rows.append([f"{norm}, {name}", *percent(shares)])
    return rows


def percent(shares: Tensor) -> list[str]:
    """Write shares as percentages."""
    return [f"{share:.1%}" for share in shares.tolist()]


def add_pictures(report: Report, generated: Images, real: Images) -> None:
    """Add the pictures of some captions, given the images of each."""
    digit, weight, slant = EVERY.T
    pictures = {
        "samples": (3 * weight + slant == (digit + 4) % 9, 2, "One trained style of each digit."),
        "styles": (digit == 3, 3, "All styles of one digit."),
        "held_out": (is_held_out(EVERY), 2, "The captions that were held out."),
    }
    for name, (chosen, columns, text) in pictures.items():
        figure = draw(EVERY[chosen], generated, real, columns)
        report.picture(
            figure, name, f"{text} Of the fused training, none chosen; and real test images."
        )


def main() -> None:
    """Train both GANs and write what they gave."""
    arguments = argument_parser(__doc__, "text_to_image_gan", steps=6000).parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report(f"Digits from captions, {arguments.steps} steps", arguments.out)
    report.text(ABOUT)
    images, labels, test, test_labels = split(*digits(SIZE))
    classifier, measured = train_classifier(images, labels), Attributes(images, labels)
    tokenizer = Tokenizer([caption(row) for row in EVERY])
    shown = measured(images, labels)
    seen = ~is_held_out(shown)
    real = images[seen], tokenizer([caption(row) for row in shown[seen]])
    trainings = train(real, len(tokenizer), arguments.steps)

    wanted, test_shown = EVERY.repeat_interleave(EACH, 0), measured(test, test_labels)
    tokens = tokenizer([caption(row) for row in wanted])
    generated = {name: training.sample(len(wanted), tokens) for name, training in trainings.items()}
    rows = [
        ["chance", *percent(torch.tensor([1 / 10, 1 / 3, 1 / 3, 1 / 90]))],
        ["real test images", *percent(accuracy(test, test_shown, measured, classifier))],
        *rows_of(generated, wanted, measured, classifier),
    ]
    report.table(("", "digit", "weight", "lean", "all three"), rows)
    report.text(NOTES)
    of_captions = (
        {caption(row): part[(attributes == row).all(1)] for row in EVERY}
        for part, attributes in ((generated["fused"], wanted), (test, test_shown))
    )
    add_pictures(report, *of_captions)
    report.table(
        COMPARED, compare(trainings["stock"], trainings["fused"]), "Stock and fused from one seed."
    )
    report.text(CHAOS)
    report.write()


if __name__ == "__main__":
    main()
