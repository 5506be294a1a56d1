"""Biases of a .tflite file beside activations of 16 bits, which the kernels of LiteRT read as 64 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["widen_biases"]


def widen_biases(file: bytes) -> bytes:
    """The file with biases of 64 bits where input is int16 and weight int8.

    LiteRT's converter writes 32 bits, which its convolutions take for 64 without a word (ai-edge-litert 2.3).
    TensorFlow Lite Micro takes either.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    kinds = schema.TensorType
    model: Any = flatbuffer_utils.read_model_from_bytearray(bytearray(file))
    for graph in model.subgraphs:
        for operator in graph.operators:
            read = [graph.tensors[i] for i in operator.inputs if i >= 0]
            types = {tensor.type for tensor in read[:-1]}
            if not read or read[-1].type != kinds.INT32 or not types >= {kinds.INT16, kinds.INT8}:
                continue
            bias = read[-1]
            codes = np.frombuffer(bytes(model.buffers[bias.buffer].data), np.int32)
            wide = schema.BufferT()
            wide.data = codes.astype(np.int64).view(np.uint8)
            bias.type = kinds.INT64
            bias.buffer = len(model.buffers)
            model.buffers.append(wide)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))
