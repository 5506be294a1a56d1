"""Levels that follow from the values they are to write: a codebook, three values, two values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.quantization.fitting import mean
from lightning_compress.quantization.levels import Levels, LevelsOfBits
from lightning_compress.quantization.quantizer import QParams, rows

__all__ = ["Binary", "Codebook", "Ternary"]


@dataclass(frozen=True)
class Codebook(LevelsOfBits):
    """A table of shared values, one per cluster of the weights (Deep Compression, Han 2016, arXiv:1510.00149).

    :meth:`fit` finds the clusters by k-means, exact and without chance: it starts from equally spaced values, the
    paper's best, and 0 stays a value, so that pruned weights stay 0. Where channels have a scale each, they share the
    table of the weights over their scales. Training moves the scale; the table stays as fitted.

    Args:
        bits: Bits per code, 2..8.

    Raises:
        ValueError: If bits lies outside 2..8.

    Example:
        >>> q = Codebook(bits=2)
        >>> x = torch.tensor([-2.0, -1.6, 0.0, 0.1, 1.1, 0.9])
        >>> q.fake_quantize(x, q.fit(x))
        tensor([-1.8000, -1.8000,  0.0000,  0.0000,  1.0000,  1.0000])
    """

    learned: ClassVar[tuple[str, ...]] = ("scale",)

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """The scale of the range's end; equally spaced levels."""
        qparams = super().qparams(low, high, axis)
        half = 2 ** (self.bits - 1)
        below = torch.linspace(0, 1, half + 1, device=low.device, dtype=low.dtype)
        above = torch.linspace(0, 1, half, device=low.device, dtype=low.dtype)
        return qparams._replace(levels=torch.cat([-below.flip(0), above[1:]]))

    def levels(self, qparams: QParams) -> Tensor:
        """The table."""
        assert qparams.levels is not None
        return qparams.levels

    @torch.no_grad()
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        """The centers of the clusters."""
        qparams = super().fit(x, axis)
        levels = self.levels(qparams).double()
        zero = 2 ** (self.bits - 1)
        ordered = (rows(x, axis) / qparams.scale.view(-1, 1)).flatten().double().sort().values
        # of sorted values, a cluster is a stretch, and its sum a difference of two of these
        sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
        for _ in range(300):
            ends = torch.searchsorted(ordered, self.boundaries(levels), right=True)
            ends = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([len(ordered)])])
            centers = torch.where(ends.diff() > 0, sums[ends].diff() / ends.diff(), levels)
            # a pruned weight stays 0
            centers[zero] = 0
            if torch.equal(centers, levels):
                break
            levels = centers
        return qparams._replace(levels=levels.to(qparams.scale.dtype))


@dataclass(frozen=True)
class Ternary(Levels):
    """-scale, 0 and scale (TWN, Li 2016, arXiv:1605.04711).

    :meth:`fit` takes for the scale the mean magnitude of the values above 0.7 times the mean magnitude; a value then
    takes the nearest of the three. Zeros, the pruned weights, count in neither mean. The gradient passes everywhere.

    Example:
        >>> q = Ternary()
        >>> x = torch.tensor([-1.1, 0.1, 0.0, 0.9])
        >>> q.fake_quantize(x, q.fit(x))
        tensor([-1.,  0.,  0.,  1.])
    """

    bits = 2

    @property
    def num_codes(self) -> int:
        """-1, 0 and 1."""
        return 3

    def levels(self, qparams: QParams) -> Tensor:
        """-1, 0 and 1."""
        return torch.arange(-1.0, 2.0, device=qparams.scale.device)

    @torch.no_grad()
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        """The mean magnitude of what is large."""
        magnitude = rows(x, axis).abs()
        threshold = 0.7 * mean(magnitude, magnitude > 0)
        scale = mean(magnitude, magnitude > threshold[:, None])
        if axis is None:
            scale = scale[0]
        return self.qparams(-scale, scale, axis)


@dataclass(frozen=True)
class Binary(Levels):
    """The sign times a scale, the mean magnitude (XNOR-Net, Rastegari 2016, arXiv:1603.05279).

    A zero, a pruned weight, stays 0 and does not count in the mean: so there are three codes, one bit for a weight that
    a mask keeps and the mask's 0 for what it drops. The gradient passes everywhere.

    Example:
        >>> q = Binary()
        >>> x = torch.tensor([-1.5, 0.0, 0.5])
        >>> q.fake_quantize(x, q.fit(x))
        tensor([-1.,  0.,  1.])
    """

    bits = 1

    @property
    def num_codes(self) -> int:
        """-1, 1, and the 0 of pruned weights."""
        return 3

    def levels(self, qparams: QParams) -> Tensor:
        """-1, 0 and 1."""
        return torch.arange(-1.0, 2.0, device=qparams.scale.device)

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The sign."""
        return x.sign()

    @torch.no_grad()
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        """The mean magnitude."""
        magnitude = rows(x, axis).abs()
        scale = mean(magnitude, magnitude > 0)
        if axis is None:
            scale = scale[0]
        return self.qparams(-scale, scale, axis)
