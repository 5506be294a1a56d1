"""A model as a graph of torch operations, brought into the form that integer runtimes recognize.

Each change computes the same numbers: runtimes match patterns, and fall back to float without a word where one differs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_compress.deploy.interface import Axes, batch_axes
from lightning_compress.forward import ForwardOnly, Inputs

__all__ = [
    "capture",
    "has_quantized_values",
    "has_wide_values",
    "multiply_out",
    "quantize",
    "quantize_inputs_at_run_time",
    "quantize_outputs",
    "tensors_of",
]

_ATEN = torch.ops.aten
_QDQ = torch.ops.quantized_decomposed
_QUANTIZE = _QDQ.quantize_per_tensor.default
_DEQUANTIZE = _QDQ.dequantize_per_tensor.default
_RELU = (_ATEN.relu.default, _ATEN.relu_.default, _ATEN.hardtanh.default, _ATEN.hardtanh_.default)
_HEAVY = (
    *(_ATEN.linear.default, _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default),
    *(_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input),
)
_MARGIN = 1.1  # of a range that was seen on samples, not in training
_SHAPE_ONLY = (
    *(_ATEN.select.int, _ATEN.slice.Tensor, _ATEN.view.default, _ATEN.reshape.default, _ATEN.flatten.using_ints),
    *(_ATEN.permute.default, _ATEN.transpose.int, _ATEN.squeeze.dim, _ATEN.unsqueeze.default),
    *(_ATEN.pixel_shuffle.default, _ATEN.pixel_unshuffle.default, _ATEN.upsample_nearest2d.vec, _ATEN.pad.default),
)


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors among the arguments, in their order."""
    return tuple(x for x in tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor))


def capture(model: nn.Module, inputs: Inputs, dynamic: bool | Axes = False) -> GraphModule:
    """The model's forward as a graph.

    Args:
        model: In eval mode on the CPU; converted, or in float.
        inputs: Example inputs.
        dynamic: Leave the batch axis open, or these axes of the tensors; otherwise the shapes of the inputs are
            constants of the graph.
    """
    tensors = tensors_of(inputs)
    axes = batch_axes(inputs) if dynamic is True else dynamic or ()
    shapes = (tuple(dict.fromkeys(x, torch.export.Dim.DYNAMIC) or None for x in axes),)
    plain = ForwardOnly(model, inputs)
    export = torch.export.export
    with torch.no_grad(), _no_fast_path():
        if dynamic is False:
            with _PlainAttention():
                program = export(plain, tensors)
        else:
            try:
                program = export(plain, tensors, dynamic_shapes=shapes)
            except Exception:  # code that asks for len(x) makes a constant of it
                if axes != batch_axes(inputs):
                    raise
                program = export(plain, tensors, dynamic_shapes=shapes, strict=True)
    graph = program.module()
    assert isinstance(graph, GraphModule)
    _keep_mean_axes(graph)
    _quantize_again(graph)
    _dequantize_for_each_user(graph)
    _drop_what_is_not_read(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def _drop_what_is_not_read(graph: GraphModule) -> None:
    """Without the float weights behind the codes."""
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for module_name, module in list(graph.named_modules()):
        for values in (module._parameters, module._buffers):
            for name in list(values):
                if (f"{module_name}.{name}" if module_name else name) not in read:
                    del values[name]


def _keep_mean_axes(graph: GraphModule) -> None:
    """A mean that keeps its axes, and drops them from the codes: XNNPACK pools over a whole image in no other way."""
    for node in list(graph.graph.nodes):
        if node.target is not _ATEN.mean.dim or (len(node.args) > 2 and node.args[2]) or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        if user.target is not _QUANTIZE:
            continue
        size = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]
        if size.count(-1) > 1:
            continue
        node.args = (*node.args[:2], True)
        codes = user.args[1:]
        with graph.graph.inserting_before(user):
            first = graph.graph.call_function(_QUANTIZE, (node, *codes))
            values = graph.graph.call_function(_DEQUANTIZE, (first, *codes))
            view = graph.graph.call_function(_ATEN.view.default, (values, size))
        user.replace_input_with(node, view)


def _quantize_again(graph: GraphModule) -> None:
    """The same quantization, which changes nothing, behind what only reshapes: codes stand next to their reader."""
    for node in list(graph.graph.nodes):
        source = node
        while isinstance(source, Node) and source.target in _SHAPE_ONLY:
            source = source.args[0]
        dequantized = isinstance(source, Node) and source is not node and source.target is _DEQUANTIZE
        if dequantized and all(user.target in _HEAVY for user in node.users):
            quantize(graph, node, source.args[1:])


def quantize(graph: GraphModule, node: Node, parameters: tuple[Any, ...], readers: Iterable[Node] = ()) -> None:
    """Quantize and dequantize a value for those readers; for all without."""
    users = list(readers or node.users)
    with graph.graph.inserting_after(node):
        codes = graph.graph.call_function(_QUANTIZE, (node, *parameters))
    with graph.graph.inserting_after(codes):
        values = graph.graph.call_function(_DEQUANTIZE, (codes, *parameters))
    for user in users:
        user.replace_input_with(node, values)


def _dequantize_for_each_user(graph: GraphModule) -> None:
    """A dequantize operation for each reader: pattern matchers give up on one that is shared."""
    for node in list(graph.graph.nodes):
        if node.target is _DEQUANTIZE:
            for user in list(node.users)[1:]:
                with graph.graph.inserting_before(user):
                    own = graph.graph.call_function(_DEQUANTIZE, node.args, node.kwargs)
                user.replace_input_with(node, own)


def _unquantized_outputs(graph: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Operations with quantized weights whose output stays in float, and the end of the operation with its relu."""
    for node in list(graph.graph.nodes):
        weight = node.args[1] if node.target in _HEAVY else None
        if not isinstance(weight, Node) or weight.target is not _QDQ.dequantize_per_channel.default:
            continue
        last = node
        users = list(node.users)
        if len(users) == 1 and users[0].target in _RELU:
            last = users[0]
            users = list(users[0].users)
        source = node.args[0]
        reads_codes = isinstance(source, Node) and source.target is _DEQUANTIZE
        if not users or not all(user.target is _QUANTIZE for user in users) or not reads_codes:
            yield node, last


def quantize_inputs_at_run_time(graph: GraphModule) -> None:
    """Let operations whose output stays in float find the range of their input as they run (XNNPACK's qd8 kernels)."""
    for node, _ in _unquantized_outputs(graph):
        source = node.args[0]
        assert isinstance(source, Node)
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function
            found = call(_QDQ.choose_qparams.tensor, (source, -128, 127, 1e-7, torch.int8))
            scale, zero_point = (call(operator.getitem, (found, i)) for i in range(2))
            rest = (scale, zero_point, -128, 127, torch.int8)
            codes = call(_QDQ.quantize_per_tensor.tensor, (source, *rest))
            values = call(_QDQ.dequantize_per_tensor.tensor, (codes, *rest))
        node.replace_input_with(source, values)
    graph.recompile()


def has_quantized_values(graph: GraphModule) -> bool:
    """Whether the graph is that of a converted model."""
    return any("quantized_decomposed" in str(node.target) for node in graph.graph.nodes)


def has_wide_values(graph: GraphModule) -> bool:
    """Whether the graph holds activations of 16 bits."""
    return any(node.target is _QUANTIZE and node.args[5] is torch.int16 for node in graph.graph.nodes)


def multiply_out(graph: GraphModule) -> None:
    """Weights that meet activations of 16 bits as codes times steps.

    Inductor takes another form for its kernels of 8 bits, without asking for the type of the activations.
    """
    call = graph.graph.call_function
    for node in [node for node in graph.graph.nodes if node.target in _HEAVY and _is_wide(node.args[0])]:
        weight = node.args[1]
        if weight.target is not _QDQ.dequantize_per_channel.default:
            continue
        codes, scale, _, axis = weight.args[:4]
        shape = [-1 if i == axis else 1 for i in range(weight.meta["val"].dim())]
        with graph.graph.inserting_before(node):
            values = call(_ATEN.to.dtype, (codes, torch.float32))
            values = call(_ATEN.mul.Tensor, (values, call(_ATEN.view.default, (scale, shape))))
        node.replace_input_with(weight, values)
    graph.recompile()


def quantize_outputs(graph: GraphModule, samples: Iterable[tuple[Tensor, ...]]) -> None:
    """Quantize the outputs of operations that have none, with their range on samples (for LiteRT's kernels).

    In the integers that the operation reads: those of 16 bits around 0.
    """
    ends = {last: _is_wide(node.args[0]) for node, last in _unquantized_outputs(graph)}
    ranges: dict[Node, tuple[float, float]] = {}

    class _Observe(Interpreter):
        def run_node(self, n: Node) -> Any:
            output = super().run_node(n)
            if n in ends:
                low, high = ranges.get(n, (0.0, 0.0))
                ranges[n] = min(float(output.min()), low), max(float(output.max()), high)
            return output

    with torch.no_grad():
        for tensors in samples:
            _Observe(graph).run(*tensors)
    for node, (low, high) in ranges.items():
        if ends[node]:
            scale = max(-low, high, 1e-9) * _MARGIN / (2**15 - 1)
            quantize(graph, node, (scale, 0, -(2**15), 2**15 - 1, torch.int16))
            continue
        scale = max(high - low, 1e-9) * _MARGIN / 255
        quantize(graph, node, (scale, round(-128 - low * _MARGIN / scale), -128, 127, torch.int8))
    _dequantize_for_each_user(graph)
    graph.recompile()


def _is_wide(source: object) -> bool:
    """Whether a value comes from codes of 16 bits, by way of what only moves values or drops none."""
    while isinstance(source, Node) and source.target is not _DEQUANTIZE:
        source = source.args[0] if source.args else None
    return isinstance(source, Node) and source.args[5] is torch.int16


class _PlainAttention(TorchFunctionMode):
    """Attention without mask or dropout as two products and a softmax, free of the case that all is masked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        plain = func is F.scaled_dot_product_attention and len(args) == 3 and args[0].dim() > 2
        if not plain or any(value for key, value in kwargs.items() if key != "scale"):
            return func(*args, **kwargs)
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in args)
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        scores = torch.bmm(q * torch.full((1, 1, 1), scale), k.transpose(1, 2))
        return torch.bmm(scores.softmax(-1), v).reshape(*args[0].shape[:-1], v.shape[-1])


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without the fused attention that only eager mode has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
