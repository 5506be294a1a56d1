"""The task of ``make bench-quick``: it needs no files and trains in seconds, so that the whole protocol is tried."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from experiments.tasks import Data, Mean, Task
from lightning_compress.demo.data import read_images

__all__ = ["TASKS"]


def _net(width: float = 1.0) -> nn.Module:
    """Two convolutions that halve the image: 5,178 parameters."""
    a, b = max(1, round(16 * width)), max(1, round(32 * width))
    first = [nn.Conv2d(1, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU()]
    second = [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*first, *second, Mean(), nn.Linear(b, 10))


def _images(folder: Path) -> Data:
    """The 5,000 images of the demo."""
    images, digits = read_images()
    x, y = torch.from_numpy((images[:, None] / 255 - 0.1307) / 0.3081).float(), torch.from_numpy(digits).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[:1000], order[1000:]
    return Data(x[train], y[train], x[test], y[test])


TASKS = {"quick": Task("quick", _net, _images, None, 64, 1e-4, 2, 0.1, 1, 0.05, (0.8, 0.9))}
