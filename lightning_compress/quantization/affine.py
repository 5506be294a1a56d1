"""Equal steps: linear quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_compress.checks import check_flag, check_whole_number, refusal
from lightning_compress.quantization.quantizer import QParams, Quantizer, along

__all__ = ["Affine"]


@dataclass(frozen=True)
class Affine(Quantizer):
    """Linear quantization: x_int = round((x - x_min) / (x_max - x_min) * (2^n - 1)) (Jacob 2018, arXiv:1712.05877).

    The range is widened to hold 0 and shifted so that 0 falls on a code. The symmetric form uses the codes
    -top .. top around the zero point 0.

    Args:
        bits: Bits per code, 2..16; more than 8 for activations only, since weights are stored as int8 or uint8.
        symmetric: Codes around zero, for weights and for activations of 16 bits, which LiteRT takes in no other form;
            otherwise 0 .. 2^n - 1, for activations.
        top: Largest code of the symmetric form; None for 2^(n-1) - 1. A :class:`Scheme` sets it where kernels need
            smaller codes.

    Raises:
        ValueError: If bits lies outside 2..16, or top outside 1 .. 2^(n-1) - 1, or codes with a top are not symmetric.

    Example:
        >>> q = Affine(bits=8)
        >>> p = q.qparams(torch.tensor(-1.0), torch.tensor(1.55))
        >>> q.quantize(torch.tensor([-1.0, 0.0, 1.55]), p)
        tensor([  0., 100., 255.])
    """

    bits: int = 8
    symmetric: bool = False
    top: int | None = None
    most_bits: ClassVar[int] = 16

    def __post_init__(self) -> None:
        """Refuse widths that no code has, and a top beyond them."""
        name = type(self).__name__
        accepted = f"a whole number in 2..{self.most_bits}, for instance {name}(8)"
        check_whole_number(f"{name}.bits", self.bits, accepted, low=2, high=self.most_bits)
        check_flag(f"{name}.symmetric", self.symmetric)
        if self.top is None:
            return
        highest = 2 ** (self.bits - 1) - 1
        accepted = f"a whole number in 1..{highest} for symmetric codes, or None"
        check_whole_number(f"{name}.top", self.top, accepted, low=1, high=highest)
        if not self.symmetric:
            raise refusal(f"{name}.top", self.top, accepted, "Set symmetric=True, or leave top out.")

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        if self.top is not None:
            return -self.top, self.top
        highest = 2 ** (self.bits - 1) - 1
        return -highest, highest

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """Scale and zero point for a range."""
        lowest, highest = self.limits
        # a channel of zeros has no range: any scale gives its values back, one of 0 would divide by 0
        if self.symmetric:
            scale = (torch.maximum(-low, high) / highest).clamp(min=1e-12)
            return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), axis)
        low = low.clamp(max=0)
        high = high.clamp(min=0)
        scale = ((high - low) / (highest - lowest)).clamp(min=1e-12)
        return QParams(scale, (-low / scale).round().to(torch.int32), axis)

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes as whole numbers in a float tensor."""
        scale = along(qparams.scale, qparams.axis, x)
        zero_point = along(qparams.zero_point, qparams.axis, x)
        # times the inverse, as torch's own operations have it: a division would round some values another way
        return ((x * (1 / scale)).round() + zero_point).clamp(*self.limits)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """(codes - zero_point) * scale."""
        scale = along(qparams.scale, qparams.axis, codes)
        zero_point = along(qparams.zero_point, qparams.axis, codes)
        return (codes - zero_point) * scale

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The round trip, whose gradient is 0 outside the range."""
        scale, zero_point, axis, *_ = qparams
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if axis is None:
                return _RoundTrip.apply(x, float(scale), float(scale.reciprocal()), int(zero_point), *self.limits)
            code_of_zero = 0 if self.symmetric else along(zero_point, axis, x)
            return _RoundTripOfChannels.apply(x, along(scale, axis, x), code_of_zero, *self.limits)
        if axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *self.limits)
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *self.limits)

    def fake_quantize_fitted(self, x: Tensor, axis: int | None = None) -> Tensor:
        """The round trip with the parameters of these very values; if symmetric, none of them is clipped."""
        fused = self.symmetric and x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not fused or self.learned:
            return super().fake_quantize_fitted(x, axis)
        return _Round.apply(x, along(self.fit(x.detach(), axis).scale, axis, x))


class _RoundTrip(torch.autograd.Function):
    """torch's fused operation bit for bit, in vectorized steps: on a CPU a tenth of its time.

    Scale and ends are numbers of double precision, which round to what a float32 tensor of the scale would give.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: float, inverse: float, zero_point: int, lowest: int, highest: int
    ) -> Tensor:
        low = lowest - zero_point
        high = highest - zero_point
        ctx.save_for_backward(x)
        # half a step beyond the outermost codes: so far values round to them, and are not clipped
        ctx.ends = (low - 0.5) * scale, (high + 0.5) * scale
        return x.mul(inverse).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, *ctx.ends), *[None] * 5


class _RoundTripOfChannels(torch.autograd.Function):
    """The same with a scale for each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | int, lowest: int, highest: int) -> Tensor:
        ctx.ends = lowest - zero_point, highest - zero_point
        ctx.save_for_backward(x, scale)
        return (x * (1 / scale)).round_().clamp_(*ctx.ends).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low = (ctx.ends[0] - 0.5) * scale
        high = (ctx.ends[1] + 0.5) * scale
        return gradient * ((x > low) & (x < high)), None, None, None, None


class _Round(torch.autograd.Function):
    """The same where nothing is clipped."""

    @staticmethod
    def forward(ctx: object, x: Tensor, scale: Tensor) -> Tensor:
        return (x * (1 / scale)).round_().mul_(scale)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
