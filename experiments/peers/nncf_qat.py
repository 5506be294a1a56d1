"""NNCF: post-training quantization, then training in fake-quantized values, then OpenVINO."""

from __future__ import annotations

import os
from pathlib import Path

import nncf
import openvino
from torch import Tensor, nn

from experiments.peers.around import Around
from experiments.training import Budget, train

os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # its kernels are compiled once, for as long as that takes


def train_quantized(model: nn.Module, budget: Budget, bits: float) -> nn.Module:
    """Calibrated with its defaults on training batches, then trained."""
    batches = nncf.Dataset(budget.data.x_train[:512].split(64))
    # what it adds to a Sequential would be called as one more layer
    return train(nncf.quantize(Around(model).eval(), batches), budget)


def write(model: nn.Module, example: Tensor, folder: Path) -> Path:
    """What OpenVINO converts: weights of bytes, and fake quantization of activations, which it runs in int8."""
    path = folder / "model.xml"
    shape = openvino.PartialShape([-1, *example.shape[1:]])
    stripped = nncf.strip(model.eval(), example_input=example)
    openvino.save_model(
        openvino.convert_model(stripped, example_input=example, input=shape), path, compress_to_fp16=False
    )
    return path
