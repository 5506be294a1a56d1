"""LiteRT: write a .tflite file for phones and boards, and run it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_compress.deploy.graph import capture, has_quantized_values, has_wide_values, quantize_outputs, tensors_of
from lightning_compress.deploy.interface import filled
from lightning_compress.deploy.quiet import quiet
from lightning_compress.deploy.runner import Kernels, in_batches, pieces_of
from lightning_compress.deploy.scales import spell_out_scales, split_weights
from lightning_compress.deploy.tflite_biases import widen_biases
from lightning_compress.files import write_whole
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
    with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        import litert_torch
        from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
        from litert_torch.quantize.quant_config import QuantConfig

        example = with_batch(inputs, batch_size)
        graph = capture(model, example)
        config = None
        if has_quantized_values(graph):
            split_weights(graph)
            spell_out_scales(graph, parts_again=False)
            quantize_outputs(graph, [tensors_of(piece) for piece in pieces_of(inputs, batch_size)])
            symmetric = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
            config = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(symmetric))
        converted = litert_torch.convert(_Captured(graph).eval(), tensors_of(example), quant_config=config)
        # its own way to a file ends the process where the disk is full
        file = bytes(converted._exporter.to_bytes())  # noqa: SLF001
    write_whole(path, widen_biases(file) if has_wide_values(graph) else file)


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
        reference: Compute in LiteRT's reference kernels instead of XNNPACK's.
        preserve: Keep every value until the next call.
    """

    runtime = "litert"

    def __init__(self, path: Path, example_outputs: Any, reference: bool = False, preserve: bool = False) -> None:
        with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            from ai_edge_litert.interpreter import Interpreter, OpResolverType

            kernels = OpResolverType.BUILTIN_REF if reference else OpResolverType.AUTO
            options = {"experimental_op_resolver_type": kernels, "experimental_preserve_all_tensors": preserve}
            self.interpreter = Interpreter(str(path), num_threads=1, **options)
            self.interpreter.allocate_tensors()
        self.inputs = sorted(self.interpreter.get_input_details(), key=lambda d: _number(d["name"]))
        self.outputs = sorted(self.interpreter.get_output_details(), key=lambda d: _number(d["name"]))
        self.batch_size = next((int(d["shape"][0]) for d in self.inputs if len(d["shape"])), 1)
        self.example_outputs = example_outputs

    def codes_of(self, inputs: Inputs) -> list[np.ndarray]:
        """Inputs as the file takes them: integer codes where it does, in the order of the model's arguments."""
        found = []
        for detail, x in zip(self.inputs, tensors_of(inputs), strict=True):
            values = x.detach().cpu().numpy()
            scale, zero_point = detail["quantization"]
            kind = np.iinfo(detail["dtype"]) if scale else None
            if kind is not None:
                values = np.clip(np.round(values / np.float32(scale)) + zero_point, kind.min, kind.max)
            found.append(np.ascontiguousarray(values, dtype=detail["dtype"]))
        return found

    def run_codes(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs as the file gives them, for one batch as it takes it."""
        self._set(codes)
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(detail["index"]) for detail in self.outputs]

    def _set(self, codes: Sequence[np.ndarray]) -> None:
        for detail, values in zip(self.inputs, codes, strict=True):
            self.interpreter.set_tensor(detail["index"], values)

    def _run(self, inputs: Inputs) -> list[Tensor]:
        outputs = []
        for detail, values in zip(self.outputs, self.run_codes(self.codes_of(inputs)), strict=True):
            scale, zero_point = detail["quantization"]
            if scale:
                values = (values.astype(np.float32) - zero_point) * np.float32(scale)
            outputs.append(torch.from_numpy(values))
        return outputs

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs as float tensors, in the model's own structure."""
        return filled(self.example_outputs, in_batches(self._run, inputs, self.batch_size))

    def prepare(self, inputs: Inputs) -> Any:
        """A call without arguments that runs the file once and nothing else, to be timed."""
        self._set(self.codes_of(with_batch(inputs, self.batch_size)))
        return self.interpreter.invoke

    def integer_kernels(self) -> Kernels:
        """Counted from the interpreter's operations: the types of input, of 8 bits or 16, and weight, of 8."""
        types = {d["index"]: d["dtype"] for d in self.interpreter.get_tensor_details()}
        # the interpreter shows its operations nowhere else
        heavy = [op for op in self.interpreter._get_ops_details() if op["op_name"] in _HEAVY]  # noqa: SLF001
        read = [op["inputs"][1:3] if op["op_name"] == "TRANSPOSE_CONV" else op["inputs"][:2] for op in heavy]
        pairs = [{types[int(i)] for i in pair} for pair in read]
        return Kernels(sum(np.int8 in pair and pair <= {np.int8, np.int16} for pair in pairs), len(heavy))


def _number(name: str) -> int:
    """The place of an input (``serving_default_args_1:0``) or output (``StatefulPartitionedCall:1``) in its list."""
    found = re.search(r"args_(\d+)", name) or re.search(r":(\d+)$", name)
    return int(found[1]) if found else 0
