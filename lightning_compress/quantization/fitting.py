"""Parameters that fit given values: what the quantizers' ``fit`` and the observers share."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.quantization.quantizer import QParams, Quantizer, extent, rows

__all__ = ["SHARES", "least_squares", "mean", "narrow", "occupied"]


def occupied(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges, where a channel of zeros takes the widest of all, so that its scale can be learned.

    Where all channels are zeros, each takes -1..1.
    """
    most = torch.maximum(-low, high)
    widest = torch.where(most.max() > 0, most.max(), 1.0)
    return torch.where(most > 0, low, -widest), torch.where(most > 0, high, widest)


def mean(x: Tensor, which: Tensor) -> Tensor:
    """The mean of the chosen values of each row; 0 without any."""
    return (x * which).sum(1) / which.sum(1).clamp(min=1)


def narrow(low: Tensor, high: Tensor, share: Tensor | float) -> tuple[Tensor, Tensor]:
    """The range cut on both sides of 0 at a share of its end that is farther from 0."""
    most = torch.maximum(-low, high) * share
    return torch.maximum(low, -most), torch.minimum(high, most)


# Shares of a range to look for the best among, from all of it down to a twentieth: each is 6 % below the one before.
SHARES = tuple(0.94**i for i in range(48))


def least_squares(quantizer: Quantizer, x: Tensor, axis: int | None, base: Tensor | None = None) -> QParams:
    """The parameters of the range with the least squared error."""
    low, high = occupied(*extent(x, axis))
    trials = [quantizer.qparams(*narrow(low, high, share), axis) for share in SHARES]
    if base is not None:
        trials = [trial._replace(base=base) for trial in trials]
    best = trials[0]
    least = torch.full_like(low, torch.inf)
    for trial in trials:
        error = rows(quantizer.dequantize(quantizer.quantize(x, trial), trial) - x, axis).square().sum(1)
        error = error.view(low.shape)
        scale = torch.where(error < least, trial.scale, best.scale)
        zero_point = torch.where(error < least, trial.zero_point, best.zero_point)
        best = best._replace(scale=scale, zero_point=zero_point)
        least = torch.minimum(error, least)
    return best
