"""torchao's quantization of an exported graph, as ExecuTorch's XNNPACK and torch.compile's x86 take it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.quantization import pt2e
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

from experiments.peers.around import Around
from experiments.training import Budget, train

OBSERVED = 0.5  # after this share of the steps observers stand still


def _captured(model: nn.Module, example: Tensor) -> torch.fx.GraphModule:
    shapes = ({0: torch.export.Dim("batch")},)
    module: torch.fx.GraphModule = torch.export.export(model, (example,), dynamic_shapes=shapes).module()
    return module


def train_quantized(model: nn.Module, budget: Budget, bits: float) -> nn.Module:
    """In fake-quantized values from the first step on; in the second half observers stand still."""
    # that of x86 would leave convolutions over time in float
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    quantizer = XNNPACKQuantizer().set_global(config)
    prepared = prepare_qat_pt2e(_captured(model, budget.data.x_train[:2]), quantizer)
    pt2e.allow_exported_model_train_eval(prepared)

    def before(step: int, num_steps: int) -> None:
        if step == int(OBSERVED * num_steps):
            prepared.apply(pt2e.disable_observer)

    return train(Around(prepared), budget, before)  # whose eval gives itself back


def write(model: Around, example: Tensor, folder: Path) -> Path:
    """The converted graph as ONNX: torch's own file of it would be ten times as large."""
    path = folder / "model.onnx"
    converted = convert_pt2e(copy.deepcopy(model.eval().model))
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        converted, (example,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
    )
    return path
