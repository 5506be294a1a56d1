"""ONNX: write the file, and run it in onnxruntime."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from lightning_compress.deploy.forward import ForwardOnly, Inputs, input_names, with_batch
from lightning_compress.deploy.runner import Kernels

__all__ = ["Runner", "export"]

_INTEGER = (
    *("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm"),
    *("DynamicQuantizeMatMul", "QLinearConvTranspose", "DynamicQuantizeLSTM"),
)
_FLOAT = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM", "GRU", "RNN")


def export(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write one self-contained ONNX file with a dynamic batch axis.

    Args:
        model: In eval mode on the CPU; converted, or in float.
        inputs: Example inputs.
        path: The file to write.

    Raises:
        Exception: Whatever ``torch.onnx.export`` says of a model that it cannot capture.
    """
    inputs = with_batch(inputs, 2)  # torch.export takes an axis of length 1 for a constant
    size = inputs.batch_size
    tensors = tuple(x for x in tree_leaves(tuple(inputs)) if isinstance(x, Tensor))
    batch = {0: torch.export.Dim.DYNAMIC}
    dynamic = tuple(batch if x.dim() and x.shape[0] == size else None for x in tensors)
    with _quiet(), _no_mask_detection(), torch.no_grad():
        program = torch.onnx.export(
            ForwardOnly(model, inputs),
            tensors,
            input_names=input_names(model, inputs),
            dynamic_shapes=(dynamic,),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph:  # the exporter's notes on where a node came from weigh more than the node
            node.metadata_props.clear()
            node.doc_string = None
        for value in program.model.graph.initializers.values():
            value.metadata_props.clear()
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(path), external_data=False)


class Runner:
    """Runs an ONNX file on the CPU with onnxruntime, single-threaded.

    Args:
        path: The file.
        example_outputs: Outputs of the model, whose structure the runner gives back.
    """

    runtime = "onnxruntime"

    def __init__(self, path: Path, example_outputs: Any) -> None:
        self.path = path
        self.session = self.session_of(path)
        self.names = [value.name for value in self.session.get_inputs()]
        self.structure = torch.utils._pytree.tree_structure(example_outputs)

    @staticmethod
    def session_of(path: Path, optimized: Path | None = None) -> Any:
        """A session, which also writes the optimized graph if told where."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4 if optimized else 3
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def feed(self, inputs: Inputs) -> dict[str, Any]:
        """The file's inputs by name."""
        tensors = [x for x in tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)]
        return {name: x.detach().cpu().numpy() for name, x in zip(self.names, tensors, strict=True)}

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs as tensors, in the model's own structure."""
        outputs = [torch.from_numpy(x) for x in self.session.run(None, self.feed(inputs))]
        return tree_unflatten(outputs, self.structure)

    def integer_kernels(self) -> Kernels:
        """Counted from the graph that onnxruntime made of the file: operations that read a stored weight, by type."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "optimized.onnx")
            self.session_of(self.path, path)
            graph = onnx.load(path).graph
        stored = {value.name for value in graph.initializer}
        stored |= {
            x for node in graph.node if "Dequantize" in node.op_type for x in node.output if node.input[0] in stored
        }
        heavy = [n.op_type for n in graph.node if n.op_type in (*_INTEGER, *_FLOAT) and stored & set(n.input[1:])]
        return Kernels(sum(kind in _INTEGER for kind in heavy), len(heavy))

    def prepare(self, inputs: Inputs) -> Any:
        """A call without arguments that runs the file and nothing else, to be timed."""
        feed = self.feed(inputs)
        return lambda: self.session.run(None, feed)


@contextmanager
def _no_mask_detection() -> Iterator[None]:
    """Without nn.Transformer's look at the mask's values for a fast path: not capturable, changes nothing."""
    with patch("torch.nn.modules.transformer._detect_is_causal_mask", lambda mask, is_causal=None, size=None: False):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
