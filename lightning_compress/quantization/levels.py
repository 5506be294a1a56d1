"""Numbers written without equal steps: an ascending table of levels, times a scale.

The levels of these follow from a formula; those of :mod:`~lightning_compress.quantization.clusters` from the values.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.checks import check_whole_number
from lightning_compress.quantization.fitting import SHARES, least_squares, narrow
from lightning_compress.quantization.quantizer import QParams, Quantizer, along, extent, rows

__all__ = ["AdditivePowerOfTwo", "Exponential", "Levels", "LevelsOfBits", "PowerOfTwo"]


class Levels(Quantizer):
    """A table of levels, ascending and with 0 among them, times a scale; a code counts levels from 0, with its sign.

    A value takes the nearest level, unless ``boundaries`` says otherwise.
    """

    @abstractmethod
    def levels(self, qparams: QParams) -> Tensor:
        """The ascending levels, as shares of the scale."""

    def boundaries(self, levels: Tensor) -> Tensor:
        """Where a level ends and the next one begins."""
        return (levels[1:] + levels[:-1]) / 2

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """The scale that takes the outermost level to the end of the range."""
        scale = torch.maximum(-low, high).clamp(min=1e-12)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), axis)

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes as whole numbers in a float tensor."""
        levels = self.levels(qparams)
        share = x / along(qparams.scale, qparams.axis, x)
        boundaries = self.boundaries(levels)
        if len(boundaries) > 16:
            index = torch.bucketize(share, boundaries, out_int32=True)
        else:
            # for few boundaries, comparing with each takes a third of the time of a search
            index = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
            for boundary in boundaries:
                index += share > boundary
        return (index - (levels < 0).sum()).to(x.dtype)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """The levels that the codes count, times the scale."""
        levels = self.levels(qparams)
        index = (codes + (levels < 0).sum()).int()
        return levels.index_select(0, index.flatten()).view(codes.shape) * along(qparams.scale, qparams.axis, codes)


@dataclass(frozen=True)
class LevelsOfBits(Levels):
    """Levels whose number is given by the bits of a code.

    Args:
        bits: Bits per code.

    Raises:
        ValueError: If bits lies outside of ``fewest`` .. 8.
    """

    bits: int = 4

    fewest: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse widths that no code has."""
        name = type(self).__name__
        accepted = f"a whole number in {self.fewest}..8, for instance {name}(4)"
        check_whole_number(f"{name}.bits", self.bits, accepted, low=self.fewest, high=8)


@dataclass(frozen=True)
class PowerOfTwo(LevelsOfBits):
    """Logarithmic quantization: 0 and +- scale * 2^-k, rounded in the logarithm (Miyashita 2016, arXiv:1603.01025).

    Multiplying by a level is a shift. There are 2^(n-1) - 1 levels on either side of 0; what is nearer to 0 than to the
    smallest one becomes 0.

    Args:
        bits: Bits per code, 2..8.

    Raises:
        ValueError: If bits lies outside 2..8.

    Example:
        >>> q = PowerOfTwo(bits=3)
        >>> p = q.qparams(torch.tensor(-1.0), torch.tensor(1.0))
        >>> q.fake_quantize(torch.tensor([-0.9, -0.1, 0.34, 0.36, 0.72]), p)
        tensor([-1.0000,  0.0000,  0.2500,  0.5000,  1.0000])
    """

    def levels(self, qparams: QParams) -> Tensor:
        """+-2^-k and 0."""
        return self._powers(torch.ones_like(qparams.scale.detach().flatten()[0]))

    def _powers(self, base: Tensor) -> Tensor:
        powers = (1 + base) ** -torch.arange(2 ** (self.bits - 1) - 1, device=base.device, dtype=base.dtype)
        return torch.cat([-powers, powers.new_zeros(1), powers.flip(0)])

    def boundaries(self, levels: Tensor) -> Tensor:
        """Half way in the logarithm; to 0, half way."""
        inner = (levels[1:] * levels[:-1]).sqrt() * levels[1:].sign()
        return torch.where(levels[1:] * levels[:-1] == 0, (levels[1:] + levels[:-1]) / 2, inner)


@dataclass(frozen=True)
class Exponential(PowerOfTwo):
    """Logarithmic quantization with a learned base: 0 and +- scale * (1 + base)^-k (Vogel 2018).

    doi:10.1145/3240765.3240803. The base of the powers is written as 1 + ``QParams.base``, so that every positive
    number is valid; 1 gives the levels of :class:`PowerOfTwo`. Scale and base are learned; :meth:`fit` takes those with
    the least squared error.

    Args:
        bits: Bits per code, 3..8; 2 have one level on either side, whatever the base.

    Raises:
        ValueError: If bits lies outside 3..8.

    Example:
        >>> q = Exponential(bits=3)
        >>> p = q.qparams(torch.tensor(-1.0), torch.tensor(1.0))._replace(base=torch.tensor(0.25))
        >>> q.fake_quantize(torch.tensor([-0.9, 0.1, 0.6, 0.7]), p)
        tensor([-1.0000,  0.0000,  0.6400,  0.6400])
    """

    learned: ClassVar[tuple[str, ...]] = ("scale", "base")
    fewest: ClassVar[int] = 3

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """The scale of the range's end; powers of two."""
        qparams = super().qparams(low, high, axis)
        return qparams._replace(base=torch.ones_like(qparams.scale.flatten()[0]))

    def levels(self, qparams: QParams) -> Tensor:
        """+-(1 + base)^-k and 0."""
        assert qparams.base is not None
        return self._powers(qparams.base)

    @torch.no_grad()
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        """The base with the least squared error over a sample of all channels, then the scales with the least."""
        low, high = extent(x, axis)
        sample = (rows(x, axis) / self.qparams(low, high).scale.view(-1, 1)).flatten()
        sample = sample[:: 1 + sample.numel() // 2**14]
        trials = [
            self.qparams(*narrow(*extent(sample, None), share))._replace(base=sample.new_tensor(base))
            for base in (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
            for share in SHARES[::3]
        ]
        errors = [(self.dequantize(self.quantize(sample, t), t) - sample).square().sum() for t in trials]
        base = trials[int(torch.stack(errors).argmin())].base
        return least_squares(self, x, axis, base)


@dataclass(frozen=True)
class AdditivePowerOfTwo(LevelsOfBits):
    """Sums of powers of two: dense around 0 without thinning out at the ends (APoT, Li 2020).

    arXiv:1909.13144. A magnitude of n - 1 bits is a sum of one term for every two bits, each 0 or one of three powers
    of two, and one more of 0 or a single power where a bit is left. The scale, the paper's clip, is learned.

    Args:
        bits: Bits per code, 2..8.

    Raises:
        ValueError: If bits lies outside 2..8.

    Example:
        >>> q = AdditivePowerOfTwo(bits=4)
        >>> q.levels(q.qparams(torch.tensor(-1.0), torch.tensor(1.0)))[7:] * 10
        tensor([ 0.,  1.,  2.,  3.,  4.,  6.,  8., 10.])
    """

    learned: ClassVar[tuple[str, ...]] = ("scale",)

    def levels(self, qparams: QParams) -> Tensor:
        """Every sum of one number per term, divided by the largest."""
        num_terms, single = divmod(self.bits - 1, 2)
        terms: list[list[float]] = [[0.0] for _ in range(num_terms + single)]
        order = [term for _ in range(3) for term in range(num_terms)]
        if single:
            order.insert(2 * num_terms, num_terms)
        for exponent, term in enumerate(order):
            terms[term].append(2.0 ** -(exponent + 1))
        sums = [0.0]
        for numbers in terms:
            sums = [a + b for a in sums for b in numbers]
        sums = [value / max(sums) for value in sorted(sums)]
        return torch.tensor([-value for value in sums[:0:-1]] + sums, device=qparams.scale.device)

    @torch.no_grad()
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        """The scale with the least squared error."""
        return least_squares(self, x, axis)
