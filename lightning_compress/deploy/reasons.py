"""Why a model could not be written: what the exporter says, in words, and which line of the model's code it means."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

from lightning_compress import forward

__all__ = ["reason_of"]

_FORWARD = Path(forward.__file__)
_EXPORTERS = ("torch", "onnxscript", "onnx_ir", "onnxruntime", "executorch", "litert_torch", "openvino", "lightning")
_WORDS = {
    "GuardOnDataDependentSymNode": "the forward takes its way by the values of a tensor, which a file cannot",
    "ata-dependent": "the forward takes its way by the values of a tensor, which a file cannot",
    "Missing out variants": "ExecuTorch has no kernel for an operation of the model",
    "Didn't find op for builtin opcode": "LiteRT has no kernel for an operation of the model",
}


def reason_of(error: BaseException) -> str:
    """What went wrong at first, in a line, with the line of the model's code where it did.

    Args:
        error: Whatever a converter or a runtime raised.

    Example:
        >>> reason_of(ValueError("no such operation"))
        'ValueError: no such operation'
    """
    chain = list(_chain(error))
    first = chain[-1]
    line = (str(first).strip().splitlines() or ["no message"])[0]
    said = f"{type(first).__name__}: {line}"
    words = next((words for key, words in _WORDS.items() if key in said), None)
    place = next((place for cause in reversed(list(_chain(error, True))) if (place := _place(cause)) is not None), None)
    return f"{f'{words} ({said})' if words else said}{f', at {place}' if place else ''}"


def _chain(error: BaseException, with_context: bool = False) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or (found.__context__ if with_context else None)


def _place(error: BaseException) -> str | None:
    """The innermost line of the model's code: below the call of its forward, and no exporter's."""
    place = None
    inside = False
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        inside = inside or path == _FORWARD
        folder = path.parts[path.parts.index("site-packages") + 1] if "site-packages" in path.parts else ""
        if inside and path.suffix == ".py" and path != _FORWARD and folder not in _EXPORTERS and frame.line:
            place = f"{path.name}:{frame.lineno}, {frame.line}"
    return place
