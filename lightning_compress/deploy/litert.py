"""LiteRT: write a .tflite file for phones and boards, and run it."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_unflatten

from lightning_compress.deploy.graph import capture, has_quantized_values, quantize_outputs, tensors_of
from lightning_compress.deploy.runner import Kernels, in_batches, pieces_of
from lightning_compress.forward import Inputs, with_batch

__all__ = ["Runner", "export"]

_HEAVY = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "FULLY_CONNECTED")


def export(model: nn.Module, inputs: Inputs, path: Path, batch_size: int = 1) -> None:
    """Write a .tflite file of one batch size.

    Its kernels are integer in and out, so an output that training left in float (the last layer's) is quantized with
    its range on the example inputs: give a batch of real ones.

    Args:
        model: In eval mode on the CPU; converted with int8 activations and rounded weights, or in float.
        inputs: Example inputs.
        path: The file to write.
        batch_size: Batch size of the file.
    """
    with _quiet():
        import litert_torch
        from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
        from litert_torch.quantize.quant_config import QuantConfig

        example = with_batch(inputs, batch_size)
        graph = capture(model, example)
        config = None
        if has_quantized_values(graph):
            quantize_outputs(graph, [tensors_of(piece) for piece in pieces_of(inputs, batch_size)])
            symmetric = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
            config = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(symmetric))
        converted = litert_torch.convert(_Captured(graph).eval(), tensors_of(example), quant_config=config)
        path.parent.mkdir(parents=True, exist_ok=True)
        converted.export(str(path))


class _Captured(nn.Module):
    """A graph as a module that can be asked for eval mode."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, *tensors: Tensor) -> Any:
        return self.graph_module(*tensors)

    def train(self, mode: bool = True) -> _Captured:
        self.training = mode
        return self


class Runner:
    """Runs a .tflite file with ai-edge-litert, single-threaded; batches of another size run in pieces.

    Args:
        path: The file.
        example_outputs: Outputs of the model, whose structure the runner gives back.
    """

    runtime = "litert"

    def __init__(self, path: Path, example_outputs: Any) -> None:
        with _quiet():
            from ai_edge_litert.interpreter import Interpreter

            self.interpreter = Interpreter(model_path=str(path), num_threads=1)
            self.interpreter.allocate_tensors()
        self.inputs = sorted(self.interpreter.get_input_details(), key=lambda d: _number(d["name"]))
        self.outputs = sorted(self.interpreter.get_output_details(), key=lambda d: _number(d["name"]))
        self.batch_size = next((int(d["shape"][0]) for d in self.inputs if len(d["shape"])), 1)
        self.structure = torch.utils._pytree.tree_structure(example_outputs)

    def _set(self, inputs: Inputs) -> None:
        for detail, x in zip(self.inputs, tensors_of(inputs), strict=True):
            values = x.detach().cpu().numpy()
            scale, zero_point = detail["quantization"]
            kind = np.iinfo(detail["dtype"]) if scale else None
            if kind is not None:
                values = np.clip(np.round(values / np.float32(scale)) + zero_point, kind.min, kind.max)
            self.interpreter.set_tensor(detail["index"], np.ascontiguousarray(values, dtype=detail["dtype"]))

    def _run(self, inputs: Inputs) -> list[Tensor]:
        self._set(inputs)
        self.interpreter.invoke()
        outputs = []
        for detail in self.outputs:
            values = self.interpreter.get_tensor(detail["index"])
            (scale, zero_point) = detail["quantization"]
            if scale:
                values = (values.astype(np.float32) - zero_point) * np.float32(scale)
            outputs.append(torch.from_numpy(values))
        return outputs

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs as float tensors, in the model's own structure."""
        return tree_unflatten(in_batches(self._run, inputs, self.batch_size), self.structure)

    def prepare(self, inputs: Inputs) -> Any:
        """A call without arguments that runs the file once and nothing else, to be timed."""
        self._set(with_batch(inputs, self.batch_size))
        return self.interpreter.invoke

    def integer_kernels(self) -> Kernels:
        """Counted from the interpreter's operations: the types of input and weight."""
        types = {d["index"]: d["dtype"] for d in self.interpreter.get_tensor_details()}
        # the interpreter shows its operations nowhere else
        heavy = [op for op in self.interpreter._get_ops_details() if op["op_name"] in _HEAVY]  # noqa: SLF001
        read = [op["inputs"][1:3] if op["op_name"] == "TRANSPOSE_CONV" else op["inputs"][:2] for op in heavy]
        return Kernels(sum(all(types[int(i)] == np.int8 for i in pair) for pair in read), len(heavy))


def _number(name: str) -> int:
    """The place of an input (``serving_default_args_1:0``) or output (``StatefulPartitionedCall:1``) in its list."""
    found = re.search(r"args_(\d+)", name) or re.search(r":(\d+)$", name)
    return int(found[1]) if found else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's progress."""
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.setLevel(level)
