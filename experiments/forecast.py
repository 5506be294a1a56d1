"""The next 24 values of generated series, by a net like N-BEATS (Oreshkin 2020, arXiv:1905.10437); needs no files."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.tasks import Data, Metric, Task

__all__ = ["TASKS", "Forecaster", "generated", "series"]

SEEN, ASKED = 96, 24


class Forecaster(nn.Module):
    """Two blocks, each of which explains some of what it sees and hands on the rest: 60,528 parameters.

    Args:
        width: Multiplies the 96 units of a layer.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        size = max(1, round(96 * width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(SEEN, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU()), nn.Linear(size, SEEN + ASKED)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Series of 96 values; the next 24 of each, counted from the last that is seen."""
        last = x[:, -1:]
        rest, found = x - last, last
        for block in self.blocks:
            explained, forecast = block(rest).split((SEEN, ASKED), 1)
            rest, found = rest - explained, found + forecast
        return found


def generated(num: int, seed: int = 0) -> Tensor:
    """Series of 120 values: two waves, a slope and autoregressive noise."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(SEEN + ASKED)
    periods = 8 + 40 * torch.rand(num, 2, 1, generator=generator)
    phases = 6.3 * torch.rand(num, 2, 1, generator=generator)
    waves = (torch.sin(6.2832 * t / periods + phases) * torch.rand(num, 2, 1, generator=generator)).sum(1)
    noise = 0.1 * torch.randn(num, len(t), generator=generator)
    for i in range(1, len(t)):
        noise[:, i] += 0.7 * noise[:, i - 1]
    return waves + noise + torch.randn(num, 1, generator=generator) * t / len(t)


def series(folder: Path) -> Data:
    """40,000 to train on and 4,000 to test."""
    x = generated(44_000)
    return Data(x[:40_000, :SEEN], x[:40_000, SEEN:], x[40_000:, :SEEN], x[40_000:, SEEN:])


def missed(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean distance from what came, summed over the examples."""
    return (outputs - y).abs().mean(1).sum()


TASKS = {
    "forecast": Task(
        "forecast",
        Forecaster,
        series,
        *(None, 128, 1e-5, 40, 0.2, 8, 0.05, (0.8, 0.9)),
        metric=Metric("mean absolute error", missed, higher=False, least=0.002),
        loss=F.mse_loss,
    )
}
