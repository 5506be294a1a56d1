"""What a checkpoint holds of a quantization, and whether it belongs to a scheme and to a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict

from torch import Tensor

from lightning_compress.layers import matches
from lightning_compress.quantization.placement import Placement
from lightning_compress.quantization.schemes import Scheme

__all__ = ["QuantizationState", "Stage", "check_overrides", "placement_in", "schemes_differ"]

# How far the quantization of a model is; what each one means is said at ModelQuantization.
Stage = Literal["plain", "tracing", "observing", "quantized", "frozen"]

# What is compared by its value. Anything else is an object of a user's own class, of which a checkpoint that loads
# without pickle holds the fields alone: there the class decides.
_PLAIN = (bool, int, float, str, list, type(None))


class QuantizationState(TypedDict, total=False):
    """A quantization as plain values and tensors, so that ``weights_only=True`` loads it.

    ``placement``, ``ranges`` and ``learned`` are there once quantizers of activations have been placed.
    """

    scheme: dict[str, Any]
    enabled: bool
    placement: dict[str, Any]
    ranges: dict[str, Tensor]
    learned: dict[str, dict[str, Any]]


def placement_in(
    state: QuantizationState, scheme: Scheme, layers: Sequence[str], modules: Collection[str]
) -> Placement | None:
    """Where a checkpoint quantizes activations; None if it was written before they were placed.

    Args:
        state: The checkpoint's part.
        scheme: The scheme here.
        layers: Names of the layers here.
        modules: Names of the modules here.

    Raises:
        ValueError: If the scheme is another, its weights use other codes, or a module is missing here.
    """
    if "placement" not in state:
        return None
    _check_scheme(state["scheme"], scheme.to_state())
    # a checkpoint from before there was a choice has all codes
    _check_codes(state["scheme"].get("exact_kernels", True), scheme, layers)
    placement = Placement(**state["placement"])
    unknown = [name for name in (*placement.inputs, *placement.outputs) if name not in modules]
    if unknown:
        raise ValueError(
            f"The checkpoint quantizes modules that this model does not have: {', '.join(unknown[:8])}. Load it into "
            "the model that it was made from."
        )
    return placement


def schemes_differ(a: object, b: object) -> bool:
    """Whether two schemes, as plain values, write numbers differently."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        # a field that only the newer of two versions knows was None before
        return any(schemes_differ(a.get(key), b.get(key)) for key in a.keys() | b.keys())
    if isinstance(a, _PLAIN):
        return bool(a != b)
    return type(a) is not type(b)


def _check_scheme(theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    """Raise if a field differs; which codes the weights use is for :func:`_check_codes`."""
    for name in ours.keys() - {"exact_kernels"}:
        if name in theirs and schemes_differ(theirs[name], ours[name]):
            raise ValueError(
                f"The checkpoint is quantized by another scheme: {name} is {theirs[name]!r} there and {ours[name]!r} "
                "here. Give the scheme that it was trained with, or a checkpoint from before its calibration."
            )


def _check_codes(exact_kernels: bool, scheme: Scheme, layers: Sequence[str]) -> None:
    """Raise if the codes of a layer differ; where both settings give the same codes, either is right."""
    if exact_kernels == scheme.exact_kernels:
        return
    other = replace(scheme, exact_kernels=exact_kernels)
    differing = [name for name in layers if other.weight_of(name) != scheme.weight_of(name)]
    if differing:
        raise ValueError(
            f"The checkpoint was trained with exact_kernels={exact_kernels}, and the scheme here has "
            f"exact_kernels={scheme.exact_kernels}: the weights of {differing[0]} would be written with other codes. "
            f"Give Scheme(..., exact_kernels={exact_kernels}) to go on as it was trained."
        )


def check_overrides(scheme: Scheme, names: Sequence[str]) -> None:
    """Raise if an override is for no layer.

    Raises:
        ValueError: If a pattern matches none of the names.
    """
    for pattern in scheme.overrides:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(
                f"overrides={pattern!r} matches no layer. The layers are: {', '.join(names) or 'none'}. Give a name, a "
                "prefix of a name, or a glob such as 'encoder.*'."
            )
