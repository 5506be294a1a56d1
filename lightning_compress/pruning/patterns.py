"""In what shape: which weights are kept or dropped together (Mao 2017, arXiv:1705.08922)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Element", "Pattern"]


class Pattern(ABC):
    """Groups of weights; see :func:`lightning_compress.testing.check_pattern`."""

    @abstractmethod
    def reduce(self, scores: Tensor) -> Tensor:
        """One score a group."""

    @abstractmethod
    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """A bool a group to a bool a weight, in the weight's shape."""


@dataclass(frozen=True)
class Element(Pattern):
    """Every weight for itself: unstructured.

    Example:
        >>> Element().reduce(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def reduce(self, scores: Tensor) -> Tensor:
        """The scores themselves."""
        return scores

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """The mask itself."""
        return keep.reshape(shape)
