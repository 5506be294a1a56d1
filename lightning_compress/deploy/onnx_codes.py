"""Passes over an ONNX graph that put codes where onnxruntime's integer kernels look for them; the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["codes_behind_moves", "integer_biases", "multiply_out", "own_weights", "own_zero_points", "stored"]

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


def integer_biases(graph: Any) -> None:
    """Biases of linear layers in 32 bits, in steps of input times weight.

    For onnxruntime, which would else keep a last layer, whose output is not quantized, in float; it does where
    activations have 16 bits, whose steps are too small for that.
    """
    import onnx_ir as ir

    for i, node in enumerate([node for node in graph if node.op_type == "Gemm" and len(node.inputs) == 3]):
        scales = [_scale(graph, value) for value in node.inputs[:2]]
        bias = graph.initializers.get(node.inputs[2].name)
        if bias is None or any(scale is None for scale in scales):
            continue
        step = (scales[0] * scales[1]).astype(np.float32)
        codes = np.round(bias.const_value.numpy() / step).astype(np.int32)
        parts = [stored(graph, f"bias_{i}_{key}", x) for key, x in (("codes", codes), ("scale", step))]
        dequantize = ir.Node("", "DequantizeLinear", parts, [ir.AttrInt64("axis", 0)])
        dequantize.outputs[0].name = f"bias_{i}"
        graph.insert_before(node, dequantize)
        node.replace_input_with(2, dequantize.outputs[0])


def _scale(graph: Any, value: Any) -> Any:
    """The step of a value that was quantized to 8 bits, and perhaps reshaped; None of another."""
    node = _dequantize(value, ("Reshape", "Flatten", "Transpose"))
    known = node is not None and node.inputs[1].name in graph.initializers and not _is_wide(node)
    return node.inputs[1].const_value.numpy() if known else None


def _dequantize(value: Any, moves: tuple[str, ...]) -> Any:
    """The operation that dequantized a value, behind what moved it; None of another value."""
    node = value.producer()
    while node is not None and node.op_type in moves:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _is_wide(node: Any) -> bool:
    """Whether the codes have 16 bits."""
    known = len(node.inputs) > 2 and node.inputs[2] is not None and node.inputs[2].const_value is not None
    return known and node.inputs[2].const_value.numpy().dtype == np.int16


def multiply_out(graph: Any) -> None:
    """Weights of matrix products that meet activations in float or of 16 bits as codes times steps.

    onnxruntime would make a MatMulNBits of another form, which quantizes the activations to 8 bits as it runs.
    """
    import onnx_ir as ir

    for i, product in enumerate([node for node in graph if node.op_type == "MatMul"]):
        source = _dequantize(product.inputs[0], (*_MOVES, *_OPAQUE, "Gather"))
        weight = _dequantize(product.inputs[1], ("Transpose",))
        if weight is None or weight.inputs[0].const_value is None or (source is not None and not _is_wide(source)):
            continue
        codes, scale = weight.inputs[:2]
        axis = weight.attributes["axis"].value
        shape = [-1 if j == axis else 1 for j in range(codes.const_value.numpy().ndim)]
        steps = stored(graph, f"steps_{i}", scale.const_value.numpy().reshape(shape))
        cast = ir.Node("", "Cast", [codes], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
        cast.outputs[0].name = f"multiplied_{i}"
        values = ir.Node("", "Mul", [cast.outputs[0], steps])
        _like(values.outputs[0], weight.outputs[0], f"weight_{i}")
        graph.insert_before(weight, [cast, values])
        weight.outputs[0].replace_all_uses_with(values.outputs[0])
        graph.remove(weight, safe=True)
    for value in [v for v in graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[value.name]


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
        zeros = node.inputs[2].const_value
        if zeros is None:  # of many thousand channels, as a vocabulary has, a node makes the zeros: none say the same
            node.resize_inputs(2)
            continue
        own = stored(graph, f"zero_point_{i}", zeros.numpy())
        node.replace_input_with(2, own)
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
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
