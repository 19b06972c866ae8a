"""Train classifiers of digits whose answers provably stay the same near an image, and attack them.

    python examples/robust_classifier.py [--steps N] [--attack-steps N] [--out FOLDER]

If no layer moves two inputs further apart than its norm, the network is L-Lipschitz with L the product of
the norms. A spectral norm on each layer and MaxMin as activation (Anil et al., 2019) give L about 1. The
difference of two logits is then √2·L-Lipschitz (``‖eᵢ − eⱼ‖ = √2``), so the answer is the same for all images
at a distance below ``margin / (√2 L)`` (Tsuzuku et al., 2018). Power iteration finds norms from below; the
certificate takes upper bounds from ``spectral_ext.spectrum``. Three networks of one size are trained, one
without norms, and attacked by projected gradients. Written: ``radius.png``, ``attacked.png``, ``report.md``.
"""

import math
from collections.abc import Iterator

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from digits import digits, split
from matplotlib.figure import Figure
from report import Report, argument_parser
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as stock_spectral_norm
from turns import Comparison, compare

import spectral_ext
from spectral_ext.nn.operator_norm import convolution_of
from spectral_ext.spectrum import certified_matrix_norm, certified_operator_norm

BATCH = 64
TEMPERATURE = 0.3
RESTARTS = 3
# An attack that wins at a share of the certified radius would refute the certificate.
MULTIPLES = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
KINDS = ("operator norm", "matrix norm", "no norm")
COLORS = dict(zip(KINDS, ("#2a6fb0", "#4a9d77", "#d98c5f"), strict=True))
NOTES = f"""\
Distances are Euclidean, of 64 pixels in [−1, 1]. *Operator norm*: convolutions are divided by their own norm;
*matrix norm*: by that of the unrolled kernel, as in stock, so that L counts what overlapping windows add.

- L: product of certified upper bounds of the layers' norms; MaxMin and a reshaping have norm 1.
- certified: correct, and the certified radius is at least the one named.
- attacked: correct after projected gradient descent within the radius named, best of {RESTARTS} starts,
  in float64 and beyond the range of the pixels, too. It is no proof: the true share may be smaller.
"""


class MaxMin(nn.Module):
    """GroupSort of pairs of channels: a permutation for each input, so it keeps norms and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger ones of the pairs, then the smaller ones."""
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


def classifier(kind: str, fused: bool = True) -> nn.Sequential:
    """Return a network for 8×8 images; ``fused=False`` normalizes with stock's, layer by layer."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        MaxMin(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        MaxMin(),
        nn.Flatten(),
        nn.Linear(64 * 16, 256),
        MaxMin(),
        nn.Linear(256, 10),
    )
    if kind == "operator norm":
        for place, input_size in ((0, 8), (2, 8)):
            spectral_ext.spectral_norm(model[place], norm="operator", input_size=input_size)
    if kind != "no norm" and fused:
        spectral_ext.apply_spectral_norm(model)  # the layers that have none yet
        spectral_ext.fuse(model)
    elif kind != "no norm":
        for layer in model:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                stock_spectral_norm(layer)
    return model


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Iterator[float]:
    """Train for large margins; gives the loss after each step.

    A 1-Lipschitz network cannot raise its logits at will: the temperature says what margin is enough.
    """
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[chosen]) / TEMPERATURE, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


def lipschitz_bound(model: nn.Sequential, size: int = 8) -> float:
    """Return a certified upper bound of the Lipschitz constant of a network in evaluation."""
    bound, x = 1.0, torch.zeros(1, 1, size, size, dtype=torch.float64)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                convolution = convolution_of(layer, x.shape[2:])
                bound *= certified_operator_norm(layer.weight, convolution).item()
            elif isinstance(layer, nn.Linear):
                bound *= certified_matrix_norm(layer.weight).item()
            elif not isinstance(layer, (MaxMin, nn.Flatten)):
                raise TypeError(f"the norm of {type(layer).__name__} is not known")
            x = layer(x)
    return bound


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the logit of the right class exceeds the best of the others."""
    right = F.one_hot(labels, logits.shape[-1]).bool()
    return logits[right] - logits.masked_fill(right, -math.inf).amax(-1)


def certified_radius(model: nn.Module, images: Tensor, labels: Tensor, bound: float) -> Tensor:
    """Return the distance below which every image has the right class; 0 for a wrong answer."""
    with torch.no_grad():
        return margins(model(images), labels).clamp(min=0) / (math.sqrt(2) * bound)


def attack(
    model: nn.Module, images: Tensor, labels: Tensor, radius: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Look within a radius of each image for one that is classified otherwise (Madry et al., 2018).

    Returns:
        For each image the one with the smallest margin that was found, and that margin.
    """
    found, least = images, margins(model(images).detach(), labels)
    radius = radius.view(-1, 1, 1, 1)
    for _ in range(RESTARTS):
        change = torch.randn_like(images)
        for step in range(steps + 1):
            length = change.flatten(1).norm(dim=1).view_as(radius)
            change = (change * (radius / length).clamp(max=1)).requires_grad_()
            margin = margins(model(images + change), labels)
            better = margin < least
            least = torch.where(better, margin.detach(), least)
            found = torch.where(better.view_as(radius), (images + change).detach(), found)
            (grad,) = torch.autograd.grad(margin.sum(), change)
            direction = F.normalize(grad.flatten(1), dim=1).view_as(images)
            change = change.detach() - radius * max(0.5 * (1 - step / steps), 0.05) * direction
    return found, least


class Examination:
    """What the certificate says of a network, and what the attack finds."""

    def __init__(self, model: nn.Sequential, images: Tensor, labels: Tensor) -> None:
        self.model = model.eval().double()
        self.images, self.labels = images.double(), labels
        self.bound = lipschitz_bound(self.model)
        self.radius = certified_radius(self.model, self.images, labels, self.bound)
        self.attacked: dict[float, Tensor] = {}

    def certified(self, radius: float) -> float:
        """Return the share of images that are certified for a radius."""
        return ((self.radius > 0) & (self.radius >= radius)).double().mean().item()

    def attack_within(self, radius: float, steps: int) -> float:
        """Return the share of images that stay correct within a radius."""
        radii = torch.full_like(self.radius, radius)
        self.attacked[radius], least = attack(self.model, self.images, self.labels, radii, steps)
        return (least > 0).double().mean().item()

    def falls(self, multiple: float, steps: int) -> int:
        """Return how many certified images fall within a multiple of their own certified radii."""
        is_certified = self.radius > 0
        images, labels = self.images[is_certified], self.labels[is_certified]
        radii = multiple * self.radius[is_certified]
        _, least = attack(self.model, images, labels, radii, steps)
        return int((least <= 0).sum())


def draw_radius(examined: dict[str, Examination], attacked: dict[str, list[float]]) -> Figure:
    """Draw what is certified and what the attack leaves, over the radius."""
    figure, axis = plt.subplots(figsize=(8.5, 5), layout="constrained")
    for kind, examination in examined.items():
        if kind != "no norm":
            radii = torch.linspace(0, RADII[-1], 201).tolist()
            shares = [examination.certified(radius) for radius in radii]
            axis.plot(radii, shares, color=COLORS[kind], label=f"{kind}: certified")
        axis.plot(RADII, attacked[kind], "o--", color=COLORS[kind], label=f"{kind}: attacked")
    axis.set(xlabel="radius", ylabel="share of test images that are correct", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def draw_attacked(examined: dict[str, Examination], radius: float, count: int = 12) -> Figure:
    """Draw images, and what the attack within a radius made of them, with the answers."""
    any_of_them = examined["no norm"]
    rows = {"images": any_of_them.images} | {
        kind: examination.attacked[radius] for kind, examination in examined.items()
    }
    figure, axes = plt.subplots(len(rows), count, figsize=(count, 5.2), layout="constrained")
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        with torch.no_grad():
            answers = examined.get(name, any_of_them).model(images[:count]).argmax(1)
        right = answers == any_of_them.labels[:count]
        for axis, image, answer, is_right in zip(line, images, answers, right, strict=False):
            axis.imshow(image[0], cmap="gray_r", vmin=-1, vmax=1)
            color = "k" if is_right else "#c0392b"
            axis.set_title(answer.item(), color=color, fontweight="normal" if is_right else "bold")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    return figure


def compare_with_stock(images: Tensor, labels: Tensor, steps: int) -> Comparison:
    """Train the network of matrix norms with stock's and fused, in turns from one seed."""
    trainings = {}
    for name, fused in (("stock", False), ("fused", True)):
        torch.manual_seed(0)
        model = classifier("matrix norm", fused)
        trainings[name] = train(model.to(images.dtype), images, labels, steps)
    return compare(steps, **trainings)


def accuracy_rows(
    examined: dict[str, Examination], attacked: dict[str, list[float]]
) -> list[list[str]]:
    """Return what is certified and attacked for each network, over the radius."""
    rows = []
    for kind, examination in examined.items():
        shares = [examination.certified(radius) for radius in RADII]
        bound = f"{examination.bound:.4g}"
        rows.append([kind, bound, "certified", *(f"{share:.1%}" for share in shares)])
        rows.append([kind, bound, "attacked", *(f"{share:.1%}" for share in attacked[kind])])
    return rows


def main() -> None:
    """Train, certify, attack, and write the report."""
    parser = argument_parser(
        __doc__, "robust_classifier", steps=1500, attack_steps=25, test=200, compared_steps=200
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("Classifiers of digits with certified radii, under attack", arguments.out)
    images, labels, test, test_labels = split(*digits())
    test, test_labels = test[: arguments.test], test_labels[: arguments.test]
    examined: dict[str, Examination] = {}
    attacked: dict[str, list[float]] = {}
    falls = []
    with Progress() as progress:
        for kind in KINDS:
            torch.manual_seed(0)
            model = classifier(kind)
            training = train(model, images, labels, arguments.steps)
            for _ in progress.track(training, total=arguments.steps, description=f"train, {kind}"):
                pass
            examined[kind] = examination = Examination(model, test, test_labels)
            steps, name = arguments.attack_steps, f"attack, {kind}"
            attacked[kind] = [
                examination.attack_within(r, steps) for r in progress.track(RADII, description=name)
            ]
            counts = [
                examination.falls(multiple, steps)
                for multiple in progress.track(MULTIPLES, description=f"certificates, {kind}")
            ]
            falls.append([kind, str(int((examination.radius > 0).sum())), *map(str, counts)])
    report.text(NOTES)
    columns = ["", "L", "radius", *(f"{radius:g}" for radius in RADII)]
    report.table(columns, accuracy_rows(examined, attacked))
    caption = (
        "Share of the test images that are certified (lines) and that withstand the attack (dots)"
    )
    report.picture(draw_radius(examined, attacked), "radius", caption)
    report.table(
        ["", "certified images", *(f"{multiple:g}×" for multiple in MULTIPLES)],
        falls,
        "How many certified images fall to the attack within so many times their own certified radius; at "
        "1× any fall would refute the certificate, and the falls beyond show that the attack has teeth:",
    )
    caption = (
        "Images, and what the attack makes of them within a distance of 1; wrong answers are red"
    )
    report.picture(draw_attacked(examined, 1.0), "attacked", caption)
    compare_with_stock(images, labels, arguments.compared_steps).add_to(report)
    report.write()


if __name__ == "__main__":
    main()
