"""The formats that a model can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from lightning_compress.quantization.convert import Activations, convert

__all__ = ["FORMATS", "Format", "check_formats", "installed_formats", "pip_command"]


@dataclass(frozen=True)
class Format:
    """One file format and what it takes.

    Args:
        suffix: Ending of the file's name.
        extra: The extra of this distribution that installs what it needs; empty if torch is all it needs.
        packages: Import names of what it needs.
        module: Module with ``export`` and ``Runner``.
        activations: The integers that the runtime's kernels compute in.
        dynamic_batch: Whether one file takes any batch size; otherwise there is a file a batch size.
        rounded_weights: Whether its converter folds weights to integers by itself.
        weight_bits: Bits that a weight can be stored in.
    """

    suffix: str
    extra: str
    packages: tuple[str, ...]
    module: str
    activations: Activations = "uint8"
    dynamic_batch: bool = True
    rounded_weights: bool = False
    weight_bits: tuple[int, ...] = (8,)

    @property
    def export(self) -> Callable[..., None]:
        """Writes the file: (model, inputs, path), and the batch size where the file has one."""
        return import_module(self.module).export

    @property
    def runner(self) -> Callable[..., Any]:
        """Runs the file: (path, example_outputs)."""
        return import_module(self.module).Runner

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]

    def convert(self, model: nn.Module) -> nn.Module:
        """A quantized model with the integers that this format takes."""
        return convert(model, self.activations, self.rounded_weights)


_HERE = "lightning_compress.deploy."
_ONNX = ("onnx", "onnxscript")
FORMATS = {
    "onnx": Format(".onnx", "onnx", (*_ONNX, "onnxruntime"), _HERE + "onnx", weight_bits=(8, 4)),
    "openvino": Format(".xml", "openvino", (*_ONNX, "openvino"), _HERE + "openvino"),
    "executorch": Format(".pte", "executorch", ("executorch",), _HERE + "executorch", "int8", False),
    "litert": Format(".tflite", "litert", ("litert_torch", "ai_edge_litert"), _HERE + "litert", "int8", False, True),
    "torch": Format(".pt2", "", (), _HERE + "torch_export"),
}


def installed_formats() -> list[str]:
    """The formats whose packages are installed."""
    return [name for name, kind in FORMATS.items() if not kind.missing]


def check_formats(formats: Sequence[str]) -> None:
    """Raise if a format is unknown or its packages are not installed.

    Raises:
        ValueError: If a format is unknown.
        ModuleNotFoundError: If a package is missing, with the pip command.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"formats={name!r}: accepted are {', '.join(map(repr, FORMATS))}. Name one of them.")
        if FORMATS[name].missing:
            raise ModuleNotFoundError(
                f"The format {name!r} needs {', '.join(FORMATS[name].missing)}, which is not installed. "
                f"Run: {pip_command([name])}"
            )


def pip_command(formats: Sequence[str]) -> str:
    """What installs the packages of formats."""
    return f"pip install 'lightning-compress[{','.join(FORMATS[name].extra for name in formats)}]'"
