"""Which: a score for every weight; the higher, the more it is worth keeping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from lightning_compress.layers import Layer

__all__ = ["Criterion", "Magnitude", "Random"]


class Criterion(ABC):
    """Scores the weights of a layer; see :func:`lightning_compress.testing.check_criterion`."""

    @abstractmethod
    def score(self, layer: Layer) -> Tensor:
        """One finite score a weight, in the weight's shape; higher = keep."""

    def score_values(self, weights: Tensor, out: Tensor) -> Tensor:
        """Scores of any stretch of weights, written into ``out``; only for a criterion that needs no more than values.

        The score of 0 must then be 0 and the lowest. Such scores are never held for a whole model.
        """
        raise TypeError(f"{type(self).__name__} scores whole layers")


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The size of the weight, |w| (Han 2015, arXiv:1506.02626).

    Example:
        >>> Magnitude().score(Layer("fc", torch.nn.Linear(3, 2))).shape
        torch.Size([2, 3])
    """

    def score(self, layer: Layer) -> Tensor:
        """The absolute weight."""
        return layer.weight.detach().abs()

    def score_values(self, weights: Tensor, out: Tensor) -> Tensor:
        """The absolute weights."""
        return torch.abs(weights, out=out)


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform noise, the floor that every criterion must beat; the same for the same seed and layer name.

    Args:
        seed: Seed of the noise.
    """

    seed: int = 0

    def score(self, layer: Layer) -> Tensor:
        """Uniform in 0..1, without touching the global random state."""
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {layer.name}".encode()))
        return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
