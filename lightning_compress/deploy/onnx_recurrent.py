"""Recurrent layers as onnxruntime runs them best: LSTM in integers, GRU and RNN in float from weights decoded once.

``com.microsoft.DynamicQuantizeLSTM`` reads the codes of training, with a scale per row. It finds the range of its input
over all steps and samples of a call, and that of the hidden state in each step, as it runs, and multiplies codes of
8 bits. No other runtime has it, and onnxruntime has nothing like it for GRU and RNN.
"""

from __future__ import annotations

from ast import literal_eval
from typing import Any

import numpy as np

from lightning_compress.deploy.onnx_codes import stored

__all__ = ["recurrent_layers"]

_SCOPES = "pkg.torch.onnx.name_scopes"  # of the modules that a node stands in; the last is its own
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand")
_CODED = np.dtype([("code", np.int8), ("scale", np.float32)])


def recurrent_layers(model: Any) -> None:
    """Every LSTM that reads codes, of its weights and of its input, as the operation that computes with them.

    Args:
        model: As the exporter made it, with its notes.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = [node for node in model.graph if node.op_type in ("LSTM", "GRU", "RNN")]
    for i, node in enumerate(found):
        weights = [_coded(value) for value in node.inputs[1:3]]
        if any(weight is None for weight in weights):
            continue
        scopes = literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        name = ".".join([*scopes[-2:-1], f"{node.op_type.lower()}_{i}"])
        if node.op_type == "LSTM" and _reads_codes(node):
            _in_integers(model.graph, node, weights, name)
            model.opset_imports["com.microsoft"] = 1
        else:
            _decoded_once(model.graph, node, weights, name)
    if found:
        RemoveUnusedNodesPass()(model)


def _reads_codes(node: Any) -> bool:
    """Whether the input is quantized, or is what the layer below gives in the same module, whose own input is."""
    before = node.inputs[0].producer()
    while before is not None and before.op_type in _MOVES:
        before = before.inputs[0].producer()
    if before is None:
        return False
    if before.op_type == "DynamicQuantizeLSTM":
        return before.metadata_props.get(_SCOPES) == node.metadata_props.get(_SCOPES)
    return before.op_type == "DequantizeLinear" and before.inputs[0].producer() is not None


def _coded(value: Any) -> Any:
    """Codes of a weight with the scale of each, behind all that only moves them; None of a weight without codes."""
    node = value.producer()
    kind = None if node is None else node.op_type
    if kind not in ("DequantizeLinear", "Concat", "Slice", "Unsqueeze"):
        return None
    if kind == "Concat":
        parts = [_coded(x) for x in node.inputs]
        return None if any(x is None for x in parts) else np.concatenate(parts, node.attributes["axis"].value)
    if kind == "DequantizeLinear":
        return _leaf(node)
    moved = _coded(node.inputs[0])
    where = [x.const_value for x in node.inputs[1:]]
    if moved is None or any(x is None for x in where):
        return None
    if kind == "Unsqueeze":
        return np.expand_dims(moved, tuple(where[0].numpy()))
    if len(where) != 3:
        return None
    (begin,), (end,), (axis,) = (x.numpy() for x in where)
    return moved[(*[slice(None)] * axis, slice(begin, end))]


def _leaf(node: Any) -> Any:
    codes, scales = (x.const_value for x in node.inputs[:2])
    if codes is None or scales is None:
        return None
    coded = np.empty(codes.shape, _CODED)
    coded["code"] = codes.numpy()
    coded["scale"] = scales.numpy().reshape(-1, *[1] * (coded.ndim - 1))
    return coded


def _in_integers(graph: Any, node: Any, weights: list[np.ndarray], name: str) -> None:
    import onnx_ir as ir

    codes = []
    rest = []
    for key, coded in zip("wr", weights, strict=True):
        scales = coded["scale"][..., 0]
        codes.append(stored(graph, f"{name}_{key}", coded["code"].swapaxes(1, 2).copy()))
        rest.append(stored(graph, f"{name}_{key}_scale", scales.copy()))
        rest.append(stored(graph, f"{name}_{key}_zero_point", np.zeros(scales.shape, np.int8)))
    others = [*node.inputs[3:], *[None] * (8 - len(node.inputs))]
    attributes = [x for key, x in node.attributes.items() if key != "layout"]
    inputs = [node.inputs[0], *codes, *others, *rest]
    new = ir.Node("com.microsoft", "DynamicQuantizeLSTM", inputs, attributes, num_outputs=len(node.outputs))
    new.metadata_props.update(node.metadata_props)
    for old, out in zip(node.outputs, new.outputs, strict=True):
        out.name, out.type, out.shape = f"{old.name}_{name}", old.type, old.shape
        old.replace_all_uses_with(out, replace_graph_outputs=True)
    graph.insert_before(node, new)
    graph.remove(node, safe=True)


def _decoded_once(graph: Any, node: Any, weights: list[np.ndarray], name: str) -> None:
    """Codes times scales by operations that onnxruntime computes when it loads the file, and not in each call."""
    import onnx_ir as ir

    for i, key in enumerate("wr", 1):
        coded = weights[i - 1]
        codes = stored(graph, f"{name}_{key}", coded["code"].copy())
        scales = stored(graph, f"{name}_{key}_scale", coded["scale"][..., :1].copy())
        cast = ir.Node("", "Cast", [codes], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
        cast.outputs[0].name = f"{name}_{key}_codes"
        values = ir.Node("", "Mul", [cast.outputs[0], scales])
        values.outputs[0].name = f"{name}_{key}_values"
        graph.insert_before(node, [cast, values])
        node.replace_input_with(i, values.outputs[0])
