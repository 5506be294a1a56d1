"""What was seen: the range of values that a quantizer must cover."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MinMax", "MovingAverage", "Observer"]


class Observer(ABC):
    """Updates a range, a tensor of two numbers (low, high), from the values of a batch.

    A range that has seen nothing is (+inf, -inf).
    """

    @abstractmethod
    def update(self, seen: Tensor, values: Tensor) -> Tensor:
        """The new range; that of no values is the old one."""


@dataclass(frozen=True)
class MinMax(Observer):
    """The smallest and the largest value ever seen.

    Example:
        >>> MinMax().update(torch.tensor([torch.inf, -torch.inf]), torch.tensor([-1.0, 3.0]))
        tensor([-1.,  3.])
    """

    def update(self, seen: Tensor, values: Tensor) -> Tensor:
        """The range widened to the values."""
        if not values.numel():
            return seen
        low, high = torch.aminmax(values)
        return torch.stack([torch.minimum(seen[0], low), torch.maximum(seen[1], high)])


@dataclass(frozen=True)
class MovingAverage(Observer):
    """Exponential moving average of each batch's smallest and largest value (Jacob 2018, arXiv:1712.05877).

    Args:
        rate: Weight of the newest batch, 0..1.

    Example:
        >>> MovingAverage(0.5).update(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0]))
        tensor([0., 2.])
    """

    rate: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.rate <= 1:
            raise ValueError(f"MovingAverage.rate={self.rate!r}: accepted is a share above 0 and up to 1.")

    def update(self, seen: Tensor, values: Tensor) -> Tensor:
        """The first batch's range, then the average."""
        if not values.numel():
            return seen
        batch = torch.stack(torch.aminmax(values))
        return torch.where(seen[0] > seen[1], batch, torch.lerp(seen, batch, self.rate))
