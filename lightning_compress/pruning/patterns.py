"""In what shape: which weights are kept or dropped together (Mao 2017, arXiv:1705.08922).

A pattern sees every weight with its output channels first, as :meth:`Layer.out_first` turns it: (out, in) or
(out, in, *kernel).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.checks import check_one_of, check_whole_number

__all__ = ["Block", "Channel", "Element", "Head", "NofM", "Pattern", "WholeLayer"]


class Pattern(ABC):
    """Groups of weights, all of one size; see :func:`lightning_compress.testing.check_pattern`."""

    @abstractmethod
    def reduce(self, scores: Tensor) -> Tensor:
        """One score per group."""

    @abstractmethod
    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """One bool per group to one bool per weight, in the weight's shape."""

    def refuses(self, shape: torch.Size) -> str | None:
        """Why a weight of this shape has no such groups; None where it has."""
        return None

    def protects(self, groups: Tensor) -> Tensor | None:
        """Which groups must stay whatever their score, one bool each; None for none. ``groups`` holds their scores."""
        return None

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity that the pattern allows."""
        return 1.0


@dataclass(frozen=True)
class Element(Pattern):
    """Every weight by itself: unstructured.

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


@dataclass(frozen=True)
class NofM(Pattern):
    """At least the n best of every m neighbours stay: at its full sparsity of 1 - n/m, N:M (Mishra 2021, 2104.08378).

    While the sparsity rises, weights go one by one, and never more than m - n of any m.

    Args:
        n: Number of weights that stay.
        m: Number of neighbours among which they stay.
        axis: Axis along which weights are neighbours; 1 is the input, as sparse tensor cores read it.

    Raises:
        ValueError: If not 0 < n < m, or the axis is none.

    Example:
        >>> NofM(2, 4).protects(torch.tensor([[1.0, 4.0, 3.0, 2.0]]))
        tensor([[False,  True,  True, False]])
    """

    n: int = 2
    m: int = 4
    axis: int = 1

    def __post_init__(self) -> None:
        """Refuse what keeps nothing or everything."""
        check_whole_number("NofM.m", self.m, "a whole number of neighbours from 2, for instance NofM(2, 4)", low=2)
        check_whole_number("NofM.n", self.n, f"a whole number in 1..{self.m - 1}, below m", low=1, high=self.m - 1)
        check_whole_number("NofM.axis", self.axis, "a whole number from 0", low=0)

    def reduce(self, scores: Tensor) -> Tensor:
        """The scores themselves."""
        return scores

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """The mask itself."""
        return keep.reshape(shape)

    def refuses(self, shape: torch.Size) -> str | None:
        """Where the axis is no multiple of m."""
        size = shape[self.axis] if self.axis < len(shape) else 0
        return None if size and size % self.m == 0 else f"axis {self.axis} is {size} long, no multiple of {self.m}"

    def protects(self, groups: Tensor) -> Tensor:
        """The n highest of every m; of equal ones the first."""
        rows = groups.movedim(self.axis, -1).unflatten(-1, (-1, self.m))
        better = torch.zeros_like(rows, dtype=torch.int8)
        for i in range(self.m):
            for j in range(i + 1, self.m):
                first = rows[..., i] >= rows[..., j]
                better[..., j] += first
                better[..., i] += ~first
        return (better < self.n).flatten(-2).movedim(-1, self.axis)

    @property
    def max_sparsity(self) -> float:
        """1 - n/m."""
        return 1 - self.n / self.m


@dataclass(frozen=True)
class Block(Pattern):
    """Rectangles of output by input channels, at every position of the kernel (Narang 2017, arXiv:1711.02782).

    Args:
        rows: Output channels per block.
        columns: Input channels per block.

    Raises:
        ValueError: If a side is no whole number above 0.

    Example:
        >>> Block(16, 1).reduce(torch.ones(32, 8)).shape
        torch.Size([2, 8])
    """

    rows: int = 16
    columns: int = 1

    def __post_init__(self) -> None:
        """Refuse empty blocks."""
        check_whole_number("Block.rows", self.rows, "a whole number of output channels from 1", low=1)
        check_whole_number("Block.columns", self.columns, "a whole number of input channels from 1", low=1)

    def reduce(self, scores: Tensor) -> Tensor:
        """Mean of each block."""
        return scores.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows)).mean((1, 3))

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """Each block's bool for all of it."""
        return keep.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def refuses(self, shape: torch.Size) -> str | None:
        """Where blocks do not fill the weight."""
        if shape[0] % self.rows or shape[1] % self.columns:
            return f"blocks of {self.rows} x {self.columns} do not fill {shape[0]} x {shape[1]} channels"
        return None


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole output channels (``axis=0``) or input channels (``axis=1``), as filters go in Li 2016, arXiv:1608.08710.

    The weights become zero and stay where they are; ``ChannelPruning`` takes channels out of the model.

    Args:
        axis: 0 or 1.

    Example:
        >>> Channel().reduce(torch.ones(8, 4, 3, 3)).shape
        torch.Size([8])
    """

    axis: int = 0

    def __post_init__(self) -> None:
        """Refuse other axes."""
        check_one_of("Channel.axis", self.axis, (0, 1), "0 is the output channels, 1 the input channels.")

    def reduce(self, scores: Tensor) -> Tensor:
        """Mean of each channel."""
        return scores.movedim(self.axis, 0).flatten(1).mean(1)

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """Each channel's bool for all of it."""
        return keep.view(*[-1 if axis == self.axis else 1 for axis in range(len(shape))]).expand(shape)


@dataclass(frozen=True)
class Head(Pattern):
    """Whole attention heads (Michel 2019, arXiv:1905.10650).

    Args:
        num_heads: Number of heads of the layer.
        axis: 0 for layers that make queries, keys or values; 1 for the layer that mixes the heads' outputs.
        fused: Number of queries, keys and values that the layer makes side by side: 3 for ``in_proj_weight``.

    Example:
        >>> Head(4, fused=3).reduce(torch.ones(48, 16)).shape
        torch.Size([4])
    """

    num_heads: int
    axis: int = 0
    fused: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no count."""
        check_whole_number("Head.num_heads", self.num_heads, "a whole number of heads from 1", low=1)
        check_one_of("Head.axis", self.axis, (0, 1), "0 makes queries, keys or values, 1 mixes the heads' outputs.")
        check_whole_number("Head.fused", self.fused, "a whole number from 1, 3 for queries, keys and values", low=1)

    def reduce(self, scores: Tensor) -> Tensor:
        """Mean of each head."""
        return (
            scores.movedim(self.axis, 0)
            .unflatten(0, (self.fused, self.num_heads, -1))
            .transpose(0, 1)
            .flatten(1)
            .mean(1)
        )

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """Each head's bool for all of it."""
        channels = keep.repeat_interleave(shape[self.axis] // (self.fused * self.num_heads)).repeat(self.fused)
        return Channel(self.axis).expand(channels, shape)

    def refuses(self, shape: torch.Size) -> str | None:
        """Where the heads do not fill the axis."""
        if shape[self.axis] % (self.fused * self.num_heads):
            return f"{self.fused} x {self.num_heads} heads do not fill axis {self.axis} of length {shape[self.axis]}"
        return None


@dataclass(frozen=True)
class WholeLayer(Pattern):
    """All of a layer's weights at once; in a residual block that leaves the shortcut.

    The weights become zero and stay where they are; ``LayerPruning`` takes blocks out of the model.
    """

    def reduce(self, scores: Tensor) -> Tensor:
        """Mean of the layer."""
        return scores.mean().view(1)

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """The layer's bool for all of it."""
        return keep.view(*[1] * len(shape)).expand(shape)
