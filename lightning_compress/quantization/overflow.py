"""Which weights fit the integer kernels of every x86 CPU.

Where a CPU has AVX2 and no VNNI, the uint8 x int8 kernels of onnxruntime, OpenVINO and Inductor multiply with
``vpmaddubsw``: two products are added in 16 bits, and what does not fit saturates without a word. Two weights of 127
and two activations of 255 give 64,770, of which 32,767 is left. ExecuTorch and LiteRT (XNNPACK), ARM and CPUs with
VNNI add in 32 bits.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.quantizer import Quantizer, rows

__all__ = ["fits_pairs", "portable"]

_MOST = 2**15 - 1


def portable(weight: Quantizer, inputs: Quantizer | None) -> Quantizer:
    """The quantizer of a weight, with its codes narrowed to what no pair of products can overflow.

    The same quantizer is returned where nothing can overflow: fewer bits, activations of fewer bits, of 16 or in float.

    Args:
        weight: The quantizer of the weight.
        inputs: The quantizer of the activations that the weight meets; None where they stay in float.

    Example:
        >>> portable(Affine(8, symmetric=True), Affine(8)).limits
        (-64, 64)
        >>> portable(Affine(8, symmetric=True), None).limits, portable(Affine(4, symmetric=True), Affine(8)).limits
        ((-127, 127), (-7, 7))
    """
    if inputs is None or not isinstance(weight, Affine) or not weight.symmetric:
        return weight
    if inputs.num_codes > 256:  # no such kernel takes them
        return weight
    top = _MOST // (2 * (inputs.num_codes - 1))
    return replace(weight, top=top) if weight.limits[1] > top else weight


def fits_pairs(codes: Tensor, axis: int, largest: int) -> bool:
    """Whether the products of any two weights of an output channel fit into 16 bits together.

    Kernels differ in which two they add, so the two largest codes of the same sign decide.

    Args:
        codes: Integer codes of a weight, in its shape.
        axis: Axis of the output channels.
        largest: Largest code of the activations that they meet, as an unsigned integer.

    Example:
        >>> import torch
        >>> fits_pairs(torch.tensor([[127, 1, -127]]), 0, 255), fits_pairs(torch.tensor([[127, 2, 0]]), 0, 255)
        (True, False)
    """
    channels = rows(codes.int(), axis)
    pair = min(2, channels.shape[1])
    highest = channels.clamp(min=0).topk(pair, dim=1).values.sum(1)
    lowest = (-channels).clamp(min=0).topk(pair, dim=1).values.sum(1)
    # -32,768 fits too, but no product of 255 lies between it and -32,767
    return not codes.numel() or largest * int(max(highest.max(), lowest.max())) <= _MOST
