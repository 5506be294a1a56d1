"""Floating point of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.checks import check_one_of
from lightning_compress.quantization.quantizer import QParams, Quantizer, along

__all__ = ["Float8"]


@dataclass(frozen=True)
class Float8(Quantizer):
    """Floating point of 8 bits, scaled so that the range ends at its largest value (Micikevicius 2022).

    arXiv:2209.05433. A code counts the numbers between 0 and its value, with their sign.

    Args:
        format: ``"e4m3"``, 4 bits of exponent and 3 of mantissa, for weights and activations; or ``"e5m2"``.

    Raises:
        ValueError: If the format is another.

    Example:
        >>> q = Float8("e4m3")
        >>> p = q.qparams(torch.tensor(-448.0), torch.tensor(1.0))
        >>> q.fake_quantize(torch.tensor([-500.0, 0.0, 1.05, 17.0]), p)
        tensor([-448.,    0.,    1.,   16.])
    """

    format: str = "e4m3"

    bits = 8

    def __post_init__(self) -> None:
        """Refuse what torch has no type for."""
        check_one_of("Float8.format", self.format, ("e4m3", "e5m2"), "Take 'e4m3' if in doubt.")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values before they are scaled."""
        if self.format == "e4m3":
            return torch.float8_e4m3fn
        return torch.float8_e5m2

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """The scale that takes the type's largest value to the end of the range."""
        scale = (torch.maximum(-low, high) / torch.finfo(self.dtype).max).clamp(min=1e-12)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), axis)

    def _round(self, x: Tensor, qparams: QParams) -> Tensor:
        most = torch.finfo(self.dtype).max
        return (x / along(qparams.scale, qparams.axis, x)).clamp(-most, most).to(self.dtype)

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes as whole numbers in a float tensor."""
        # without its sign, the bits of a float count the numbers between 0 and it
        pattern = self._round(x, qparams).view(torch.uint8)
        magnitude = (pattern & 127).to(x.dtype)
        return torch.where(pattern > 127, -magnitude, magnitude)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """The numbers that the codes count, times the scale."""
        scale = along(qparams.scale, qparams.axis, codes)
        return codes.abs().to(torch.uint8).view(self.dtype).to(scale.dtype) * codes.sign() * scale

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The round trip without the codes."""
        values = self._round(x.detach(), qparams).to(x.dtype) * along(qparams.scale, qparams.axis, x)
        return values.detach() + (x - x.detach())
