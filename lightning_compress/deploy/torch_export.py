"""PyTorch: write a .pt2 file (torch.export), and run it compiled by Inductor, with its integer kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch.utils._pytree import tree_leaves

from lightning_compress.deploy.graph import capture, multiply_out, tensors_of
from lightning_compress.deploy.interface import Axes, axes_to_try, filled, first_to_work
from lightning_compress.deploy.runner import Kernels, in_batches
from lightning_compress.files import replacing
from lightning_compress.forward import Inputs, with_batch

__all__ = ["Runner", "export"]

_INTEGER = re.compile(r"aoti_torch_\w*(?:qconv|qlinear)\w*\(")
_FLOAT = re.compile(r"aoti_torch_\w*(?:addmm|[^b]mm_|mkldnn_\w*convolution|mkl\w*linear|cpu_convolution)\w*\(")


def export(model: nn.Module, inputs: Inputs, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the exported program with integer weights, and the batch axis and that of sequences open.

    Args:
        model: In eval mode on the CPU; converted with uint8 activations, or in float.
        inputs: Example inputs.
        path: The file to write.
        metadata: What the file says of itself, by name: ``extra_files`` of ``torch.export.load``.
    """
    # Inductor packs the weight of a linear layer for MKL, which never returns from an empty one.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.numel() == 0:
            raise ValueError(
                f"{name}: its weight is empty, of shape {tuple(module.weight.shape)}, which Inductor cannot pack. "
                "Accepted are layers with weights. Remove the layer, or leave 'torch' out."
            )
    inputs = with_batch(inputs, 2)  # torch.export takes an axis of length 1 for a constant
    program = first_to_work(lambda axes: _capture(model, inputs, axes), axes_to_try(model, inputs))
    program._example_inputs = None  # noqa: SLF001  # they would be stored in the file
    with replacing(path) as temporary:
        torch.export.save(program, temporary, extra_files=dict(metadata or {}))


def _capture(model: nn.Module, inputs: Inputs, axes: Axes) -> Any:
    graph = capture(model, inputs, axes)
    multiply_out(graph)
    shapes = tuple(dict.fromkeys(found, torch.export.Dim.DYNAMIC) or None for found in axes)
    with torch.no_grad():
        return torch.export.export(graph, tensors_of(inputs), dynamic_shapes=shapes)


class Runner:
    """Runs a .pt2 file compiled by Inductor, for the batch sizes that are prepared; calls run in pieces of 64.

    Args:
        path: The file.
        example_outputs: Outputs of the model, whose structure the runner gives back.
    """

    runtime = "inductor"

    def __init__(self, path: Path, example_outputs: Any) -> None:
        self.program = torch.export.load(path)
        self.example_outputs = example_outputs
        self.batch_size = 64  # compiling takes longer than running
        self._compiled: dict[tuple[torch.Size, ...], Any] = {}
        self._kernels = Kernels(0, 0)

    def _compile(self, tensors: tuple[Tensor, ...]) -> Any:
        size = tuple(x.shape for x in tensors)
        if size not in self._compiled:
            code: list[str] = []
            keep = patch.object(GraphLowering, "save_output_code", code.append)  # run_and_get_code forgets all before
            with _frozen(), torch.no_grad(), keep:
                compiled = torch.compile(self.program.module(), dynamic=False)
                compiled(*tensors)
            found = [len(pattern.findall("\n".join(code))) for pattern in (_INTEGER, _FLOAT)]
            self._kernels = Kernels(found[0], sum(found))
            self._compiled[size] = compiled
        return self._compiled[size]

    def _run(self, inputs: Inputs) -> list[Tensor]:
        tensors = tensors_of(inputs)
        with _one_thread(), _frozen(), torch.no_grad():
            outputs = self._compile(tensors)(*tensors)
        return [x.clone() for x in tree_leaves(outputs)]

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs as tensors, in the model's own structure."""
        return filled(self.example_outputs, in_batches(self._run, inputs, self.batch_size))

    def prepare(self, inputs: Inputs) -> Any:
        """A call without arguments that runs the file and nothing else, to be timed."""
        tensors = tensors_of(inputs)
        with _one_thread():
            compiled = self._compile(tensors)

        def call() -> Any:
            with torch.no_grad():
                return compiled(*tensors)

        return call

    def integer_kernels(self) -> Kernels:
        """Counted in the code that Inductor wrote; zero before anything has run."""
        return self._kernels


@contextmanager
def _frozen() -> Iterator[None]:
    """With weights as constants, which the integer patterns need, and kernels called from C++."""
    from torch._inductor import config

    with config.patch(freezing=True, cpp_wrapper=True):
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
