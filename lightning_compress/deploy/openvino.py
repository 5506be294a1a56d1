"""OpenVINO: write the intermediate representation, by way of the ONNX file, and run it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from lightning_compress.deploy import onnx
from lightning_compress.deploy.graph import tensors_of
from lightning_compress.deploy.runner import Kernels
from lightning_compress.forward import Inputs

__all__ = ["Runner", "export"]

_HEAVY = ("Convolution", "FullyConnected", "Deconvolution", "GroupConvolution", "RNNSeq", "RNNCell")


def export(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write the graph to ``path`` and the weights to a ``.bin`` file beside it, with a dynamic batch axis.

    Args:
        model: In eval mode on the CPU; converted with uint8 activations, or in float.
        inputs: Example inputs.
        path: The ``.xml`` file to write.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx.export(model, inputs, Path(folder, "model.onnx"))
        converted = openvino.convert_model(Path(folder, "model.onnx"))
        path.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(converted, path, compress_to_fp16=False)


class Runner:
    """Runs a file on the CPU with OpenVINO, single-threaded.

    Args:
        path: The ``.xml`` file; its ``.bin`` lies beside it.
        example_outputs: Outputs of the model, whose structure the runner gives back.
    """

    runtime = "openvino"

    def __init__(self, path: Path, example_outputs: Any) -> None:
        import openvino

        config = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self.model = openvino.Core().compile_model(path, "CPU", config)
        self.request = self.model.create_infer_request()
        self.structure = torch.utils._pytree.tree_structure(example_outputs)

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs as tensors, in the model's own structure."""
        found = self.request.infer([x.detach().cpu().numpy() for x in tensors_of(inputs)])
        return tree_unflatten([torch.from_numpy(found[port].copy()) for port in self.model.outputs], self.structure)

    def prepare(self, inputs: Inputs) -> Any:
        """A call without arguments that runs the file and nothing else, to be timed."""
        feed = [x.detach().cpu().numpy() for x in tensors_of(inputs)]
        request = self.model.create_infer_request()
        return lambda: request.infer(feed, share_outputs=True)  # to an input that is shared it writes (2026.4)

    def integer_kernels(self) -> Kernels:
        """Counted from the compiled graph: the precision that each node runs in."""
        nodes = [node.get_rt_info() for node in self.model.get_runtime_model().get_ops()]
        heavy = [str(info["runtimePrecision"].value) for info in nodes if str(info["layerType"].value) in _HEAVY]
        return Kernels(sum(precision in ("i8", "u8") for precision in heavy), len(heavy))
