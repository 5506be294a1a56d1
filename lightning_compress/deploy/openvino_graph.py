"""What OpenVINO's CPU plugin (2026.4) answers wrongly, written so that it answers rightly."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["spell_out"]

_EXTREMES = ("ReduceMax", "ReduceMin")
_STEPS_BACK = ("Convert", "Subtract", "Multiply")  # what reads a DequantizeLinear is spelled in
_MOVES = ("Concat", "MaxPool", "Relu", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze", *_EXTREMES)


def spell_out(graph: Any) -> None:
    """Rewrite a graph in place, as ``openvino.Core().read_model`` gives it; what it computes stays the same."""
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "FakeQuantize":
            _let_ranges_hold_the_bias(node)
            _quantize_before_the_extreme(node)
            if node.input_value(0).node.get_type_name() == "Concat" and _rank(node) == 3:
                # parts that were quantized too would give each token a zero point of its own, which no kernel takes
                _let_in_as_float(node.input(0))
        elif (kind == "ReduceSum" or (kind == "ReduceMean" and _rank(node) == 3)) and _is_quantized(
            node.input_value(0)
        ):
            # integers that are added up over tokens are wrong from the second example on
            _let_in_as_float(node.input(0))
    graph.validate_nodes_and_infer_types()


def _rank(node: Any) -> int:
    return len(node.input_value(0).partial_shape)


def _is_quantized(value: Any) -> bool:
    """Whether a value is dequantized, or moved and chosen from such ones."""
    if value.node.get_type_name() in _MOVES:
        return any(_is_quantized(x) for x in value.node.input_values())
    return value.node.get_type_name() == "Multiply" and value.node.input_value(0).node.get_type_name() in _STEPS_BACK


def _let_in_as_float(reader: Any) -> None:
    """Put what no integers pass between a value and one reader of it: the larger of it and the least number."""
    from openvino import opset13

    least = opset13.constant(np.finfo(np.float32).min)
    reader.replace_source_output(opset13.maximum(reader.get_source_output(), least).output(0))


def _quantize_before_the_extreme(quantize: Any) -> None:
    """Take the largest or least of quantized values: quantized after it, by the same kernel, it is another number."""
    extreme = quantize.input_value(0)
    if extreme.node.get_type_name() not in _EXTREMES or len(extreme.get_target_inputs()) > 1:
        return
    end = quantize.output(0)
    while len(readers := list(end.get_target_inputs())) == 1 and readers[0].get_node().get_type_name() in _STEPS_BACK:
        end = readers[0].get_node().output(0)
    quantize.input(0).replace_source_output(extreme.node.input_value(0))
    for reader in readers:
        reader.replace_source_output(extreme)
    extreme.node.input(0).replace_source_output(end)


def _let_ranges_hold_the_bias(quantize: Any) -> None:
    """Move the range of a convolution's output by its bias, which is then not added.

    Where the network reads its batch size, as for a class token or the first state of a recurrent layer, the plugin
    reads it off the convolution without its bias, and then forgets the bias. Limits between the two, as of a ReLU6,
    move with the range; those that cut off no more than the range does are left out.
    """
    from openvino import opset13

    value, ends = quantize.input_value(0), [quantize.input_value(i) for i in (1, 2)]
    if not all(map(_is_constant, ends)):
        return
    low, high = (end.node.data for end in ends)
    limits: list[tuple[str, Any]] = []
    while (limit := _limit(value)) is not None:
        kind, at, value = limit
        if at > low.min() if kind == "Maximum" else at < high.max():
            limits.insert(0, (kind, at))
    bias = _bias(value)
    if bias is None:
        return
    products = value.node.input_value(0)
    for kind, at in limits:
        build = opset13.maximum if kind == "Maximum" else opset13.minimum
        products = build(products, opset13.constant(at - bias)).output(0)
    quantize.input(0).replace_source_output(products)
    for i, end in zip((1, 2), (low, high), strict=True):
        quantize.input(i).replace_source_output(opset13.constant(end - bias).output(0))


def _limit(value: Any) -> tuple[str, Any, Any] | None:
    """Whether a value that is read once is the larger or the smaller of a number and another value, and which."""
    kind = value.node.get_type_name()
    if len(value.get_target_inputs()) > 1 or kind not in ("Relu", "Maximum", "Minimum"):
        return None
    constants = [x for x in value.node.input_values() if _is_constant(x)]
    if kind == "Relu":
        return "Maximum", np.float32(0), value.node.input_value(0)
    if len(constants) != 1 or constants[0].node.data.size != 1:
        return None
    other = next(x for x in value.node.input_values() if not _is_constant(x))
    return kind, constants[0].node.data.reshape(()), other


def _bias(value: Any) -> Any | None:
    """What a value that is read once adds to a convolution, a number a channel; none for other values."""
    if value.node.get_type_name() != "Add" or len(value.get_target_inputs()) > 1:
        return None
    products, bias = value.node.input_value(0), value.node.input_value(1)
    stored = bias.node.input_value(0) if bias.node.get_type_name() == "Reshape" else bias
    if products.node.get_type_name() not in ("Convolution", "GroupConvolution") or not _is_constant(stored):
        return None
    shape = [1] * (len(products.partial_shape) - len(bias.shape)) + list(bias.shape)
    by_channel = all(size == 1 for axis, size in enumerate(shape) if axis != 1)
    return stored.node.data.reshape(shape) if by_channel else None


def _is_constant(value: Any) -> bool:
    return bool(value.node.get_type_name() == "Constant")
