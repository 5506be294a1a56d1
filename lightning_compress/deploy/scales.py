"""Scales of values that are only moved, chosen or averaged: kernels of phones read and write them in the same one."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lightning_compress.deploy.graph import quantize

__all__ = ["spell_out_scales", "split_weights"]

_ATEN, _QDQ = torch.ops.aten, torch.ops.quantized_decomposed
_QUANTIZE, _DEQUANTIZE = _QDQ.quantize_per_tensor.default, _QDQ.dequantize_per_tensor.default
_AVERAGES = (_ATEN.avg_pool1d.default, _ATEN.avg_pool2d.default, _ATEN.adaptive_avg_pool2d.default)
_PARTS = (_ATEN.chunk.default, _ATEN.split.Tensor, _ATEN.split_with_sizes.default)
_ONE_SCALE = (
    *_AVERAGES,
    *(_ATEN.max_pool1d.default, _ATEN.max_pool2d.default),
    *(_ATEN.upsample_nearest2d.vec, _ATEN.upsample_bilinear2d.vec),
    *(_ATEN.slice.Tensor, _ATEN.pad.default, operator.getitem),
)

Value = Any  # a node: what its arguments are, its type leaves open
Scale = tuple[Any, ...]  # scale, zero point, limits and type


def spell_out_scales(graph: GraphModule, parts_again: bool) -> None:
    """Quantize what goes into such an operation as its outcome is, and what comes out as what went in.

    The values stay as they are, but for averages, which these kernels round to the scale that they read.

    Args:
        graph: Changed in place.
        parts_again: Whether codes are brought to the scale of what they are concatenated to, as XNNPACK wants them.
            LiteRT's converter does so by itself, and loses it where the graph says so.
    """
    for node in reversed(_nodes(graph)):
        scale = _scale_of_readers(node)
        if scale is None:
            continue
        with graph.graph.inserting_before(node):
            if node.target is _ATEN.cat.default:
                in_scale = _in_scale if parts_again else _codes_as_they_are
                node.args = ([in_scale(graph, part, scale) for part in node.args[0]], *node.args[1:])
            elif node.target in _ONE_SCALE and node.args[0].target not in _PARTS and _scale(node.args[0]) is None:
                node.args = (_in_scale(graph, node.args[0], scale), *node.args[1:])
    for node in _nodes(graph):
        source = node.args[0] if node.target in _ONE_SCALE else None
        if isinstance(source, Node) and source.target in _PARTS:
            source = source.args[0]
        scale = _scale(source)
        readers = [user for user in node.users if parts_again or user.target is not _QUANTIZE]
        if scale is not None and readers and _scale_of_readers(node) != scale:
            quantize(graph, node, scale, readers)
    graph.recompile()


def split_weights(graph: GraphModule) -> None:
    """Quantize the parts of a weight, as of attention with a memory, each with the scales of its own channels."""
    for node in _nodes(graph):
        if node.target is not _ATEN.split_with_sizes.default or len(node.args) > 2:  # along the first axis
            continue
        weight, sizes = node.args
        if weight.target is not _QDQ.dequantize_per_channel.default:
            continue
        for part in list(node.users):
            begin = sum(sizes[: part.args[1]])
            with graph.graph.inserting_before(part):
                part.replace_all_uses_with(_rows(graph, weight, begin, begin + sizes[part.args[1]]))
            graph.graph.erase_node(part)
        graph.graph.erase_node(node)
    graph.recompile()


def _nodes(graph: GraphModule) -> list[Value]:
    return list(graph.graph.nodes)


def _rows(graph: GraphModule, node: Value, begin: int, end: int) -> Value:
    """A weight's (de)quantization for those rows alone."""
    if node.op == "get_attr":
        stored: Any = graph
        for name in str(node.target).split("."):
            stored = getattr(stored, name)
        name = f"{str(node.target).replace('.', '_')}_{begin}"
        graph.register_buffer(name, stored[begin:end].detach().clone())
        return graph.graph.get_attr(name)
    tensors = [_rows(graph, x, begin, end) if isinstance(x, Node) else x for x in node.args]
    return graph.graph.call_function(node.target, tuple(tensors), node.kwargs)


def _scale(node: Value | None) -> Scale | None:
    """That of what is dequantized there."""
    return node.args[1:] if isinstance(node, Node) and node.target is _DEQUANTIZE else None


def _scale_of_readers(node: Value) -> Scale | None:
    """The one that all readers quantize to."""
    scales = {user.args[1:] if user.target is _QUANTIZE else None for user in node.users}
    return scales.pop() if len(scales) == 1 else None


def _in_scale(graph: GraphModule, value: Value, scale: Scale) -> Value:
    if _scale(value) == scale:
        return value
    codes = graph.graph.call_function(_QUANTIZE, (value, *scale))
    return graph.graph.call_function(_DEQUANTIZE, (codes, *scale))


def _codes_as_they_are(graph: GraphModule, value: Value, scale: Scale) -> Value:
    """The same for what has no scale yet; codes of an average get that of what was averaged."""
    if _scale(value) is None:
        return _in_scale(graph, value, scale)
    average = value.args[0].args[0]
    averaged = _scale(average.args[0]) if average.target in _AVERAGES else None
    if averaged is not None and len(average.users) == len(value.args[0].users) == 1:
        value.args[0].args = (average, *averaged)
        value.args = (value.args[0], *averaged)
    return value
