"""Equal steps whose size is a bfloat16 number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.quantizer import QParams

__all__ = ["ShortScale"]


@dataclass(frozen=True)
class ShortScale(Affine):
    """:class:`Affine` with scales that 16 bits hold, for weights in groups.

    XNNPACK and the checkpoints that vLLM reads keep a group's scale as bfloat16. A scale that is rounded only when the
    file is written would move every weight of its group by up to 0.4 %; here training computes with the rounded one.

    Args:
        bits: Bits per code, 2..8.
        symmetric: Codes around zero.
        top: Largest code; None for 2^(bits-1) - 1.

    Example:
        >>> ShortScale(4).qparams(torch.tensor(-0.1), torch.tensor(0.7)).scale
        tensor(0.1001)
    """

    bits: int = 4
    symmetric: bool = True
    most_bits: ClassVar[int] = 8

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """Scale and zero point for a range, whose largest value keeps the last code: the scale is off by 2^-8."""
        found = super().qparams(low, high, axis)
        return found._replace(scale=found.scale.to(torch.bfloat16).to(found.scale.dtype))
