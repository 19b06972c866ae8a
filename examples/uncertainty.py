"""Classify digits and know what is no known digit: a Gaussian process on features with bounded weights.

    python examples/uncertainty.py [--steps N] [--seeds K] [--out FOLDER]

SNGP (Liu et al., 2020): the output layer is a Gaussian process, which is unsure far from the features that
it was trained with. For that to help, features must be as far apart as inputs are. A residual layer
``x + relu(Wx)`` changes distances by factors of ``1 ± ‖W‖``, and the soft bound ``W / max(1, σ/c)`` keeps
``‖W‖ ≤ c < 1``; a weight of a smaller norm is left alone. The network is trained with and without the bound
on eight of the ten digits, and asked about the other two, changed scans and photographs; and on two moons,
where what it knows can be drawn. Written: ``moons.png``, ``unknown.png`` and ``report.md``.
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
from sklearn.datasets import load_sample_images, make_moons
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import register_parametrization
from turns import Comparison, compare

import spectral_ext

BOUND = 0.9
WIDTH, DEPTH, FOURIER, BATCH = 128, 12, 512, 64
# With and without the bound, for two length scales of the kernel.
KINDS = {
    "no bound, ℓ = 2": (None, 2.0),
    "soft bound, ℓ = 2": (BOUND, 2.0),
    "no bound, ℓ = 6": (None, 6.0),
    "soft bound, ℓ = 6": (BOUND, 6.0),
}
COLORS = ("#d98c5f", "#2a6fb0", "#f0c9b0", "#9cc3e6")
NOTES = f"""\
The same residual network of {DEPTH} layers with a Gaussian process as its output layer, its weights free or
within the soft bound of {BOUND}, for two length scales ℓ of the kernel. Seed `k` holds out the digits `2k`
and `2k + 1` (modulo 10). Mean ± standard deviation over the seeds; differences are taken seed by seed.

- accuracy, NLL (nats), ECE (15 bins): of the test scans of the eight digits that were trained.
- the next five: AUROC of one minus the largest probability as a detector, test scans of known digits
  against: the two digits held out, known digits rotated by 90°, inverted, with normal noise (standard
  deviation half of the range from grey to black) and 8×8 patches of scikit-learn's two photographs. 1 is
  perfect, 0.5 is chance.
- largest σ: of any weight of the features in use, exact.

Depth, width, bound and length scales were tried out on these same scans: the values flatter all columns, and
only their differences say something.
"""


class Residual(nn.Module):
    """``x + relu(Wx + b)``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        return x + F.relu(self.linear(x))


class GaussianProcess(nn.Module):
    """A Gaussian process of the RBF kernel, by random Fourier features.

    ``φ(h) = √(2/D) cos(Ah/ℓ + b)`` with fixed normal ``A`` and uniform ``b``, so that ``φ(h)ᵀφ(h')`` is about
    ``exp(−‖h − h'‖²/2ℓ²)`` (Rahimi and Recht, 2007). The logits are ``Bφ``. The covariance of a row of ``B``
    is ``Σ = (I + Σᵢ φᵢφᵢᵀ)⁻¹`` over the training set, that of a Gaussian likelihood. Laplace's approximation
    for a softmax would weigh the terms by ``p(1 − p)``, which is 0 wherever the training set is fitted well.
    """

    def __init__(self, classes: int, length_scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(FOURIER, classes, bias=False)
        self.register_buffer("a", torch.randn(WIDTH, FOURIER) / length_scale)
        self.register_buffer("b", 2 * math.pi * torch.rand(FOURIER))
        self.register_buffer("covariance", torch.eye(FOURIER))

    def fourier(self, h: Tensor) -> Tensor:
        """Return φ of features."""
        return math.sqrt(2 / FOURIER) * torch.cos(h @ self.a + self.b)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, with which ``B`` and the features are trained."""
        return self.linear(self.fourier(h))

    def fit_covariance(self, h: Tensor) -> None:
        """Compute Σ from the features of the training set, after the training."""
        phi = self.fourier(h).double()
        precision = torch.eye(FOURIER, dtype=torch.float64) + phi.T @ phi
        self.covariance = torch.linalg.inv(precision).float()

    def variance(self, h: Tensor) -> Tensor:
        """Return ``φᵀΣφ``, the variance of a logit: about 1 far from the training set."""
        phi = self.fourier(h)
        return torch.einsum("nd,de,ne->n", phi, self.covariance, phi)


class SoftBound(_SpectralNorm):
    """``W / max(1, σ/c)`` in plain torch, on top of stock's ``W/σ``: what ``bound=c`` is compared with."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight in use."""
        unit = super().forward(weight)
        return torch.where(weight.norm() > BOUND * unit.norm(), BOUND * unit, weight)


class SNGP(nn.Module):
    """Residual features and a Gaussian process."""

    def __init__(self, inputs: int, classes: int, length_scale: float, bound: float | None) -> None:
        super().__init__()
        layers = [Residual() for _ in range(DEPTH)]
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(inputs, WIDTH), *layers)
        self.process = GaussianProcess(classes, length_scale)
        if bound is not None:
            spectral_ext.apply_spectral_norm(self.features, bound=bound)
            spectral_ext.fuse(self.features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.process(self.features(x))

    @torch.no_grad()
    def fit_covariance(self, x: Tensor) -> None:
        """End the training."""
        self.eval()
        self.process.fit_covariance(self.features(x))

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and variances.

        Of a logit with mean m and variance s², the mean of a softmax is about that of ``m/√(1 + πs²/8)``
        (MacKay, 1992): where the process is unsure, the classes become equally probable.
        """
        h = self.features(x)
        variance = self.process.variance(h)
        logits = self.process(h) / (1 + math.pi / 8 * variance).sqrt()[:, None]
        return logits.softmax(1), variance


def bounded_in_plain_torch() -> SNGP:
    """Return the network for digits with a soft bound for each layer by itself."""
    model = SNGP(64, 8, 2.0, None)
    for layer in model.features.modules():
        if isinstance(layer, nn.Linear):
            register_parametrization(layer, "weight", SoftBound(layer.weight))
    return model


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Iterator[float]:
    """Train; gives the loss after each step."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,))
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Return how often an unknown input has the larger uncertainty than a known one."""
    return roc_auc_score([0] * len(known) + [1] * len(unknown), torch.cat([known, unknown]))


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return ECE: ``|accuracy − confidence|`` in each bin of confidence, weighted by its share."""
    confidence, found = probabilities.max(1)
    gap = (found == labels).float() - confidence
    of_bin = torch.zeros(bins).index_add(0, (confidence * bins).long().clamp(max=bins - 1), gap)
    return (of_bin.abs().sum() / len(labels)).item()


def photographs() -> Tensor:
    """Return patches of the photographs that scikit-learn ships, like scans: ``(n, 1, 8, 8)``."""
    photos = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    grey = F.avg_pool2d(photos.float().mean(3)[:, None], 4) / 127.5 - 1
    return grey.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 1, 8, 8)


class Task:
    """Eight digits to know, and what is unknown; which two are held out depends on the seed."""

    def __init__(self, seed: int) -> None:
        images, labels, test, test_labels = split(*digits())
        held = torch.tensor([2 * seed % 10, (2 * seed + 1) % 10])
        classes = torch.tensor([digit for digit in range(10) if digit not in held])
        is_known, is_test = torch.isin(labels, classes), torch.isin(test_labels, classes)
        self.train = images[is_known], torch.searchsorted(classes, labels[is_known])
        self.test = test[is_test], torch.searchsorted(classes, test_labels[is_test])
        known = self.test[0]
        noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(seed)) / 2
        self.unknown = {
            "held out": test[~is_test],
            "rotated": known.rot90(1, (2, 3)),
            "inverted": -known,
            "noisy": (known + noise).clamp(-1, 1),
            "photographs": photographs(),
        }

    def measure(self, model: SNGP) -> dict[str, float]:
        """Return all columns of the table."""
        images, labels = self.test
        probabilities, _ = model.predict(images)
        found = {
            "accuracy": (probabilities.argmax(1) == labels).float().mean().item(),
            "NLL": F.nll_loss(probabilities.log(), labels).item(),
            "ECE": calibration_error(probabilities, labels),
        }
        known = 1 - probabilities.amax(1)
        for name, others in self.unknown.items():
            found[name] = auroc(known, 1 - model.predict(others)[0].amax(1))
        sigmas = spectral_ext.singular_values(model.features, normalized=True)
        return found | {"largest σ": max(sigma.item() for sigma in sigmas.values())}


def rows_of(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Return a row for each measure: without and with the bound, and the difference seed by seed."""
    rows = []
    for measure in next(iter(found.values()))[0]:
        cells = []
        for scale in ("ℓ = 2", "ℓ = 6"):
            free, bounded = (
                torch.tensor([seed[measure] for seed in found[f"{bound}, {scale}"]])
                for bound in ("no bound", "soft bound")
            )
            cells += [
                f"{values.mean():.3f} ± {values.std(correction=0):.3f}"
                for values in (free, bounded, bounded - free)
            ]
        rows.append([measure, *cells])
    return rows


def draw_unknown(task: Task, found: dict[str, list[dict[str, float]]]) -> Figure:
    """Draw some of each kind of input, and how well it is detected: a point for each seed."""
    figure = plt.figure(figsize=(11, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 3))
    shown = {"known": task.test[0]} | task.unknown
    for axis, (name, images) in zip(top.subplots(1, len(shown)), shown.items(), strict=True):
        tiles = F.pad(images[:: len(images) // 9][:9, 0], (1, 1, 1, 1), value=1).view(3, 3, 10, 10)
        axis.imshow(tiles.permute(0, 2, 1, 3).reshape(30, 30), cmap="gray_r", vmin=-1, vmax=1)
        axis.set(title=name, xticks=[], yticks=[])
    axis = bottom.subplots()
    for i, ((kind, seeds), color) in enumerate(zip(found.items(), COLORS, strict=True)):
        at = torch.arange(len(task.unknown)) + (i - 1.5) * 0.17
        values = torch.tensor([[seed[name] for name in task.unknown] for seed in seeds])
        axis.plot(at, values.T, "o", color=color, ms=5, alpha=0.8)
        axis.plot(at, values.mean(0), "_", color="k", ms=16)
        axis.plot([], [], "o", color=color, label=kind)
    axis.set(ylabel="AUROC (1 is perfect)", xticks=range(len(task.unknown)))
    axis.set_xticklabels(task.unknown)
    axis.grid(axis="y", alpha=0.3)
    bottom.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_moons(steps: int, progress: Progress) -> Figure:
    """Train on two moons, and draw the uncertainty around them."""
    points, moons = (torch.tensor(part) for part in make_moons(500, noise=0.1, random_state=0))
    points = ((points - points.mean(0)) / points.std(0)).float()
    side = torch.linspace(-4, 4, 101)
    grid = torch.cartesian_prod(side, side)
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.8), layout="constrained", sharey=True)
    for column, (kind, (bound, length_scale)) in enumerate(KINDS.items()):
        torch.manual_seed(0)
        model = SNGP(2, 2, length_scale, bound)
        training = train(model, points, moons, steps)
        for _ in progress.track(training, total=steps, description=f"two moons, {kind}"):
            pass
        model.fit_covariance(points)
        probabilities, variance = model.predict(grid)
        surfaces = {"variance": variance, "1 − largest probability": 1 - probabilities.amax(1)}
        for axis, (name, surface) in zip(axes[:, column], surfaces.items(), strict=True):
            limit = 1.0 if name == "variance" else 0.5
            image = surface.view(101, 101).T.clamp(0, limit)
            drawn = axis.pcolormesh(side, side, image, cmap="viridis", vmin=0, vmax=limit)
            axis.scatter(*points.T, c=moons, cmap="coolwarm", s=3)
            axis.set(title=kind if axis is axes[0, column] else "", aspect="equal")
            if column == 3:
                figure.colorbar(drawn, ax=axes[list(surfaces).index(name)], label=name, pad=0.01)
    return figure


def compare_with_plain_torch(task: Task, steps: int) -> Comparison:
    """Train the bounded network in plain torch and fused, in turns from one seed."""
    torch.manual_seed(0)
    plain = bounded_in_plain_torch()
    torch.manual_seed(0)
    fused = SNGP(64, 8, 2.0, BOUND)
    trainings = {"plain torch": plain, "fused": fused}
    return compare(steps, **{name: train(m, *task.train, steps) for name, m in trainings.items()})


def main() -> None:
    """Train all kinds for all seeds, compare with plain torch, and write the report."""
    parser = argument_parser(__doc__, "uncertainty", steps=1000, seeds=5, compared_steps=200)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report(
        "What a classifier does not know: SNGP with and without the soft bound", arguments.out
    )
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with Progress() as progress:
        moons = draw_moons(arguments.steps, progress)
        for seed in range(arguments.seeds):
            task = Task(seed)
            for kind, (bound, length_scale) in KINDS.items():
                torch.manual_seed(seed)
                model = SNGP(64, 8, length_scale, bound)
                training = train(model, *task.train, arguments.steps)
                name = f"digits, {kind}, seed {seed}"
                for _ in progress.track(training, total=arguments.steps, description=name):
                    pass
                model.fit_covariance(task.train[0])
                found[kind].append(task.measure(model))
    report.text(NOTES)
    columns = [*KINDS]
    report.table(["", *columns[:2], "difference", *columns[2:], "difference"], rows_of(found))
    report.picture(
        draw_unknown(task, found),
        "unknown",
        "All inputs, and how well they are told from known ones: a point for each seed, a line at the mean",
    )
    report.picture(
        moons,
        "moons",
        "Two moons: the variance should be low at the points and high away from them",
    )
    report.text(
        f"The last network's features:\n\n```\n{spectral_ext.report(model.features, exact=True)}\n```"
    )
    compared = compare_with_plain_torch(task, arguments.compared_steps)
    compared.add_to(report)
    report.write()


if __name__ == "__main__":
    main()
