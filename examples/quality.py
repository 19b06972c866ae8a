"""How good generated digits are: a classifier of real ones, and measures of what it sees."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Classifier", "class_coverage", "frechet_distance", "train_classifier"]


class Classifier(nn.Module):
    """A small convolutional classifier of digits.

    Args:
        size: The height and width of the images, a multiple of 4.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 32, 4, 2, 1), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (size // 4) ** 2, 64), nn.ReLU(),
        )  # fmt: skip
        self.scores = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return a score for each digit, ``(n, 10)``; those before the last layer are ``features``."""
        return self.scores(self.features(images))

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Return the digit that each image shows most likely, ``(n,)``."""
        return self(images).argmax(1)


def train_classifier(images: Tensor, labels: Tensor, steps: int = 600, seed: int = 0) -> Classifier:
    """Return a classifier that is trained and in evaluation; global random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(images.shape[-1])
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
        for _ in range(steps):
            chosen = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Return ``‖m − m'‖² + tr(C + C' − 2(CC')^½)``, of Gaussians fitted to rows of features.

    This is the distance in FID (Heusel et al., 2017, equation 6), for any features.
    """
    (m, other_m), (c, other_c) = zip(
        *((x.mean(0), x.T.cov()) for x in (features.double(), others.double())), strict=True
    )
    root = torch.linalg.eigvals(c @ other_c).real.clamp(min=0).sqrt().sum()
    return ((m - other_m).square().sum() + c.trace() + other_c.trace() - 2 * root).item()


def class_coverage(classes: Tensor) -> float:
    """Return exp(entropy) of the shares of classes: how many there are, if all were equally frequent."""
    share = classes.bincount() / len(classes)
    return torch.special.entr(share).sum().exp().item()
