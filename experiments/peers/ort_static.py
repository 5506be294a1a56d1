"""onnxruntime's static quantization: ranges of a trained model's values from examples, and no training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from experiments.peers.around import Around
from experiments.peers.plain import global_magnitude
from experiments.shipping import open_file, write_onnx
from experiments.training import Budget

EXAMPLES, BATCH = 1024, 64  # of the training part, as they are
METHODS = (CalibrationMethod.MinMax, CalibrationMethod.Percentile)


class Calibrated(Around):
    """A model beside the examples that its file will be calibrated with."""

    def __init__(self, model: nn.Module, examples: Tensor) -> None:
        super().__init__(model)
        self.examples = examples


class _Reader(CalibrationDataReader):
    def __init__(self, examples: Tensor) -> None:
        self.parts: Iterator[Tensor] = iter(examples.split(BATCH))

    def get_next(self) -> dict[str, Any] | None:
        """A batch by its input's name, until there is none."""
        part = next(self.parts, None)
        return None if part is None else {"x": part.contiguous().numpy()}


def as_it_is(model: nn.Module, budget: Budget, bits: float) -> nn.Module:
    """The trained model: what becomes of it is decided when it is written."""
    return Calibrated(model, budget.data.x_train[:EXAMPLES])


def pruned(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Pruned by hand first, which is all that a user without another tool does."""
    return Calibrated(global_magnitude(model, budget, sparsity), budget.data.x_train[:EXAMPLES])


def _quantized(prepared: Path, examples: Tensor, method: CalibrationMethod) -> Path:
    """Weights of signed bytes per channel, activations of signed bytes, as its guide recommends on processors."""
    path = prepared.with_name(f"{method.name}.onnx")
    quantize_static(
        prepared,
        path,
        _Reader(examples[: len(examples) // 2]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
    )
    return path


def write(model: Calibrated, example: Tensor, folder: Path) -> Path:
    """By the way of calibration whose file is nearer to the model on examples that it was not calibrated with."""
    whole, prepared = write_onnx(model.model, example, folder), folder / "prepared.onnx"
    quant_pre_process(whole, prepared)
    paths = [_quantized(prepared, model.examples, method) for method in METHODS]
    held_out = model.examples[len(model.examples) // 2 :]
    with torch.no_grad():
        expected = model(held_out)
    return min(paths, key=lambda path: float((open_file(path)(held_out) - expected).square().mean()))
