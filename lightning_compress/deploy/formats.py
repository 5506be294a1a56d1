"""The formats that a model can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from lightning_compress.checks import check_names, check_one_of
from lightning_compress.deploy.nbits import check_groups
from lightning_compress.deploy.wide import Wide, check_wide
from lightning_compress.quantization.activation_codes import Activations
from lightning_compress.quantization.convert import convert

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
        batch_sizes: Batch sizes that it is written and timed for.
        board: For microcontrollers: the runtime is slow here and its milliseconds say nothing of them, so it is not
            timed, and a file is written only where the format is named.
        groups: Sizes of the groups of weights that its kernels take a scale for.
        group_bits: Bits of such a weight at most.
        wide: Which activations of more than 8 bits it takes.
        has_metadata: Whether the file has a place for what it says of itself.
        integer_lstm: Whether its runtime multiplies the weights of an LSTM in integers.
    """

    suffix: str
    extra: str
    packages: tuple[str, ...]
    module: str
    activations: Activations = "uint8"
    dynamic_batch: bool = True
    rounded_weights: bool = False
    weight_bits: tuple[int, ...] = (8,)
    batch_sizes: tuple[int, ...] = (1, 64)
    board: bool = False
    groups: Sequence[int] = ()
    group_bits: int = 8
    wide: Wide = "none"
    has_metadata: bool = False
    integer_lstm: bool = False

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

    def check(self, model: nn.Module) -> None:
        """Raise if the scheme of a model has groups or activations that the format's kernels do not take.

        Raises:
            ValueError: With the layer's name.
        """
        runtime = self.module.rpartition(".")[2]
        some = ", ".join(map(str, self.groups[:5]))
        accepted = f"groups of {some} and at most {self.group_bits} bits" if some else "'channel' or 'tensor'"
        check_groups(model, runtime, accepted, self.groups, self.group_bits)
        check_wide(model, runtime, self.wide)

    def convert(self, model: nn.Module) -> nn.Module:
        """A quantized model with the integers that this format takes."""
        self.check(model)
        return convert(model, self.activations, self.rounded_weights)


_HERE = "lightning_compress.deploy."
_ONNX = ("onnx", "onnxscript")
_LITERT = ("litert_torch", "ai_edge_litert")
_BLOCKS = (16, 32, 64, 128, 256)
_ONNX_WEIGHTS: dict[str, Any] = {"weight_bits": (8, 4), "groups": _BLOCKS}
_8DA4W: dict[str, Any] = {"groups": range(32, 4097, 32), "group_bits": 4}
FORMATS = {
    "onnx": Format(
        *(".onnx", "onnx", (*_ONNX, "onnxruntime"), _HERE + "onnx"),
        **_ONNX_WEIGHTS,
        wide="any",
        has_metadata=True,
        integer_lstm=True,
    ),
    "openvino": Format(".xml", "openvino", (*_ONNX, "openvino"), _HERE + "openvino", has_metadata=True, groups=_BLOCKS),
    "executorch": Format(".pte", "executorch", ("executorch",), _HERE + "executorch", "int8", False, **_8DA4W),
    "litert": Format(".tflite", "litert", _LITERT, _HERE + "litert", "int8", False, True, wide="symmetric"),
    "torch": Format(".pt2", "", (), _HERE + "torch_export", has_metadata=True, wide="any"),
    "tflm": Format(
        *(".tflite", "tflm", (*_LITERT, "tflite_micro"), _HERE + "tflm", "int8", False, True),
        batch_sizes=(1,),
        board=True,
        wide="symmetric",
    ),
}


def installed_formats() -> list[str]:
    """The formats whose packages are installed, without those that have to be named."""
    return [name for name, kind in FORMATS.items() if not kind.missing and not kind.board]


def check_formats(formats: Sequence[str]) -> None:
    """Raise if a format is unknown or its packages are not installed.

    Raises:
        ValueError: If a format is unknown.
        ModuleNotFoundError: If a package is missing, with the pip command.
    """
    check_names("formats", formats, f"a list of {', '.join(map(repr, FORMATS))}")
    for name in formats:
        check_one_of("formats", name, FORMATS)
        if FORMATS[name].missing:
            raise ModuleNotFoundError(
                f"The format {name!r} needs {', '.join(FORMATS[name].missing)}, which is not installed. "
                f"Run: {pip_command([name])}"
            )


def pip_command(formats: Sequence[str]) -> str:
    """What installs the packages of formats."""
    return f"pip install 'lightning-compress[{','.join(FORMATS[name].extra for name in formats)}]'"
