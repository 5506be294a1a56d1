"""What a trial reached of what was asked: zeros and multiplications of the model, values of the weights in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.protocol import Point
from experiments.training import num_macs, weights_of

__all__ = ["most_values", "reached", "what_is_missing"]

_NEAR = 0.005  # of what is asked, since some tools round or leave a layer
_WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}  # the axis of the output channels in the weight


def reached(model: nn.Module, start: nn.Module, example: Tensor) -> dict[str, Any]:
    """Share of the weights that is zero or gone, and times fewer multiplications; none where a tool hides them.

    Args:
        model: The trained model.
        start: The dense one.
        example: A batch of one.
    """
    whole = sum(w.numel() for w in weights_of(start))
    try:
        left = sum(int(torch.count_nonzero(w)) for w in weights_of(model))
        fewer = num_macs(start, example) / num_macs(model, example)
    except Exception:  # modules of other tools count in ways of their own
        return {}
    if not weights_of(model):  # a graph
        return {}
    return {"zeros": round(1 - left / whole, 5), "macs": round(fewer, 4)}


def most_values(path: Path, example: Tensor) -> int | None:
    """The most values that the weights of one output channel take in an .onnx file; None for other files.

    Whatever makes a weight out of what is stored, such as scales and clipping, is computed as the runtime does.

    Args:
        path: The file.
        example: A batch that it takes.
    """
    if path.suffix != ".onnx":
        return None
    import onnx
    import onnxruntime

    model = onnx.load(path)
    constant = {tensor.name for tensor in model.graph.initializer}
    weights: dict[str, int] = {}
    for node in model.graph.node:
        if all(name in constant for name in node.input):
            constant |= set(node.output)
        elif node.op_type in _WEIGHTED and node.input[1] in constant:
            is_turned = any(a.name == "transB" and a.i for a in node.attribute)
            weights[node.input[1]] = 0 if is_turned else _WEIGHTED[node.op_type]
    known = {output.name for output in model.graph.output}
    for name in weights:
        if name not in known:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: example.contiguous().numpy()}
    found = zip(weights.items(), session.run(list(weights), feed), strict=True)
    return max(max(len(np.unique(row)) for row in np.moveaxis(w, axis, 0)) for (_, axis), w in found)


def what_is_missing(point: Point, outcome: dict[str, Any]) -> str:
    """Why a trial does not count; empty where it has what was asked for."""
    amount = point.amount
    zeros, macs, values = (outcome.get(key) for key in ("zeros", "macs", "values"))
    if point.kind in ("zeros", "sparse8") and zeros is not None and zeros < amount - _NEAR:
        return f"asked for {100 * amount:g} % zeros, it has {100 * zeros:.2f}"
    if point.kind == "macs" and macs is not None and macs < amount * (1 - _NEAR):
        return f"asked for {amount:g}x fewer MACs, it has {macs:.2f}x"
    if point.kind == "bits" and values is not None and values > 2**amount:
        return f"asked for {amount:g} bits, the weights of a channel take {values} values"
    return ""
