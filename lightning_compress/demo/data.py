"""The images, which lie in the package."""

from __future__ import annotations

from importlib.resources import as_file, files

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["MNIST5k", "read_images"]


def read_images() -> tuple[np.ndarray, np.ndarray]:
    """The images, 5,000 x 28 x 28, and their digits, both as uint8; ``mnist5k.txt`` says whose they are.

    Example:
        >>> images, digits = read_images()
        >>> images.shape, np.bincount(digits).tolist()
        ((5000, 28, 28), [500, 500, 500, 500, 500, 500, 500, 500, 500, 500])
    """
    with as_file(files("lightning_compress.demo").joinpath("mnist5k.npz")) as path, np.load(path) as held:
        return held["images"], held["labels"]


class MNIST5k(pl.LightningDataModule):
    """5,000 images of MNIST, cut per class: 4,000 to train on and 1,000 to validate.

    Args:
        batch_size: Images a batch.
        seed: Seed of the cut.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read, normalize and cut."""
        images, labels = read_images()
        x = torch.from_numpy((images.reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081).float()
        y = torch.from_numpy(labels).long()
        generator = np.random.default_rng(self.seed)
        order = [generator.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
        train = np.concatenate([indices[: len(indices) * 4 // 5] for indices in order])
        val = np.concatenate([indices[len(indices) * 4 // 5 :] for indices in order])
        self.train, self.val = TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Batches in order."""
        return DataLoader(self.val, 250)

    def test_dataloader(self) -> DataLoader:
        """The validation images: there are no others in this small set."""
        return self.val_dataloader()
