"""How numbers are written: real values to integer codes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Affine", "QParams", "Quantizer"]


class QParams(NamedTuple):
    """Parameters of a quantizer.

    Args:
        scale: Size of a step; a scalar, or one a channel.
        zero_point: The code that stands for 0, int32, in the shape of ``scale``.
        axis: Axis of the channels, or None for one scale for the whole tensor.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int | None = None


class Quantizer(ABC):
    """Real values to codes and back, with ``dequantize(quantize(0)) == 0``.

    See :func:`lightning_compress.testing.check_quantizer`.
    """

    bits: int

    @abstractmethod
    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """Parameters that cover a range; low and high are scalars, or vectors with one entry a channel."""

    @abstractmethod
    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Integer codes, in the shape of x."""

    @abstractmethod
    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """The real values that the codes stand for."""

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The round trip, with a straight-through gradient (Bengio 2013, arXiv:1308.3432)."""
        return x + (self.dequantize(self.quantize(x, qparams), qparams) - x).detach()


@dataclass(frozen=True)
class Affine(Quantizer):
    """Linear quantization: x_int = round((x - x_min) / (x_max - x_min) * (2^n - 1)) (Jacob 2018, arXiv:1712.05877).

    The range is widened to hold 0 and shifted so that 0 falls on a code. The symmetric form uses the codes
    -(2^(n-1) - 1) .. 2^(n-1) - 1 around the zero point 0.

    Args:
        bits: Bits a code, 2..8.
        symmetric: Codes around zero, for weights; otherwise 0 .. 2^n - 1, for activations.

    Raises:
        ValueError: If bits lies outside 2..8.

    Example:
        >>> q = Affine(bits=8)
        >>> p = q.qparams(torch.tensor(-1.0), torch.tensor(1.55))
        >>> q.quantize(torch.tensor([-1.0, 0.0, 1.55]), p)
        tensor([  0., 100., 255.])
    """

    bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        """Refuse widths that no code has."""
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"Affine.bits={self.bits!r}: accepted are the whole numbers 2..8, for instance Affine(8).")

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        top = 2 ** (self.bits - 1) - 1
        return (-top, top) if self.symmetric else (0, 2**self.bits - 1)

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """Scale and zero point for a range."""
        lowest, highest = self.limits
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low, high) / highest
            zero_point = torch.zeros_like(scale)
        else:
            scale = (high - low) / (highest - lowest)
            zero_point = (-low / scale.clamp(min=1e-12)).round()
        return QParams(scale.clamp(min=1e-12), zero_point.to(torch.int32), axis)

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes as whole numbers in a float tensor."""
        scale, zero_point = _broadcast(qparams, x)
        return ((x * (1 / scale)).round() + zero_point).clamp(*self.limits)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """(codes - zero_point) * scale."""
        scale, zero_point = _broadcast(qparams, codes)
        return (codes - zero_point) * scale

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The round trip by torch's fused operation, whose gradient is 0 outside the range."""
        if qparams.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, qparams.scale, qparams.zero_point, *self.limits)
        return torch.fake_quantize_per_channel_affine(x, qparams.scale, qparams.zero_point, qparams.axis, *self.limits)


def _broadcast(qparams: QParams, x: Tensor) -> tuple[Tensor, Tensor]:
    if qparams.axis is None:
        return qparams.scale, qparams.zero_point
    shape = [-1 if axis == qparams.axis else 1 for axis in range(x.dim())]
    return qparams.scale.view(shape), qparams.zero_point.view(shape)
