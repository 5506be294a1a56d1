"""ExecuTorch: write a .pte file for the XNNPACK kernels of phones and boards, and run it."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_compress.deploy.graph import capture, quantize_inputs_at_run_time, tensors_of
from lightning_compress.deploy.interface import filled
from lightning_compress.deploy.nbits import find_tokens_at_run_time
from lightning_compress.deploy.quiet import quiet
from lightning_compress.deploy.runner import Kernels, in_batches
from lightning_compress.deploy.scales import spell_out_scales
from lightning_compress.files import write_whole
from lightning_compress.forward import Inputs, with_batch

__all__ = ["Runner", "export"]

_RECURRENT = tuple(getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
_HEAVY = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected")


def export(model: nn.Module, inputs: Inputs, path: Path, batch_size: int = 1) -> None:
    """Write a .pte file of one batch size, with all that XNNPACK takes in its kernels.

    An operation whose output is not quantized (the last layer) finds the range of its input as it runs.

    Args:
        model: In eval mode on the CPU; converted with int8 activations, or in float.
        inputs: Example inputs.
        path: The file to write.
        batch_size: Batch size of the file.
    """
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        inputs = with_batch(inputs, batch_size)
        graph = capture(model, inputs)
        tensors = tensors_of(inputs)
        spell_out_scales(graph, parts_again=True)
        quantize_inputs_at_run_time(graph)
        find_tokens_at_run_time(graph)
        _recurrent_weights_in_float(graph)
        with torch.no_grad():
            program = to_edge_transform_and_lower(
                torch.export.export(graph, tensors),
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            ).to_executorch()
    write_whole(path, program.buffer)


def _recurrent_weights_in_float(graph: GraphModule) -> None:
    """The values of weights that GRU and LSTM read: nothing here computes with their codes."""
    for node in list(graph.graph.nodes):
        codes = node.target is torch.ops.quantized_decomposed.dequantize_per_channel.default
        if not codes or not all(user.target in _RECURRENT for user in node.users):
            continue
        stored = [_attribute(graph, x) if isinstance(x, Node) else x for x in node.args]
        name = f"{node.name}_values"
        graph.register_buffer(name, node.target(*stored))
        with graph.graph.inserting_before(node):
            values = graph.graph.get_attr(name)
        node.replace_all_uses_with(values)
        graph.graph.erase_node(node)
    graph.recompile()


def _attribute(graph: GraphModule, node: Node) -> Any:
    """The tensor that a node reads from the module."""
    found: Any = graph
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


class Runner:
    """Runs a .pte file with the ExecuTorch runtime, single-threaded; batches of another size run in pieces.

    Args:
        path: The file.
        example_outputs: Outputs of the model, whose structure the runner gives back.
    """

    runtime = "executorch"

    def __init__(self, path: Path, example_outputs: Any) -> None:
        with quiet():
            import executorch.kernels.quantized  # noqa: F401  # registers quantize and dequantize
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime, Verification

            _one_thread(portable_lib)
            self.path = path
            self.program = Runtime.get().load_program(path, verification=Verification.Minimal)
            self.method = self.program.load_method("forward")
        metadata = self.method.metadata
        sizes = [metadata.input_tensor_meta(i).sizes() for i in range(metadata.num_inputs())]
        self.batch_size = next((size[0] for size in sizes if size), 1)
        self.example_outputs = example_outputs

    def _run(self, inputs: Inputs) -> list[Tensor]:
        return [x.clone() for x in self.method.execute([x.detach().contiguous() for x in tensors_of(inputs)])]

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs as tensors, in the model's own structure."""
        return filled(self.example_outputs, in_batches(self._run, inputs, self.batch_size))

    def prepare(self, inputs: Inputs) -> Any:
        """A call without arguments that runs the file once and nothing else, to be timed."""
        feed = [x.detach().contiguous() for x in tensors_of(with_batch(inputs, self.batch_size))]
        return lambda: self.method.execute(feed)

    def integer_kernels(self) -> Kernels:
        """Counted from the file: the types that XNNPACK's operations read, and operations left to portable kernels."""
        return _count(self.path.read_bytes())


def _count(file: bytes) -> Kernels:
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(file).program
    integer = total = 0
    for plan in program.execution_plan:
        total += sum(op.name.split("::")[-1] in _PORTABLE for op in plan.operators)
        for delegate in plan.delegates:
            if delegate.id != "XnnpackBackend":
                continue
            graph = _xnnpack_graph(program.backend_delegate_data[delegate.processed.index].data)
            types = _datatypes(graph)
            for node in graph["xnodes"]:
                if node["xnode_union_type"] not in _HEAVY:
                    continue
                args = node["xnode_union"]
                args = args.get("node", args)
                total += 1
                read = [types.get(args[key], "") for key in ("input1_id", "filter_id")]
                integer += all("int8" in kind or "int4" in kind for kind in read)
    return Kernels(integer, total)


_PORTABLE = ("addmm", "mm", "linear", "convolution")


def _xnnpack_graph(data: bytes) -> dict[str, Any]:
    """The graph of a delegate: a header that tells where it lies, then a flatbuffer."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = xnnpack_graph_serialize.XNNHeader.from_bytes(data[: xnnpack_graph_serialize.XNNHeader.EXPECTED_LENGTH])
    begin = header.flatbuffer_offset
    size = header.flatbuffer_size
    schema = Path(xnnpack_graph_serialize.__file__).with_name("schema.fbs")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "schema.bin")
        binary.write_bytes(data[begin : begin + size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        return json.loads(re.sub(r"\b(?:inf|nan)\b", "0.0", Path(folder, "schema.json").read_text()))


def _datatypes(graph: dict[str, Any]) -> dict[int, str]:
    types = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        types[tensor.get("id_out", 0)] = str(tensor.get("datatype", ""))
    return types


def _one_thread(library: object) -> None:
    """Set the size of the runtime's pool of threads, where this build has one."""
    set_threads = getattr(library, "_unsafe_reset_threadpool", None)
    if set_threads is not None:
        set_threads(1)
