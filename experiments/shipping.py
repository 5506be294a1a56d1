"""Files as they ship, whoever wrote them: written plainly, opened in their runtime on one thread, weighed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_compress.deploy.size import weigh

__all__ = ["RUNTIMES", "open_file", "weigh", "write_onnx"]

Answer = Callable[[Tensor], Tensor]


def write_onnx(model: nn.Module, example: Tensor, folder: Path) -> Path:
    """A float model as torch's exporter has it; the one that captures no graph takes a tenth of the time."""
    path = folder / "model.onnx"
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (example,), path, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes
        )
    return path


def _onnx(path: Path) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])


def _openvino(path: Path) -> Answer:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda x: torch.from_numpy(compiled([x.contiguous().numpy()])[0])


def _torch(path: Path) -> Answer:
    model: Answer = torch.export.load(path).module()
    return model


RUNTIMES: dict[str, tuple[str, Callable[[Path], Answer]]] = {
    ".onnx": ("onnxruntime", _onnx),
    ".xml": ("OpenVINO", _openvino),
    ".pt2": ("torch.export", _torch),
}


def open_file(path: Path) -> Answer:
    """What the file answers in its runtime."""
    return RUNTIMES[path.suffix][1](path)
