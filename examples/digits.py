"""The scans of handwritten digits that scikit-learn ships (UCI, Alpaydin and Kaynak, 1998)."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["digits", "split"]


def digits(size: int = 8) -> tuple[Tensor, Tensor]:
    """Return all 1797 scans and what they show: ``(1797, 1, size, size)`` in [−1, 1], and 0 to 9.

    The scans have 8×8 pixels; for another size they are enlarged bilinearly.
    """
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    if size != images.shape[-1]:
        images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return images, torch.tensor(data.target)


def split(images: Tensor, labels: Tensor, test: int = 500) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels to train with, and ``test`` of each to test with; always the same."""
    train, held = train_test_split(
        range(len(labels)), test_size=test, stratify=labels, random_state=0
    )
    return images[train], labels[train], images[held], labels[held]
