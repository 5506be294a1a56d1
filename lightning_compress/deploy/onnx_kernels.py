"""Which operations of an ONNX file run in integers, seen in the graph that onnxruntime makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Operation", "operations"]

# Scales and zero points are stored, too: where the weight stands among the inputs.
_REST = slice(1, None)
_SCALED = dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm", "QLinearConvTranspose"), slice(3, 4))
_PLAIN = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
_WEIGHTS = {**_SCALED, **dict.fromkeys(_PLAIN, slice(1, 2)), "DynamicQuantizeLSTM": slice(1, 3)}
_FLOAT = (
    *("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Einsum"),
    *("LSTM", "GRU", "RNN"),
)
_ANY_SIDE = ("Einsum", "MatMul", "FusedMatMul")  # which may read a quantized weight first
_HEAVY = (*_WEIGHTS, *_FLOAT, "MatMulNBits")
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Cast")


class Operation(NamedTuple):
    """An operation that reads a stored weight.

    Args:
        module: The module, or the parameter of the model, that the weight is of; empty if that is unknown.
        kind: Its type.
    """

    module: str
    kind: str

    @property
    def is_integer(self) -> bool:
        """Whether it runs in integers."""
        return self.kind in _WEIGHTS

    @property
    def is_float(self) -> bool:
        """Whether it runs in float; weights in blocks meet float activations in kernels of their own."""
        return self.kind in _FLOAT


def operations(file: Path, optimized: Path) -> list[Operation]:
    """Those that read a stored weight.

    Args:
        file: The file.
        optimized: The graph that onnxruntime runs.
    """
    import onnx

    graph = onnx.load(optimized).graph
    constant = {value.name for value in graph.initializer}
    decoded: set[str] = set()
    for node in graph.node:
        is_decoded = "Dequantize" in node.op_type and node.input[0] in constant
        if is_decoded or (node.op_type in _MOVES and node.input[0] in decoded):
            decoded.update(node.output)
    made = {x: node for node in onnx.load(file).graph.node for x in node.output}
    heavy = [node for node in graph.node if node.op_type in _HEAVY]
    return [
        Operation(_module(made, node), node.op_type)
        for node in heavy
        if (constant | decoded) & set(_weights(node)) or (node.op_type in _ANY_SIDE and decoded & set(node.input))
    ]


def _weights(node: Any) -> list[str]:
    return list(node.input[_WEIGHTS.get(node.op_type, _REST)])


def _module(made: Mapping[str, Any], node: Any) -> str:
    """Whose weight an operation reads, by the name that the exporter gave to the weight in the file."""
    found = next((made[x] for x in (x.removesuffix("_pre_q") for x in node.output) if x in made), None)
    while found is not None and found.op_type not in _HEAVY:  # what was fused with it
        found = made.get(found.input[0])
    for x in [] if found is None else [*_weights(found), *found.input[:1]]:
        name = x
        while name in made and made[name].input and made[name].op_type not in _HEAVY:
            name = made[name].input[0]
        outer, *inner = name.split(".")
        if outer == "model" and inner:
            return ".".join(inner[:-1]) or inner[0]
    return ""
