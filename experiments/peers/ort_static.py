"""onnxruntime's static quantization: ranges of a trained model's values from examples, and no training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from experiments.peers.plain import global_magnitude
from experiments.shipping import write_onnx
from experiments.training import Budget

EXAMPLES, BATCH = 512, 64  # of the training part, as they are


class Calibrated(nn.Module):
    """A model beside the examples that its file will be calibrated with."""

    def __init__(self, model: nn.Module, examples: Tensor) -> None:
        super().__init__()
        self.model, self.examples = model, examples

    def forward(self, x: Tensor) -> Tensor:
        """The model's."""
        outputs: Tensor = self.model(x)
        return outputs


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


def write(model: Calibrated, example: Tensor, folder: Path) -> Path:
    """Weights of signed bytes per channel, activations of signed bytes, as its guide recommends on processors."""
    whole, prepared, path = write_onnx(model.model, example, folder), folder / "prepared.onnx", folder / "int8.onnx"
    quant_pre_process(whole, prepared)
    quantize_static(
        prepared,
        path,
        _Reader(model.examples),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    return path
