"""Activations as integer codes: the operations of a file that stand where training fake-quantized."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize
from lightning_compress.quantization.model import quantization_of
from lightning_compress.quantization.quantizer import QParams, Quantizer

__all__ = ["INTEGERS", "Activations", "QuantizeDequantize", "code_types", "ends", "is_wide"]

Activations = Literal["uint8", "int8"]


class _Integers(NamedTuple):
    lowest: int
    highest: int
    dtype: torch.dtype


INTEGERS = {"uint8": _Integers(0, 255, torch.uint8), "int8": _Integers(-128, 127, torch.int8)}
_WIDE = _Integers(-(2**15), 2**15 - 1, torch.int16)


class QuantizeDequantize:
    """The operations that stand where an activation's fake quantization stood.

    Codes of more than 8 bits are int16 in every file, those around 0 as they are, which LiteRT asks for. Symmetric ones
    of 16 bits leave -32,768 to the operation, a step below the range: no kernel knows a clip that would forbid it.

    Args:
        activation: The fake quantization.
        kind: The integers of 8 bits of the file; a type shifts the zero point by 128 against the other, which is exact.
    """

    def __init__(self, activation: ActivationFakeQuantize, kind: Activations) -> None:
        qparams = activation.qparams()
        first, last = ends(activation.quantizer, qparams)
        self.largest = last - first
        wide = is_wide(activation.quantizer)
        self.integers = _WIDE if wide else INTEGERS[kind]
        shift = 0 if wide and last <= _WIDE.highest else self.integers.lowest - first
        self.scale = float(qparams.scale)
        self.zero_point = int(qparams.zero_point) + shift
        self.limits = None
        if self.largest < (2**16 - 2 if wide else 255):  # the operation saturates at the ends of its type only
            begin = (first - int(qparams.zero_point)) * self.scale
            self.limits = begin, begin + self.largest * self.scale

    def __call__(self, x: object) -> Any:
        """The value quantized and dequantized; what is not a float tensor passes."""
        if not isinstance(x, Tensor) or not torch.is_floating_point(x):
            return x
        if self.limits is not None:
            x = x.clamp(*self.limits)
        ops = torch.ops.quantized_decomposed
        q = ops.quantize_per_tensor(x, self.scale, self.zero_point, *self.integers)
        return ops.dequantize_per_tensor(q, self.scale, self.zero_point, *self.integers)


def is_wide(quantizer: Quantizer | None) -> bool:
    """Whether activations have more codes than 8 bits hold."""
    return quantizer is not None and quantizer.num_codes > 256


def ends(quantizer: Quantizer, qparams: QParams) -> tuple[int, int]:
    """The first and the last code."""
    most = torch.finfo(torch.float32).max / 4
    low, high = quantizer.quantize(torch.tensor([-most, most]), qparams).detach().tolist()
    return int(low), int(high)


def code_types(model: nn.Module, narrow: str) -> str:
    """The types of a quantized model's activations in a file.

    Args:
        model: A quantized model.
        narrow: The type of those of 8 bits.

    """
    quantization = quantization_of(model)
    activations = quantization.activations.values() if quantization is not None else []
    found = {is_wide(activation.quantizer) for activation in activations} or {False}
    return " and ".join("int16" if wide else narrow for wide in sorted(found))
