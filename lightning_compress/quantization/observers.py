"""What was seen: the range of values that a quantizer must cover."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.checks import check_number
from lightning_compress.quantization.fitting import SHARES, narrow
from lightning_compress.quantization.quantizer import QParams, Quantizer

__all__ = ["MSE", "Entropy", "Histogram", "MinMax", "MovingAverage", "Observer", "Percentile"]

_HALF = 2048  # bins on either side of 0


class Observer(ABC):
    """Keeps what it saw of all batches in one float tensor, the state, and chooses a range from it.

    A state begins with two numbers, the lowest and the highest value so far; (+inf, -inf) has seen nothing. By itself
    those two are the state, and the range.

    See :func:`lightning_compress.testing.check_observer`.
    """

    counts: ClassVar[bool] = False
    """Whether the state counts every value once; it is then complete before the range is used."""

    def start(self) -> Tensor:
        """The state that has seen nothing."""
        return torch.tensor([torch.inf, -torch.inf])

    @abstractmethod
    def update(self, state: Tensor, values: Tensor) -> Tensor:
        """The new state, a tensor of its own; that of no values is the old one."""

    def range(self, state: Tensor, quantizer: Quantizer) -> Tensor:
        """The range to cover, (low, high), for a quantizer; (+inf, -inf) if nothing was seen."""
        return state

    def merge(self, states: Tensor) -> Tensor:
        """One state from those of all ranks, a row each: by itself the widest range."""
        return torch.stack([states[:, 0].min(), states[:, 1].max()])


@dataclass(frozen=True)
class MinMax(Observer):
    """The smallest and the largest value ever seen.

    Example:
        >>> MinMax().update(torch.tensor([torch.inf, -torch.inf]), torch.tensor([-1.0, 3.0]))
        tensor([-1.,  3.])
    """

    def update(self, state: Tensor, values: Tensor) -> Tensor:
        """The range widened to the values."""
        if not values.numel():
            return state
        low, high = torch.aminmax(values)
        return torch.stack([torch.minimum(state[0], low), torch.maximum(state[1], high)])


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
        check_number("MovingAverage.rate", self.rate, "a share above 0 and up to 1", above=0, high=1)

    def update(self, state: Tensor, values: Tensor) -> Tensor:
        """The first batch's range, then the average."""
        if not values.numel():
            return state
        batch = torch.stack(torch.aminmax(values))
        return torch.where(state[0] > state[1], batch, torch.lerp(state, batch, self.rate))


class Histogram(Observer):
    """Counts values in 4096 bins around 0, and chooses a range from the counts.

    The bins reach to a power of two. Where values lie beyond it, bins of the same side are joined until they fit: so
    the state depends neither on the order of batches nor on how ranks share them. It is (lowest, highest, counts).
    """

    counts = True

    @abstractmethod
    def choose(self, low: Tensor, high: Tensor, counts: Tensor, width: Tensor, quantizer: Quantizer) -> Tensor:
        """The range, (low, high), from the extent, the counts and the width of a bin."""

    def start(self) -> Tensor:
        """No extent, no counts."""
        return torch.cat([super().start(), torch.zeros(2 * _HALF)])

    def update(self, state: Tensor, values: Tensor) -> Tensor:
        """The values counted."""
        if not values.numel():
            return state
        low, high = torch.aminmax(values)
        extent = torch.stack([torch.minimum(state[0], low), torch.maximum(state[1], high)])
        bins = (values.flatten() / _width(extent)).floor_().int().add_(_HALF)
        return torch.cat([extent, _joined(state, extent) + torch.bincount(bins, minlength=2 * _HALF)])

    def merge(self, states: Tensor) -> Tensor:
        """The state that has seen what all have."""
        extent = super().merge(states)
        return torch.cat([extent, torch.stack([_joined(state, extent) for state in states]).sum(0)])

    def range(self, state: Tensor, quantizer: Quantizer) -> Tensor:
        """The chosen range; (+inf, -inf) if nothing was seen."""
        extent = state[:2]
        counts = state[2:]
        chosen = self.choose(extent[0], extent[1], counts, _width(extent), quantizer)
        return torch.where(extent[0] > extent[1], extent, chosen)


@dataclass(frozen=True)
class Percentile(Histogram):
    """The range that holds a share of the values; what lies outside is cut off evenly at both ends.

    Args:
        share: Share of the values to hold, above 0, up to 1.

    Raises:
        ValueError: If the share is out of range.

    Example:
        >>> from lightning_compress.quantization import Affine
        >>> observer = Percentile(0.98)
        >>> state = observer.update(observer.start(), torch.cat([torch.linspace(0, 1, 1000), torch.tensor([100.0])]))
        >>> float(observer.range(state, Affine())[1]) < 1.1
        True
    """

    share: float = 0.9999

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        check_number("Percentile.share", self.share, "a share above 0 and up to 1, such as 0.9999", above=0, high=1)

    def choose(self, low: Tensor, high: Tensor, counts: Tensor, width: Tensor, quantizer: Quantizer) -> Tensor:
        """The bins at which the sums of the counts pass the ends of the share."""
        sums = counts.cumsum(0)
        outside = (1 - self.share) / 2 * sums[-1:]
        first = torch.searchsorted(sums, outside, right=True)
        last = torch.searchsorted(sums, sums[-1:] - outside)
        ends = torch.cat([first, last + 1]).clamp(0, 2 * _HALF) - _HALF
        return (ends * width).clamp(low, high)


@dataclass(frozen=True)
class MSE(Histogram):
    """The range with the least squared error of the quantizer's own values (Banner 2019, arXiv:1810.05723).

    Looked for among the seen range, cut on both sides of 0 at shares of its farther end, as in OMSE (Choukroun 2019,
    arXiv:1902.06822).

    Example:
        >>> from lightning_compress.quantization import Affine
        >>> observer = MSE()
        >>> state = observer.update(observer.start(), torch.linspace(0, 1, 1000) ** 8)
        >>> float(observer.range(state, Affine(2))[1]) < 1
        True
    """

    def choose(self, low: Tensor, high: Tensor, counts: Tensor, width: Tensor, quantizer: Quantizer) -> Tensor:
        """All cuts at once, each as a channel of the quantizer."""
        lows, highs, values, codes, qparams = _trials(low, high, width, quantizer)
        errors = ((quantizer.dequantize(codes, qparams) - values).square() * counts).sum(1)
        best = errors.argmin()
        return torch.stack([lows[best], highs[best]])


@dataclass(frozen=True)
class Entropy(Histogram):
    """The range whose codes keep the distribution best, in Kullback-Leibler divergence (Migacz 2017, TensorRT).

    For each cut of the seen range, the values beyond it counted at its ends are compared with the values within it,
    spread over the bins that share a code. Zeros, which every quantizer keeps, are not counted: the bin at 0 takes its
    neighbor's count.

    Example:
        >>> from lightning_compress.quantization import Affine
        >>> observer = Entropy()
        >>> state = observer.update(observer.start(), torch.linspace(-1, 1, 9999)[1:-1].erfinv())
        >>> float(observer.range(state, Affine(4))[1]) < float(state[1])
        True
    """

    def choose(self, low: Tensor, high: Tensor, counts: Tensor, width: Tensor, quantizer: Quantizer) -> Tensor:
        """All cuts at once, each as a channel of the quantizer."""
        counts = counts.clone()
        counts[_HALF] = counts[_HALF + 1]
        lows, highs, values, codes, _ = _trials(low, high, width, quantizer)
        within = counts * ((values >= lows[:, None]) & (values <= highs[:, None]))
        beyond = counts - within
        # the first and the last bin with values within the cut take those beyond it
        at = torch.arange(2 * _HALF, device=counts.device)
        ends = (within > 0).int()
        first = ends.argmax(1, keepdim=True)
        last = (ends * at).argmax(1, keepdim=True)
        seen = within.scatter_add(1, first, (beyond * (at < first)).sum(1, keepdim=True))
        seen = seen.scatter_add(1, last, (beyond * (at > last)).sum(1, keepdim=True))
        code = (codes - codes.amin(1, keepdim=True)).long()
        filled = (within > 0).to(counts.dtype)
        zeros = counts.new_zeros(len(lows), quantizer.num_codes)
        share = zeros.scatter_add(1, code, within) / zeros.scatter_add(1, code, filled).clamp(min=1)
        spread = share.gather(1, code) * filled
        p = seen / seen.sum(1, keepdim=True).clamp(min=1)
        q = spread / spread.sum(1, keepdim=True).clamp(min=1)
        divergence = torch.where(p > 0, p * (p.clamp(min=1e-12) / q.clamp(min=1e-12)).log(), 0.0).sum(1)
        best = divergence.argmin()
        return torch.stack([lows[best], highs[best]])


def _width(extent: Tensor) -> Tensor:
    """Width of the bins that reach beyond an extent: a power of two, so that bins join exactly."""
    farthest = torch.maximum(-extent[0], extent[1]).clamp(min=1e-30)
    return torch.ldexp(torch.ones_like(farthest), torch.frexp(farthest).exponent) / _HALF


def _joined(state: Tensor, extent: Tensor) -> Tensor:
    """The counts of a state in the bins of a wider extent."""
    counts = state[2:]
    bins = torch.arange(-_HALF, _HALF, device=state.device) * (_width(state[:2]) / _width(extent))
    return torch.zeros_like(counts).index_add(0, (bins.floor().long() + _HALF).clamp(0, 2 * _HALF - 1), counts)


def _trials(
    low: Tensor, high: Tensor, width: Tensor, quantizer: Quantizer
) -> tuple[Tensor, Tensor, Tensor, Tensor, QParams]:
    """Cut ranges; and the centers of the bins, their codes and the parameters, a row each."""
    lows, highs = narrow(low, high, torch.tensor(SHARES, device=width.device))
    centers = ((torch.arange(-_HALF, _HALF, device=width.device) + 0.5) * width).clamp(low, high)
    values = centers.expand(len(SHARES), -1)
    qparams = quantizer.qparams(lows.clamp(max=0), highs.clamp(min=0), 0)
    return lows, highs, values, quantizer.quantize(values, qparams), qparams
