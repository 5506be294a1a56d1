"""Activations of more than 8 bits, as the kernels of each runtime take them.

LiteRT and TensorFlow Lite Micro have integer kernels for them (16x8), around the zero point 0. onnxruntime and Inductor
compute in float around the codes. XNNPACK, and with it ExecuTorch, has no kernel, and OpenVINO drops such codes and the
ends of their range with them (2026.4), so that its file would answer otherwise: both are refused before training.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from lightning_compress.checks import refusal
from lightning_compress.quantization.activation_codes import is_wide
from lightning_compress.quantization.model import quantization_of
from lightning_compress.quantization.quantizer import Quantizer

__all__ = ["Wide", "check_wide"]

Wide = Literal["none", "symmetric", "any"]
"""Which activations of more than 8 bits a runtime takes."""


def check_wide(model: nn.Module, runtime: str, takes: Wide) -> None:
    """Raise if a layer's activations have more codes than a runtime's kernels take; before its training, too.

    Args:
        model: A model whose layers were upgraded.
        runtime: Its name.
        takes: What it takes of more than 8 bits; ``"symmetric"``: 16 bits around 0, in all layers or in none.

    Raises:
        ValueError: With the layer's name.
    """
    quantization = quantization_of(model)
    if quantization is None or takes == "any":
        return
    inputs = {layer.name: quantization.scheme.for_layer(layer.name).inputs for layer in quantization.layers}
    if not any(map(is_wide, inputs.values())):
        return
    for name, quantizer in inputs.items():
        if takes == "none" and is_wide(quantizer):
            accepted = f"a Quantizer of at most 8 bits, or None, in {runtime}"
            raise refusal(f"Scheme.inputs at {name}", quantizer, accepted, "Take int8(), or leave the format out.")
        if takes == "symmetric" and quantizer is not None and not _is_symmetric(quantizer):
            accepted = f"Affine(16, symmetric=True), or a Quantizer of at most 8 bits in all layers, in {runtime}"
            raise refusal(f"Scheme.inputs at {name}", quantizer, accepted, "Take w8a16(), or leave the format out.")


def _is_symmetric(quantizer: Quantizer) -> bool:
    """Whether it has the codes of 16 bits around 0, whatever the range."""
    zero_point = quantizer.qparams(torch.tensor(-1.0), torch.tensor(0.5)).zero_point
    return quantizer.bits == 16 and not zero_point.any()
