"""OpenVINO: write the intermediate representation, by way of the ONNX file, and run it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress.deploy import onnx
from lightning_compress.deploy.graph import tensors_of
from lightning_compress.deploy.interface import filled
from lightning_compress.deploy.openvino_graph import spell_out
from lightning_compress.deploy.runner import Kernels
from lightning_compress.files import replacing
from lightning_compress.forward import Inputs

__all__ = ["Runner", "export"]

_HEAVY = ("Convolution", "FullyConnected", "Deconvolution", "GroupConvolution", "RNNSeq", "RNNCell")


def export(model: nn.Module, inputs: Inputs, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the graph to ``path`` and the weights to a ``.bin`` file beside it, with a dynamic batch axis.

    Args:
        model: In eval mode on the CPU; converted with uint8 activations, or in float.
        inputs: Example inputs.
        path: The ``.xml`` file to write.
        metadata: What the file says of itself, by name.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx.export(model, inputs, Path(folder, "model.onnx"), for_onnxruntime=False)
        # not convert_model, which lets layers with equal weights share what decodes them: with two readers it is float
        converted = openvino.Core().read_model(Path(folder, "model.onnx"))
        spell_out(converted)
        for key, value in (metadata or {}).items():
            converted.set_rt_info(value, ["lightning_compress", key])
        with replacing(path, ".bin") as temporary:
            openvino.save_model(converted, temporary, compress_to_fp16=False)


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
        self.open_axes = [{i for i, n in enumerate(x.partial_shape) if n.is_dynamic} for x in self.model.inputs]
        self.request = self.model.create_infer_request()
        self.example_outputs = example_outputs

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs as tensors, in the model's own structure."""
        found = self.request.infer([x.detach().cpu().numpy() for x in tensors_of(inputs)])
        return filled(self.example_outputs, [torch.from_numpy(found[port].copy()) for port in self.model.outputs])

    def prepare(self, inputs: Inputs) -> Any:
        """A call without arguments that runs the file and nothing else, to be timed."""
        feed = [x.detach().cpu().numpy() for x in tensors_of(inputs)]
        request = self.model.create_infer_request()
        return lambda: request.infer(feed, share_outputs=True)  # to an input that is shared it writes (2026.4)

    def integer_kernels(self) -> Kernels:
        """Counted from the compiled graph: the kernel that each node runs in."""
        heavy = self._heavy()
        return Kernels(sum(_is_integer(kernel) for _, kernel in heavy), len(heavy))

    def float_kernels(self) -> list[tuple[str, str]]:
        """Types of those that run in float; their modules it does not tell."""
        return [("", kind) for kind, kernel in self._heavy() if not _is_integer(kernel)]

    def _heavy(self) -> list[tuple[str, str]]:
        nodes = [node.get_rt_info() for node in self.model.get_runtime_model().get_ops()]
        found = [(str(info["layerType"].value), str(info["primitiveType"].value)) for info in nodes]
        return [(kind, kernel) for kind, kernel in found if kind in _HEAVY]


def _is_integer(kernel: str) -> bool:
    # such as jit_avx2_I8; the precision of a node is also i8 where brgemm_avx2_f32 decodes weights as it reads them
    return kernel.lower().endswith("i8")
