"""What a checkpoint holds of a quantization, and whether it belongs to a scheme and to a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_compress.checks import shown
from lightning_compress.layers import matches
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize
from lightning_compress.quantization.placement import Placement
from lightning_compress.quantization.quantizer import QParams
from lightning_compress.quantization.schemes import Scheme

__all__ = ["QuantizationState", "Stage", "check_overrides", "placement_in", "schemes_differ", "take_ranges"]

# How far the quantization of a model is; what each one means is said at ModelQuantization.
Stage = Literal["plain", "tracing", "observing", "quantized", "frozen"]

# What is compared by its value. Anything else is an object of a user's own class, of which a checkpoint that loads
# without pickle holds the fields alone: there the class decides.
_PLAIN = (bool, int, float, str, list, type(None))


class QuantizationState(TypedDict, total=False):
    """A quantization as plain values and tensors, so that ``weights_only=True`` loads it.

    ``layers`` says by which raw parameters the model multiplies (:func:`lightning_compress.layers.know`).
    ``placement``, ``ranges`` and ``learned`` are there once quantizers of activations have been placed.
    """

    scheme: dict[str, Any]
    enabled: bool
    layers: dict[str, str]
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
        ValueError: If a range or a learned number is not finite, the scheme is another, its weights use other codes, or
            a module is missing here.
    """
    _check_kinds(state)
    if "placement" not in state:
        return None
    _check_numbers(state)
    _check_scheme(state["scheme"], scheme.to_state())
    # a checkpoint from before there was a choice has all codes
    _check_codes(state["scheme"].get("exact_kernels", True), scheme, layers)
    placement = Placement(**state["placement"])
    names = (place.rpartition(":")[0] for place in placement.places)
    unknown = [name for name in dict.fromkeys(names) if name not in modules]
    if unknown:
        raise ValueError(
            f"The checkpoint quantizes modules that this model does not have: {', '.join(unknown[:8])}. Load it into "
            "the model that it was made from."
        )
    return placement


def _check_kinds(state: QuantizationState) -> None:
    """Raise for what no quantization has written: another program's, or a damaged one's."""
    _kind("it", state, Mapping)
    _kind("enabled", state.get("enabled"), bool)
    for name, axes in _kind("layers", state.get("layers", {}), Mapping).items():
        _kind("a name in layers", name, str)
        _kind(f"layers of {name}", axes, str)
    if "placement" not in state:
        return
    _check_places(_kind("placement", state["placement"], Mapping))
    for name, seen in _kind("ranges", state.get("ranges"), Mapping).items():
        if not isinstance(seen, Tensor) or not seen.is_floating_point() or seen.dim() != 1 or len(seen) < 2:
            raise _malformed(f"the range of {name}", seen)
    for name, values in _kind("learned", state.get("learned", {}), Mapping).items():
        _check_learned(name, _kind(f"learned of {name}", values, Mapping))


def _check_places(places: Mapping[str, Any]) -> None:
    known = {field.name: type(getattr(Placement(), field.name)) for field in fields(Placement)}
    # a checkpoint of version 0.1 lacks what ran, and one of 0.2 what functions give
    if places.keys() - known.keys() or known.keys() - places.keys() - {"ran", "calls", "transformed"}:
        raise _malformed("placement", places)
    for name, value in places.items():
        _kind(f"placement.{name}", value, known[name])
        for text in tree_leaves([*value.items()] if known[name] is dict else value):
            _kind("a name in placement", text, str)


def _check_learned(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        known = isinstance(key, str) and key.removeprefix("log_") in QParams._fields
        plain = isinstance(value, float | int) and not isinstance(value, bool) and not str(key).startswith("log_")
        if not known or not (plain or isinstance(value, Tensor)):
            raise _malformed(f"{key!r} of {name}", value)
    for key in ("scale", "zero_point") if values else ():
        if not isinstance(values.get(key), Tensor):
            raise _malformed(f"the {key} of {name}", values.get(key))


def _kind(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _malformed(name, value)
    return value


def _malformed(name: str, value: object) -> ValueError:
    return ValueError(f"The checkpoint's quantization is damaged: {name} is {shown(value)}. Give another checkpoint.")


def take_ranges(activations: Mapping[str, ActivationFakeQuantize], ranges: Mapping[str, Tensor]) -> None:
    """Give each place that quantizes what a checkpoint saw there.

    Raises:
        ValueError: If it saw nothing of a place, or with another observer.
    """
    for name, activation in activations.items():
        if name not in ranges or ranges[name].shape != activation.state.shape:
            raise _malformed(f"the range of {name}", ranges.get(name))
        activation.state = ranges[name].clone()


def _check_numbers(state: QuantizationState) -> None:
    """Raise if what quantizes is not a number: every value would be NaN, or zero."""
    for name, seen in state["ranges"].items():
        low, high = seen.flatten()[:2].tolist()
        is_unseen = low == math.inf and high == -math.inf
        if not is_unseen and not (math.isfinite(low) and math.isfinite(high)):
            raise _not_finite(name, f"a range of {low:g} to {high:g}")
    for name, values in state.get("learned", {}).items():
        for key, value in values.items():
            if isinstance(value, Tensor | float) and not torch.as_tensor(value).isfinite().all():
                raise _not_finite(name, f"a {key} that is NaN or infinite")


def _not_finite(name: str, what: str) -> ValueError:
    return ValueError(
        f"The checkpoint quantizes {name} by {what}. Give a checkpoint from before training diverged, and train on "
        "from it with a smaller learning rate."
    )


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
