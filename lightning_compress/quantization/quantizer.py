"""How numbers are written: the contract of a quantizer, real values to integer codes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

__all__ = ["QParams", "Quantizer", "along", "extent", "learned_scale", "rows"]


class QParams(NamedTuple):
    """Parameters of a quantizer.

    Shapes, for a weight of shape (out, in, *kernel):

    ======================  ================================  ========  ====================================
    granularity             ``scale``, ``zero_point``         ``axis``  values that share a scale
    ======================  ================================  ========  ====================================
    tensor, activations     ()                                None      all
    channel                 (out,)                            0         in * kernel
    channel, transposed     (out,); the weight is (in, out)   1         in * kernel
    group of g              (out * in * kernel / g,)          0         g, of the weight as rows of g values
    ======================  ================================  ========  ====================================

    Args:
        scale: Size of a step, or the value of the largest level.
        zero_point: The code that stands for 0, int32, in the shape of ``scale``.
        axis: Axis of the channels, or None for one scale for the whole tensor.
        base: For exponential levels: neighbours lie a factor of 1 + base apart, so that any positive number is valid.
            Shape ().
        levels: For a codebook: the ascending values of its codes as fractions of ``scale``, with 0 among them. Shape
            (num_codes,).
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
        """Number of different codes, the code of 0 included."""
        return 2**self.bits

    @abstractmethod
    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        """Parameters that cover a range.

        Args:
            low: Lowest value: a scalar, or a vector with one entry per channel.
            high: Highest value, in the same shape.
            axis: Axis of the channels, None for scalars.
        """

    @torch.no_grad()
    def fit(self, x: Tensor, axis: int | None = None) -> QParams:
        """Parameters for given values, per tensor (``axis=None``) or per channel: by default those of their range."""
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


def along(values: Tensor, axis: int | None, x: Tensor) -> Tensor:
    """Values of the channels, one each, in a shape that broadcasts against x."""
    if axis is None:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.view(shape)


def rows(x: Tensor, axis: int | None) -> Tensor:
    """The channels along an axis as rows; one row without an axis."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def extent(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value, per tensor (``axis=None``) or per channel."""
    if axis is None:
        low, high = torch.aminmax(x)
        return low, high
    channels = rows(x, axis)
    # along an axis aminmax takes ten times as long
    return channels.amin(1), channels.amax(1)


def learned_scale(
    quantizer: Quantizer, x: Tensor, qparams: QParams, values: Tensor, only_clipped: bool = False
) -> Tensor:
    """The quantized values, with the gradients of :class:`LearnedStep` or, from what is clipped only, LearnedClip."""
    scale = along(qparams.scale, qparams.axis, x)
    with torch.no_grad():
        farthest = torch.full_like(scale, torch.finfo(scale.dtype).max)
        low = quantizer.dequantize(quantizer.quantize(-farthest, qparams), qparams)
        high = quantizer.dequantize(quantizer.quantize(farthest, qparams), qparams)
    return _LearnedScale.apply(x, scale, values, low, high, only_clipped)


_SLACK = 1e-6  # of a range


class _LearnedScale(torch.autograd.Function):
    """Values that are quantized already; d value / d scale is (value - x) / scale inside the range."""

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
        # A range's largest value lies on the bound of its codes: the last bit of a float must not say on which side.
        slack = _SLACK * (high - low)
        straight = gradient * ((x >= low - slack) & (x <= high + slack))
        moved = (gradient - straight) * values if ctx.only_clipped else gradient * values - straight * x
        return straight, moved.sum_to_size(scale.shape) / scale, gradient, None, None, None
