"""Equal steps whose size training learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.fitting import least_squares, mean, occupied
from lightning_compress.quantization.quantizer import QParams, extent, learned_scale, rows

__all__ = ["LearnedClip", "LearnedStep"]


@dataclass(frozen=True)
class LearnedStep(Affine):
    """Linear quantization whose step is learned (LSQ, Esser 2020, arXiv:1902.08153).

    The scale's gradient is, for each value, code - x / scale inside the range and the outermost code outside of it.
    The paper's factor of 1 / sqrt(number of values * largest code) balances steps against weights under one learning
    rate; it is left out, for the logarithm of the step is meant to have an optimizer of its own, to which the
    gradient's size does not matter (Adam).

    :meth:`fit` takes the paper's start, 2 * mean |x| / sqrt(largest code), of the values that are not 0, or the range's
    own step where that is smaller. With 2 bits, symmetric, the codes are -1, 0 and 1.

    Args:
        bits: Bits per code, 2..8.
        symmetric: Codes around zero, for weights; otherwise 0 .. 2^n - 1 around a zero point that stays.
        top: Largest code of the symmetric form; None for 2^(n-1) - 1.

    Raises:
        ValueError: As :class:`Affine`.

    Example:
        >>> q = LearnedStep(bits=2, symmetric=True)
        >>> p = q.qparams(torch.tensor(-1.0), torch.tensor(1.0))
        >>> scale = p.scale.requires_grad_()
        >>> q.fake_quantize(torch.tensor([0.75, 3.0]), p).sum().backward()
        >>> scale.grad  # (1 - 0.75) + 1
        tensor(1.2500)
    """

    learned: ClassVar[tuple[str, ...]] = ("scale",)
    most_bits: ClassVar[int] = 8

    @torch.no_grad()
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        """A step that clips little, so that most weights keep their gradient."""
        qparams = self.qparams(*occupied(*extent(x, axis)), axis)
        magnitude = rows(x, axis).abs()
        start = 2 * mean(magnitude, magnitude > 0).view(qparams.scale.shape) / self.limits[1] ** 0.5
        scale = torch.where(start > 0, torch.minimum(start, qparams.scale), qparams.scale)
        return qparams._replace(scale=scale.clamp(min=1e-12))

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The round trip, with a gradient for the scale too."""
        held = qparams._replace(scale=qparams.scale.detach())
        return learned_scale(self, x, qparams, super().fake_quantize(x.detach(), held))


@dataclass(frozen=True)
class LearnedClip(LearnedStep):
    """Linear quantization whose range is learned (PACT, Choi 2018, arXiv:1805.06085).

    Like :class:`LearnedStep`, but only what is clipped moves the scale: the clip, the outermost code times the scale,
    has the sum of the gradients of the values beyond it. :meth:`fit` takes the range with the least squared error.

    Args:
        bits: Bits per code, 2..8.
        symmetric: Codes around zero, for weights; otherwise 0 .. 2^n - 1 around a zero point that stays.
        top: Largest code of the symmetric form; None for 2^(n-1) - 1.

    Raises:
        ValueError: As :class:`Affine`.

    Example:
        >>> q = LearnedClip(bits=4)
        >>> p = q.qparams(torch.tensor(0.0), torch.tensor(6.0))
        >>> scale = p.scale.requires_grad_()
        >>> q.fake_quantize(torch.tensor([0.75, 7.0]), p).sum().backward()
        >>> scale.grad  # 15 steps make the clip
        tensor(15.)
    """

    @torch.no_grad()
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        """The range with the least squared error."""
        return least_squares(self, x, axis)

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The round trip, with a gradient for the scale from what is clipped."""
        held = qparams._replace(scale=qparams.scale.detach())
        values = Affine.fake_quantize(self, x.detach(), held)
        return learned_scale(self, x, qparams, values, only_clipped=True)
