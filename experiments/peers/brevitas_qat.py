"""Brevitas: layers replaced by its own, whose scales are learned with the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from brevitas import nn as qnn
from brevitas.export import export_onnx_qcdq
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE
from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat
from torch import Tensor, nn

from experiments.training import Budget, train

LAYERS = {nn.Linear: qnn.QuantLinear, nn.Conv1d: qnn.QuantConv1d, nn.Conv2d: qnn.QuantConv2d}


def train_quantized(model: nn.Module, budget: Budget, bits: float) -> nn.Module:
    """A learned scale a channel that begins at the least squared error, and activations from calibration."""
    options = {
        "weight_quant": Int8WeightPerChannelFloatMSE,
        "weight_bit_width": int(bits),
        "input_quant": ShiftedUint8ActPerTensorFloat,
        "return_quant_tensor": False,
    }
    model = layerwise_quantize(model.eval(), {kind: (layer, dict(options)) for kind, layer in LAYERS.items()})
    with torch.no_grad(), calibration_mode(model):
        for part in budget.data.x_train[:512].split(64):
            model(part)
    return train(model, budget)


def write(model: nn.Module, example: Tensor, folder: Path) -> Path:
    """ONNX with whole weights, clipped to their bits."""
    path = folder / "model.onnx"
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    export_onnx_qcdq(
        model.eval(),
        args=example,
        export_path=str(path),
        input_names=["x"],
        output_names=["y"],
        dynamic_axes=axes,
        dynamo=False,
    )
    return path
