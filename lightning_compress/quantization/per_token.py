"""Activations whose range is found as the model runs: that of each token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.quantizer import QParams

if TYPE_CHECKING:
    from lightning_compress.quantization.definition import Scheme
    from lightning_compress.quantization.placement import Placement

__all__ = ["PerToken", "at_their_readers"]


@dataclass(frozen=True)
class PerToken(Affine):
    """8 bits with the range of the token itself, found in training as in the file: dynamic quantization.

    A token is all values along the last axis. Nothing is calibrated and nothing clipped; layers quantize what they
    read, and what lies between them stays in float. The parameters are those of XNNPACK's dynamic kernels (8da4w).

    Raises:
        ValueError: If it is not of 8 bits and asymmetric, which no kernel computes.

    Example:
        >>> q = PerToken()
        >>> x = torch.tensor([[0.0, 1.0, 2.55], [0.0, 100.0, 255.0]])
        >>> q.fake_quantize(x, q.qparams(x.min(), x.max()))
        tensor([[  0.0000,   1.0000,   2.5500],
                [  0.0000, 100.0000, 255.0000]])
    """

    most_bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        """Refuse what the kernels do not compute."""
        super().__post_init__()
        if self.bits != 8 or self.symmetric:
            given = f"PerToken.bits={self.bits}, PerToken.symmetric={self.symmetric}"
            raise ValueError(
                f"{given}: accepted is PerToken() alone, 8 bits from the lowest to the highest value. Leave both out."
            )

    @staticmethod
    def of_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points (codes -128..127) of shape (..., 1), both in float."""
        low = x.amin(-1, keepdim=True).clamp(max=0)
        high = x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).eps)
        # of the two ends, the one whose error is smaller decides
        begin = low / scale
        end = high / scale
        zero_point = torch.where(begin + end - 1.0 > 0, -128 - begin, 127 - end)
        return scale, zero_point.clamp(-128, 127).round()

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """The round trip by each token's own range, whatever range was seen before; a straight-through gradient."""
        if x.dim() == 0 or not x.numel():
            return x
        with torch.no_grad():
            scale, zero_point = self.of_tokens(x)
            codes = (x * (1.0 / scale) + zero_point).round().clamp(-128, 127)
            values = (codes - zero_point) * scale
        return values + (x - x.detach()) if torch.is_grad_enabled() else values


def at_their_readers(placement: Placement, scheme: Scheme) -> Placement:
    """A placement in which layers that quantize by token quantize what they read themselves.

    What no other layer reads stays in float: the sums of residual connections, say.
    """
    by_token = {name for name in placement.feeds if isinstance(scheme.for_layer(name).inputs, PerToken)}
    read_by: dict[str, list[str]] = {}
    for layer, place in placement.feeds.items():
        read_by.setdefault(place, []).append(layer)

    def stays(place: str) -> bool:
        readers = read_by.get(place)
        if readers is None:
            return not isinstance(scheme.for_layer(place.partition(":")[0]).inputs, PerToken)
        return any(layer not in by_token for layer in readers)

    def own_place(layer: str) -> str:
        return f"{layer}:input" if layer in placement.ran else ""  # a raw parameter is called by nobody

    own = [name for name in placement.ran if name in by_token]
    return replace(
        placement,
        inputs=list(dict.fromkeys([*(name for name in placement.inputs if stays(f"{name}:input")), *own])),
        outputs=[name for name in placement.outputs if stays(f"{name}:output")],
        calls=[place for place in placement.calls if stays(place)],
        feeds={layer: own_place(layer) if layer in by_token else place for layer, place in placement.feeds.items()},
    )
