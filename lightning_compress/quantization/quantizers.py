"""How numbers are written: real values to integer codes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

__all__ = ["Affine", "Float8", "LearnedClip", "LearnedStep", "QParams", "Quantizer"]


class QParams(NamedTuple):
    """Parameters of a quantizer.

    Args:
        scale: Size of a step, or the value of the largest level; a scalar, or one a channel.
        zero_point: The code that stands for 0, int32, in the shape of ``scale``.
        axis: Axis of the channels, or None for one scale for the whole tensor.
        base: Of exponential levels: neighbours lie a factor of 1 + base apart, so that any positive number is valid; a
            scalar.
        levels: Of a codebook: the ascending values of its codes as shares of ``scale``, with 0 among them.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int | None = None
    base: Tensor | None = None
    levels: Tensor | None = None


class Quantizer(ABC):
    """Real values to codes and back, with ``dequantize(quantize(0)) == 0``.

    A scale is learned by naming it in ``learned``: the inherited round trip then has the gradient of a learned step.

    See :func:`lightning_compress.testing.check_quantizer`.
    """

    bits: int
    learned: ClassVar[tuple[str, ...]] = ()
    """Fields of the parameters that training learns; any positive number is a valid value of each."""

    @property
    def num_codes(self) -> int:
        """How many different codes there are, the code of 0 included."""
        return 2**self.bits

    @abstractmethod
    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """Parameters that cover a range; low and high are scalars, or vectors with one entry a channel."""

    @torch.no_grad()
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        """Parameters for given values, of the whole tensor or a channel each; those of their range without better."""
        return self.qparams(*extent(x, axis), axis)

    @abstractmethod
    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Integer codes, in the shape of x."""

    @abstractmethod
    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """The real values that the codes stand for."""

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The round trip, with a straight-through gradient (Bengio 2013, arXiv:1308.3432).

        With a learned scale the gradient is 0 outside the range, and the scale has that of :class:`LearnedStep`.
        """
        held = qparams._replace(scale=qparams.scale.detach())
        with torch.no_grad():
            codes = self.quantize(x, held)
        values = self.dequantize(codes, held)
        if "scale" in self.learned:
            return learned_scale(self, x, qparams, values)
        return values.detach() + (x - x.detach())

    def fake_quantize_fitted(self, x: Tensor, axis: int | None = None) -> Tensor:
        """The round trip with the parameters that :meth:`fit` finds for these very values."""
        return self.fake_quantize(x, self.fit(x.detach(), axis))


@dataclass(frozen=True)
class Affine(Quantizer):
    """Linear quantization: x_int = round((x - x_min) / (x_max - x_min) * (2^n - 1)) (Jacob 2018, arXiv:1712.05877).

    The range is widened to hold 0 and shifted so that 0 falls on a code. The symmetric form uses the codes
    -top .. top around the zero point 0.

    Args:
        bits: Bits per code, 2..8.
        symmetric: Codes around zero, for weights; otherwise 0 .. 2^n - 1, for activations.
        top: Largest code of the symmetric form; None for 2^(n-1) - 1. A :class:`Scheme` sets it where kernels need
            smaller codes.

    Raises:
        ValueError: If bits lies outside 2..8, or top outside 1 .. 2^(n-1) - 1, or codes with a top are not symmetric.

    Example:
        >>> q = Affine(bits=8)
        >>> p = q.qparams(torch.tensor(-1.0), torch.tensor(1.55))
        >>> q.quantize(torch.tensor([-1.0, 0.0, 1.55]), p)
        tensor([  0., 100., 255.])
    """

    bits: int = 8
    symmetric: bool = False
    top: int | None = None

    def __post_init__(self) -> None:
        """Refuse widths that no code has, and a top beyond them."""
        name = type(self).__name__
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"{name}.bits={self.bits!r}: accepted are the whole numbers 2..8, for instance {name}(8).")
        highest = 2 ** (self.bits - 1) - 1
        if self.top is not None and not (self.symmetric and type(self.top) is int and 1 <= self.top <= highest):
            raise ValueError(
                f"{name}.top={self.top!r}: accepted are None and, for symmetric codes, the whole numbers 1..{highest}, "
                f"for instance {name}({self.bits}, symmetric=True, top={highest})."
            )

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest code."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        top = 2 ** (self.bits - 1) - 1 if self.top is None else self.top
        return -top, top

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
        scale, zero_point = (along(t, qparams.axis, x) for t in qparams[:2])
        return ((x * (1 / scale)).round() + zero_point).clamp(*self.limits)

    def dequantize(self, codes: Tensor, qparams: QParams) -> Tensor:
        """(codes - zero_point) * scale."""
        scale, zero_point = (along(t, qparams.axis, codes) for t in qparams[:2])
        return (codes - zero_point) * scale

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The round trip, whose gradient is 0 outside the range."""
        scale, zero_point, axis, *_ = qparams
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            zero_point = 0 if self.symmetric else along(zero_point, axis, x)  # type: ignore[assignment]
            return _RoundTrip.apply(x, along(scale, axis, x), zero_point, *self.limits)
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
    """torch's fused operation bit for bit, in vectorized steps: on a CPU a tenth of its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | int, lowest: int, highest: int) -> Tensor:
        low: Any = lowest - zero_point
        high: Any = highest - zero_point
        if not (isinstance(low, Tensor) and low.dim()):
            low, high = int(low), int(high)
        y = (x * (1 / scale)).round_().clamp_(low, high)
        ctx.save_for_backward(x, scale)
        ctx.ends = low, high
        return y.mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high = ((ctx.ends[0] - 0.5) * scale, (ctx.ends[1] + 0.5) * scale)
        if low.dim() == 0:
            straight = torch.ops.aten.hardtanh_backward(gradient, x, float(low), float(high))
        else:
            straight = gradient * ((x > low) & (x < high))
        return straight, None, None, None, None


class _Round(torch.autograd.Function):
    """The same where nothing is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        return (x * (1 / scale)).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


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
        if self.format not in ("e4m3", "e5m2"):
            raise ValueError(f"Float8.format={self.format!r}: accepted are 'e4m3' and 'e5m2'. Take 'e4m3' if in doubt.")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values before they are scaled."""
        return torch.float8_e4m3fn if self.format == "e4m3" else torch.float8_e5m2

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """The scale that takes the type's largest value to the end of the range."""
        scale = (torch.maximum(-low, high) / torch.finfo(self.dtype).max).clamp(min=1e-12)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), axis)

    def _round(self, x: Tensor, qparams: QParams) -> Tensor:
        most = torch.finfo(self.dtype).max
        return (x / along(qparams.scale, qparams.axis, x)).clamp(-most, most).to(self.dtype)

    def quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """Codes as whole numbers in a float tensor."""
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


def along(values: Tensor, axis: int | None, x: Tensor) -> Tensor:
    """Values of the channels, one each, in a shape that broadcasts against x."""
    return values if axis is None else values.view([-1 if d == axis else 1 for d in range(x.dim())])


def rows(x: Tensor, axis: int | None) -> Tensor:
    """The channels along an axis as rows; one row without an axis."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def extent(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value, of the whole tensor or a channel each."""
    if axis is None:
        low, high = torch.aminmax(x)
        return low, high
    channels = rows(x, axis)
    return channels.amin(1), channels.amax(1)


def occupied(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges, where a channel of zeros takes the widest, so that its scale can be learned; -1..1 without any."""
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


SHARES = tuple(0.94**i for i in range(48))
"""Shares of a range, from all of it down to a twentieth, to look for the best among."""


def least_squares(quantizer: Quantizer, x: Tensor, axis: int | None, base: Tensor | None = None) -> QParams:
    """The parameters of the range with the least squared error."""
    low, high = occupied(*extent(x, axis))
    trials = [quantizer.qparams(*narrow(low, high, share), axis) for share in SHARES]
    trials = trials if base is None else [trial._replace(base=base) for trial in trials]
    best, least = trials[0], torch.full_like(low, torch.inf)
    for trial in trials:
        error = rows(quantizer.dequantize(quantizer.quantize(x, trial), trial) - x, axis).square().sum(1)
        error = error.view(low.shape)
        scale = torch.where(error < least, trial.scale, best.scale)
        zero_point = torch.where(error < least, trial.zero_point, best.zero_point)
        best, least = best._replace(scale=scale, zero_point=zero_point), torch.minimum(error, least)
    return best


def learned_scale(
    quantizer: Quantizer, x: Tensor, qparams: QParams, values: Tensor, only_clipped: bool = False
) -> Tensor:
    """The quantized values, with the gradients of :class:`LearnedStep` or, from what is clipped only, LearnedClip."""
    scale = along(qparams.scale, qparams.axis, x)
    with torch.no_grad():
        ends = (torch.full_like(scale, sign * torch.finfo(scale.dtype).max) for sign in (-1, 1))
        low, high = (quantizer.dequantize(quantizer.quantize(end, qparams), qparams) for end in ends)
    return _LearnedScale.apply(x, scale, values, low, high, only_clipped)


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, values: Tensor, low: Tensor, high: Tensor, only_clipped: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, values, low, high)
        ctx.only_clipped = only_clipped
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, values, low, high = ctx.saved_tensors
        straight = gradient * ((x >= low) & (x <= high))
        moved = (gradient - straight) * values if ctx.only_clipped else gradient * values - straight * x
        return straight, moved.sum_to_size(scale.shape) / scale, gradient, None, None, None
