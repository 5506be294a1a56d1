"""Weights in groups, as the kernels of each runtime take them.

onnxruntime: ``com.microsoft.MatMulNBits``, whose weights lie in the file as blocks of 4 or 8 bits around the middle
code and meet activations in float. ExecuTorch: XNNPACK's 8da4w kernels, which find the range of each token of their
input as they run. OpenVINO reads the blocks of the ONNX file. What no kernel takes is refused before training.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from torch import nn
from torch.fx import GraphModule, Node

from lightning_compress.checks import refusal
from lightning_compress.quantization.activation_codes import is_wide
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.grouped import GroupCodes, group_codes, is_grouped
from lightning_compress.quantization.model import quantization_of

__all__ = ["check_groups", "export_options", "find_tokens_at_run_time", "matmul_nbits"]

_QDQ = torch.ops.quantized_decomposed
_BLOCKED = _QDQ.dequantize_per_channel_group.default
_PER_TOKEN = _QDQ.dequantize_per_token.default


def check_groups(model: nn.Module, runtime: str, accepted: str, sizes: Sequence[int], most: int) -> None:
    """Raise if a layer's groups are none that a runtime's kernels take; before its training, too.

    Args:
        model: A model whose layers were upgraded.
        runtime: Its name.
        accepted: What it takes, in words.
        sizes: The sizes of groups that it takes.
        most: Bits of a weight that it takes at most.

    Raises:
        ValueError: With the layer's name.
    """
    quantization = quantization_of(model)
    for layer in quantization.layers if quantization is not None else []:
        written = weights(layer.module)[layer.parameter]
        if isinstance(written, GroupCodes) or not is_grouped(layer):
            continue
        group_codes(layer)
        if written.group not in sizes or written.quantizer.bits > most:
            given = f"{written.group} of {written.quantizer.bits} bits"
            fix = "Take another size, leave the format out, or take a scale a channel: w4a8()."
            raise refusal(f"weight_granularity at {layer.name}", given, f"{accepted} in {runtime}", fix)


def export_options(model: nn.Module) -> dict[str, Any]:
    """What ``torch.onnx.export`` needs for weights in groups: ONNX's own operation in blocks, of operator set 21.

    That set is the first to know activations of 16 bits, too.
    """
    quantization = quantization_of(model)
    if quantization is None or not quantization.enabled:
        return {}
    if not any(isinstance(weights(x.module)[x.parameter], GroupCodes) for x in quantization.layers):
        wide = any(is_wide(activation.quantizer) for activation in quantization.activations.values())
        return {"opset_version": 21} if wide else {}
    from onnxscript import opset21

    def blocked(codes: Any, scales: Any, zero_points: Any, low: int, high: int, *rest: Any) -> Any:
        _, size, _ = rest  # between the types of the codes and of the values
        return opset21.DequantizeLinear(codes, scales, axis=1, block_size=size)

    return {"opset_version": 21, "custom_translation_table": {_BLOCKED: blocked}}


def matmul_nbits(model: Any) -> None:
    """Products with a weight in blocks as MatMulNBits; another reader of such a weight reads ONNX's own operation."""
    graph = model.graph
    for node in [n for n in graph if n.op_type == "DequantizeLinear" and "block_size" in n.attributes]:
        for user, _ in list(node.outputs[0].uses()):
            if user.op_type == "Transpose":
                products = [x for x, i in user.outputs[0].uses() if x.op_type == "MatMul" and i == 1]
                for product in products:
                    _replace(graph, product, node, None)
            elif user.op_type == "Gemm" and _is_plain(user):
                _replace(graph, user, node, user.inputs[2] if len(user.inputs) > 2 else None)
        model.opset_imports["com.microsoft"] = 1
    for op_type in ("Transpose", "DequantizeLinear"):
        for node in [n for n in graph if n.op_type == op_type]:
            if not any(out.uses() or out.is_graph_output() for out in node.outputs):
                graph.remove(node, safe=True)
    for value in [v for v in graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[value.name]


def _is_plain(gemm: Any) -> bool:
    """Whether it is x times the transposed weight plus the bias, as linear layers are."""
    wanted = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    defaults = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    given = {name: attribute.value for name, attribute in gemm.attributes.items()}
    return defaults | given == wanted


def _replace(graph: Any, product: Any, weight: Any, bias: Any) -> None:
    import onnx_ir as ir

    codes, scales = (weight.inputs[i].const_value.numpy() for i in range(2))
    size = weight.attributes["block_size"].value
    name = weight.inputs[0].name
    bits = 4 if codes.size == 0 or np.abs(codes.astype(int)).max() < 8 else 8
    if f"{name}_blocks" not in graph.initializers:
        for key, array in (("blocks", pack(codes, size, bits)), ("scales", scales.astype(np.float32))):
            tensor = ir.tensor(array, name=f"{name}_{key}")
            kind = ir.TensorType(tensor.dtype)
            value = ir.Value(name=f"{name}_{key}", type=kind, shape=ir.Shape(array.shape), const_value=tensor)
            graph.register_initializer(value)
    stored = [graph.initializers[f"{name}_{key}"] for key in ("blocks", "scales")]
    attributes = {"K": codes.shape[1], "N": codes.shape[0], "bits": bits, "block_size": size}
    node = ir.Node(
        "com.microsoft",
        "MatMulNBits",
        [product.inputs[0], *stored, *([] if bias is None else [None, None, bias])],
        [ir.AttrInt64(key, value) for key, value in attributes.items()],
    )
    old = product.outputs[0]
    new = node.outputs[0]
    new.name, new.type, new.shape = f"{old.name}_nbits", old.type, old.shape
    graph.insert_before(product, node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(product, safe=True)


def pack(codes: np.ndarray, size: int, bits: int) -> np.ndarray:
    """Codes (out, in) as unsigned blocks (out, in / size, bytes of a block), the first of two in the low bits."""
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    blocks = unsigned.reshape(len(codes), -1, size)
    return blocks[..., ::2] | (blocks[..., 1::2] << 4) if bits == 4 else blocks


def find_tokens_at_run_time(graph: GraphModule) -> None:
    """Let linear layers in groups find the range of each token of their input, where training did not already."""
    call = graph.graph.call_function
    for node in list(graph.graph.nodes):
        weight = node.args[1] if node.target is torch.ops.aten.linear.default else None
        if not isinstance(weight, Node) or weight.target is not _BLOCKED:
            continue
        source = node.args[0]
        assert isinstance(source, Node)
        if source.target is _PER_TOKEN:
            continue
        with graph.graph.inserting_before(node):
            found = call(_QDQ.choose_qparams_per_token_asymmetric.default, (source, torch.int8))
            scale, zero_point = (call(operator.getitem, (found, i)) for i in range(2))
            rest = (scale, zero_point, -128, 127, torch.int8)
            codes = call(_QDQ.quantize_per_token.default, (source, *rest))
            values = call(_PER_TOKEN, (codes, *rest, torch.float32))
        node.replace_input_with(source, values)
    graph.recompile()
