"""Passes over an ONNX graph that put codes where onnxruntime's integer kernels look for them; the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["codes_behind_moves", "own_weights", "own_zero_points", "stored"]

_HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What moves values and changes none, and what of it onnxruntime takes no codes through by itself.
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "MaxPool")
_OPAQUE = ("DepthToSpace", "SpaceToDepth", "Resize", "Upsample", "Pad", "Expand", "Tile")


def codes_behind_moves(graph: Any) -> None:
    """The same quantization again, which changes nothing, behind what moves quantized values to a layer."""
    import onnx_ir as ir

    for i, node in enumerate([n for n in graph if n.op_type in _HEAVY]):
        moved = node.inputs[0]
        before = moved.producer()
        opaque = False
        while before is not None and before.op_type in (*_MOVES, *_OPAQUE) and _keeps_values(before):
            opaque |= before.op_type in _OPAQUE
            before = before.inputs[0].producer()
        if not opaque or before is None or before.op_type != "DequantizeLinear":
            continue
        codes = ir.Node("", "QuantizeLinear", [moved, *before.inputs[1:]])
        _like(codes.outputs[0], moved, f"moved_{i}_codes")
        codes.outputs[0].type = ir.TensorType(before.inputs[0].dtype)
        values = ir.Node("", "DequantizeLinear", [codes.outputs[0], *before.inputs[1:]])
        _like(values.outputs[0], moved, f"moved_{i}")
        graph.insert_before(node, [codes, values])
        node.replace_input_with(0, values.outputs[0])


def own_weights(graph: Any) -> None:
    """Dequantization, and what reshapes its result, for each layer alone: with two readers it is a float kernel's.

    The exporter stores equal tensors once, and layers that were copied begin with equal weights.
    """
    for i, reader in enumerate([n for n in graph if n.op_type in _HEAVY]):
        value, used = reader.inputs[1], reader
        for j in range(len(graph)):
            node = value.producer()
            if node is None or node.op_type not in ("DequantizeLinear", "Transpose", "Reshape"):
                break
            if len(value.uses()) > 1:
                node = _copy(graph, node, f"own_{i}_{j}")
                used.replace_input_with(1 if used is reader else 0, node.outputs[0])
            value, used = node.inputs[0], node


def own_zero_points(graph: Any) -> None:
    """A zero point for each weight: OpenVINO computes in float where a linear layer and a convolution share one.

    The exporter stores equal tensors once.
    """
    weights = [n for n in graph if n.op_type == "DequantizeLinear" and n.inputs[0].name in graph.initializers]
    for i, node in enumerate(n for n in weights if len(n.inputs) == 3):
        own = stored(graph, f"zero_point_{i}", node.inputs[2].const_value.numpy())
        node.replace_input_with(2, own)
    for value in [v for v in graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[value.name]


def stored(graph: Any, name: str, array: np.ndarray) -> Any:
    """A tensor that the file holds."""
    import onnx_ir as ir

    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _keeps_values(node: Any) -> bool:
    """Whether a resize takes the nearest value, and what a pad adds is the zero that it adds by default."""
    if node.op_type == "Resize":
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() == "nearest"
    return node.op_type != "Pad" or len(node.inputs) < 3 or node.inputs[2] is None or _is_zero(node.inputs[2])


def _is_zero(value: Any) -> bool:
    return value.const_value is not None and not value.const_value.numpy().any()


def _copy(graph: Any, node: Any, name: str) -> Any:
    import onnx_ir as ir

    copied = ir.Node(node.domain, node.op_type, list(node.inputs), list(node.attributes.values()))
    _like(copied.outputs[0], node.outputs[0], name)
    graph.insert_after(node, copied)
    return copied


def _like(value: Any, other: Any, name: str) -> None:
    value.name = name
    value.type = other.type
    value.shape = other.shape
