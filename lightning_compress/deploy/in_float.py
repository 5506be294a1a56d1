"""What of a quantized file computes in float, and why, in words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_compress.layers import EMBEDDING
from lightning_compress.quantization.model import quantization_of

__all__ = ["in_float", "said_of_some"]

_SHOWN = 5
_NO_KERNEL = {"onnxruntime": ("GRU", "RNN", "ConvTranspose")}
_ONE_SCALE = "openvino's integer LSTM takes one scale for its input and its hidden state"


def in_float(model: nn.Module, runtime: str, found: Sequence[tuple[str, str]]) -> list[str]:
    """The modules that a runtime computes in float, with the reason where it is known.

    Args:
        model: The quantized model.
        runtime: Name of the runtime.
        found: Modules and types of operations that it was seen to run in float. Where it does not tell all their
            modules, those with a reason are named, too.

    Example:
        >>> from lightning_compress.quantization import int8
        >>> from lightning_compress.quantization.model import quantize_layers
        >>> model = nn.ModuleDict({"net": nn.GRU(3, 4), "head": nn.Linear(4, 2)})
        >>> found = quantize_layers(model, int8())
        >>> in_float(model, "onnxruntime", [("net", "GRU"), ("head", "Gemm")])
        ['net (onnxruntime has no integer kernel of GRU)', 'head (Gemm)']
    """
    reasons = _reasons(model, runtime)
    kinds = {module: kind for module, kind in found if module}
    lines = []
    for module, kind in kinds.items():
        known = _of_module(reasons, module)
        if known is None and kind in _NO_KERNEL.get(runtime, ()):
            known = _none_of(runtime, kind)
        lines.append(f"{module} ({known or kind})")
    if kinds and all(module for module, _ in found):
        return lines
    others = [name for name in reasons if not any(f"{name}.".startswith(f"{module}.") for module in kinds)]
    return lines + [f"{name} ({reasons[name]})" for name in others]


def said_of_some(named: Sequence[str]) -> str:
    """A handful of names, and how many more there are.

    Example:
        >>> said_of_some(["a", "b"]), said_of_some(list("abcdefg"))
        ('a, b', 'a, b, c, d, e and 2 more')
    """
    more = len(named) - _SHOWN
    return ", ".join(named[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _reasons(model: nn.Module, runtime: str) -> dict[str, str]:
    """By module, or by the name of a parameter."""
    quantization = quantization_of(model)
    if quantization is None:
        return {}
    reasons = quantization.skipped | quantization.without_data()
    for layer in quantization.layers:
        kind = next((kind for kind in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(layer.module, kind)), None)
        if isinstance(layer.module, EMBEDDING):  # reads rows, and multiplies nothing
            continue
        if quantization.scheme.for_layer(layer.name).inputs is None:
            reasons.setdefault(layer.module_name, "quantized in its weights only")
        elif kind is nn.LSTM and runtime == "openvino":
            reasons.setdefault(layer.module_name, _ONE_SCALE)
        elif kind is not None and (kind is not nn.LSTM or runtime != "onnxruntime"):
            reasons.setdefault(layer.module_name, _none_of(runtime, kind.__name__))
    return reasons


def _of_module(reasons: dict[str, str], module: str) -> str | None:
    """The reason of a module, or of one of its weights, whose name has the module's before it."""
    inside = (reason for name, reason in reasons.items() if name.startswith(f"{module}."))
    return reasons.get(module) or next(inside, None)


def _none_of(runtime: str, kind: str) -> str:
    return f"{runtime} has no integer kernel of {kind}"
