"""ONNX: write the file, and run it in onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.deploy.interface import Axes, axes_to_try, filled, first_to_work, output_names
from lightning_compress.deploy.nbits import export_options, matmul_nbits
from lightning_compress.deploy.onnx_codes import (
    codes_behind_moves,
    integer_biases,
    multiply_out,
    own_weights,
    own_zero_points,
    stored,
)
from lightning_compress.deploy.onnx_kernels import Operation, operations
from lightning_compress.deploy.onnx_recurrent import recurrent_layers
from lightning_compress.deploy.quiet import quiet
from lightning_compress.deploy.runner import Kernels
from lightning_compress.files import replacing
from lightning_compress.forward import ForwardOnly, Inputs, input_names, with_batch

__all__ = ["Runner", "export"]

_WORTH = 256  # codes in a weight, from which on a cast costs less than they do
# where weights stand as codes of 8 bits
_CODES = {"DequantizeLinear": (0,), "Cast": (0,), "DynamicQuantizeLSTM": (1, 2)}


def export(
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    for_onnxruntime: bool = True,
) -> None:
    """Write one self-contained ONNX file with a dynamic batch axis, and that of sequences where the model has one.

    Args:
        model: In eval mode on the CPU; converted, or in float.
        inputs: Example inputs.
        path: The file to write.
        metadata: What the file says of itself, by name.
        for_onnxruntime: Write LSTM as an operation that no other runtime has.

    Raises:
        Exception: Whatever ``torch.onnx.export`` says of a model that it cannot capture.
    """
    inputs = with_batch(inputs, 2)  # torch.export takes an axis of length 1 for a constant
    with quiet(), _no_mask_detection(), _operators_read_once(), torch.no_grad():
        program = first_to_work(lambda axes: _capture(model, inputs, axes), axes_to_try(model, inputs))
        program.model.metadata_props.update(metadata or {})
        matmul_nbits(program.model)
        if for_onnxruntime:
            recurrent_layers(program.model)
        _select_codes(program.model.graph)
        integer_biases(program.model.graph)
        own_weights(program.model.graph)
        own_zero_points(program.model.graph)
        multiply_out(program.model.graph)
        codes_behind_moves(program.model.graph)
        _pack_four_bits(program.model)
        _drop_notes(program.model.graph)
        with replacing(path) as temporary:
            program.save(str(temporary), external_data=False)


def _capture(model: nn.Module, inputs: Inputs, axes: Axes) -> Any:
    tensors = tuple(x for x in tree_leaves(tuple(inputs)) if isinstance(x, Tensor))
    program = torch.onnx.export(
        ForwardOnly(model, inputs),
        tensors,
        input_names=input_names(model, inputs),
        output_names=output_names(model, inputs),
        dynamic_shapes=(tuple(found or None for found in axes),),
        dynamo=True,
        verbose=False,
        **export_options(model),
    )
    assert program is not None
    return program


def _drop_notes(graph: Any) -> None:
    """Without the exporter's notes on where nodes came from, their names, and the shapes in between.

    In a small model they weigh more than the weights, and every runtime infers the shapes.
    """
    taken = {value.name for value in (*graph.initializers.values(), *graph.inputs, *graph.outputs)}
    names = (name for name in map("t{}".format, count()) if name not in taken)
    graph.metadata_props.clear()
    for value in graph.initializers.values():
        value.metadata_props.clear()
        value.type = value.shape = None  # its tensor says both
    for node in graph:
        node.metadata_props.clear()
        node.name = node.doc_string = None
        for out in node.outputs:
            out.metadata_props.clear()
            if not out.is_graph_output():
                out.name = next(names)
                out.type = None
                out.shape = None


def _select_codes(graph: Any) -> None:
    """Parts of a quantized value taken from its codes, for what reads the part to see that it is quantized."""
    import onnx_ir as ir

    for i, node in enumerate([node for node in graph if node.op_type == "Gather"]):
        before = node.inputs[0].producer()
        if before is None or before.op_type != "DequantizeLinear" or before.inputs[1].const_value is None:
            continue
        if before.inputs[1].const_value.size != 1:
            continue
        after = ir.Node("", "DequantizeLinear", [node.outputs[0], *before.inputs[1:]])
        out = node.outputs[0]
        codes = before.inputs[0]
        after.outputs[0].name = f"selected_{i}"
        after.outputs[0].type = out.type
        after.outputs[0].shape = out.shape
        out.type = ir.TensorType(before.inputs[2].dtype)
        out.replace_all_uses_with(after.outputs[0], replace_graph_outputs=True)
        after.replace_input_with(0, out)
        node.replace_input_with(0, codes)
        graph.insert_after(node, after)


def _pack_four_bits(model: Any) -> None:
    """Weights whose codes are in -8..7, two to a byte.

    They are cast to 8 bits where they are read, which runtimes do once, when they load the file: kernels and speed are
    those of 8 bits.
    """
    import ml_dtypes
    import onnx_ir as ir

    graph = model.graph
    if any(node.op_type == "GroupNormalization" for node in graph):  # means another thing since operator set 21
        return
    read = [(node, place) for node in graph for place in _CODES.get(node.op_type, ())]
    for node, place in read:
        weight = graph.initializers.get(node.inputs[place].name)
        codes = None if weight is None else weight.const_value.numpy()
        if codes is None or codes.dtype != np.int8 or codes.size < _WORTH or codes.min() < -8 or codes.max() > 7:
            continue
        packed = stored(graph, f"{weight.name}_packed", codes.astype(ml_dtypes.int4))
        cast = ir.Node("", "Cast", [packed], [ir.AttrInt64("to", int(ir.DataType.INT8))])
        cast.outputs[0].name = f"{weight.name}_codes"
        graph.insert_before(node, cast)
        node.replace_input_with(place, cast.outputs[0])
        if not weight.uses():
            del graph.initializers[weight.name]
        model.opset_imports[""] = max(model.opset_imports[""], 21)


class Runner:
    """Runs an ONNX file on the CPU with onnxruntime, single-threaded.

    Args:
        path: The file.
        example_outputs: Outputs of the model, whose structure the runner gives back.
    """

    runtime = "onnxruntime"

    def __init__(self, path: Path, example_outputs: Any) -> None:
        self.path = path
        self.session = self.session_of(path)
        self.names = [value.name for value in self.session.get_inputs()]
        self.open_axes = [{i for i, n in enumerate(x.shape) if isinstance(n, str)} for x in self.session.get_inputs()]
        self.example_outputs = example_outputs

    @staticmethod
    def session_of(path: Path, optimized: Path | None = None) -> Any:
        """A session, which also writes the optimized graph if told where."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4 if optimized else 3
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def feed(self, inputs: Inputs) -> dict[str, Any]:
        """The file's inputs by name."""
        tensors = [x for x in tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)]
        return {name: x.detach().cpu().numpy() for name, x in zip(self.names, tensors, strict=True)}

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs as tensors, in the model's own structure."""
        outputs = [torch.from_numpy(x) for x in self.session.run(None, self.feed(inputs))]
        return filled(self.example_outputs, outputs)

    def integer_kernels(self) -> Kernels:
        """Counted from the graph that onnxruntime made of the file: operations that read a stored weight, by type."""
        found = self._operations
        return Kernels(sum(one.is_integer for one in found), len(found))

    def float_kernels(self) -> list[tuple[str, str]]:
        """Modules and types of those that run in float."""
        return [(one.module, one.kind) for one in self._operations if one.is_float]

    @cached_property
    def _operations(self) -> list[Operation]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "optimized.onnx")
            self.session_of(self.path, path)
            return operations(self.path, path)

    def prepare(self, inputs: Inputs) -> Any:
        """A call without arguments that runs the file and nothing else, to be timed."""
        feed = self.feed(inputs)
        return lambda: self.session.run(None, feed)


@contextmanager
def _no_mask_detection() -> Iterator[None]:
    """Without nn.Transformer's look at the mask's values for a fast path: not capturable, changes nothing."""
    with patch("torch.nn.modules.transformer._detect_is_causal_mask", lambda mask, is_causal=None, size=None: False):
        yield


@contextmanager
def _operators_read_once() -> Iterator[None]:
    """Keep the exporter's table of operators, which it would build anew in each export.

    For a small model that is two thirds of the time. The table depends on the opset alone and an export only reads it.
    A torch without such a table is left as it is.
    """
    try:
        registry = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        read = _remembering(registry.from_torchlib)
    except (ImportError, AttributeError):
        yield
        return
    with patch.object(registry, "from_torchlib", staticmethod(read)):
        yield


@cache
def _remembering(read: Callable[..., Any]) -> Callable[..., Any]:
    """One function for all exports, which reads what it is asked for once."""
    return cache(read)
