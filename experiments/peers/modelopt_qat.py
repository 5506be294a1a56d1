"""NVIDIA's Model Optimizer: int8 by its default recipe, then training in fake-quantized values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import onnx
import torch
from modelopt.onnx.quantization.qdq_utils import qdq_to_dq
from torch import Tensor, nn

from experiments.shipping import write_onnx
from experiments.training import Budget, train


def _recipe(bits: int) -> dict[str, Any]:
    recipe: dict[str, Any] = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    if bits != 8:
        recipe["quant_cfg"].append({"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}})
    return recipe


def train_quantized(model: nn.Module, budget: Budget, bits: float) -> nn.Module:
    """Calibrated by the largest value, then trained."""

    def forward_loop(model: nn.Module) -> None:
        with torch.no_grad():
            for part in budget.data.x_train[:512].split(64):
                model(part)

    return train(mtq.quantize(model.eval(), _recipe(int(bits)), forward_loop), budget)


@torch.no_grad()
def _in_bytes(model: nn.Module) -> nn.Module:
    """The same values, whose 4 bits are the lowest of a byte, as it writes no other weights of convolutions."""
    model = copy.deepcopy(model)
    for module in model.modules():
        quantizer: Any = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.num_bits != 8:
            weight: Any = module.weight
            weight.copy_(quantizer(weight))
            quantizer.amax = quantizer.amax * 127 / (2 ** (quantizer.num_bits - 1) - 1)
            quantizer.num_bits = 8
    return model


def write(model: nn.Module, example: Tensor, folder: Path) -> Path:
    """Weights of bytes instead of floats that are rounded when the file is loaded."""
    path = write_onnx(_in_bytes(model), example, folder)
    onnx.save(qdq_to_dq(onnx.load(path)), path)
    return path
