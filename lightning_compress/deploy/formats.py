"""The formats that a model can be exported to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["FORMATS", "Format", "check_formats"]


@dataclass(frozen=True)
class Format:
    """One file format and what it takes.

    Args:
        suffix: Ending of the file's name.
        extra: The extra of this distribution that installs what it needs.
        packages: Import names of what it needs.
        module: Module with ``export`` and ``Runner``.
    """

    suffix: str
    extra: str
    packages: tuple[str, ...]
    module: str

    @property
    def export(self) -> Callable[..., None]:
        """Writes the file: (model, inputs, path)."""
        return import_module(self.module).export

    @property
    def runner(self) -> Callable[..., Any]:
        """Runs the file: (path, example_outputs)."""
        return import_module(self.module).Runner


FORMATS = {
    "onnx": Format(".onnx", "onnx", ("onnx", "onnxscript", "onnxruntime"), "lightning_compress.deploy.onnx"),
}


def check_formats(formats: Sequence[str]) -> None:
    """Raise if a format is unknown or its packages are not installed.

    Raises:
        ValueError: If a format is unknown.
        ModuleNotFoundError: If a package is missing, with the pip command.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"formats={name!r}: accepted are {', '.join(map(repr, FORMATS))}. Name one of them.")
        missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
        if missing:
            raise ModuleNotFoundError(
                f"The format {name!r} needs {', '.join(missing)}, which is not installed. "
                f"Run: pip install 'lightning-compress[{FORMATS[name].extra}]'"
            )
