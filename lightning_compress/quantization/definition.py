"""A scheme: what is quantized how. The ready-made ones stand in :mod:`~lightning_compress.quantization.schemes`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import isabstract
from typing import Any, Literal

from lightning_compress.checks import (
    check_by_name,
    check_flag,
    check_instance,
    check_names,
    check_whole_number,
    first_line,
    refusal,
    shown,
)
from lightning_compress.layers import matches
from lightning_compress.quantization import affine, clusters, float8, learned, levels, observers, per_token, short_scale
from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.observers import MovingAverage, Observer
from lightning_compress.quantization.overflow import portable
from lightning_compress.quantization.quantizer import Quantizer

__all__ = ["Scheme"]

# where the classes stand that a checkpoint may name
_KNOWN = (affine, learned, float8, levels, clusters, observers, per_token, short_scale)


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are quantized, and where.

    Args:
        weight: Quantizer of the weights, of at most 8 bits.
        inputs: Quantizer of the activations; None leaves them in float.
        observer: What determines the range of the activations.
        weight_granularity: Which weights of a layer share a scale: ``"channel"`` (an output channel), ``"tensor"`` (the
            whole weight), or the size of a group along the input axis.
        include: Name patterns of the layers to quantize; empty for all.
        exclude: Name patterns of layers to leave in float.
        overrides: Schemes of the layers whose names match a pattern; the first match decides. They only say how, not
            where: no include, exclude or overrides of their own.
        exact_kernels: Promise that whatever runs the files adds products in 32 bits, so that weights of 8 bits use the
            codes -127..127: ExecuTorch, LiteRT and ARM do, and onnxruntime, OpenVINO and Inductor on an x86 CPU with
            VNNI. Without it 8-bit weights that meet 8-bit activations use -64..64, which every x86 CPU adds exactly
            (:mod:`~lightning_compress.quantization.overflow`).

    Shape of a weight's scale, for a weight of shape (out, in, *kernel):

    ======================  ===========================  ====================================================
    ``weight_granularity``  shape                        note
    ======================  ===========================  ====================================================
    ``"channel"``           (out,)                       along axis 1 for transposed convolutions
    ``"tensor"``            ()                           that of activations, too
    an int g                (out * in * kernel / g,)     (out,) where g does not divide in * kernel
    ======================  ===========================  ====================================================

    Example:
        >>> from lightning_compress import int8
        >>> mixed = Scheme(weight=Affine(4, symmetric=True), overrides={"head": int8()})
        >>> mixed.for_layer("body.0").weight.bits, mixed.for_layer("head").weight.bits
        (4, 8)
    """

    weight: Quantizer = field(default_factory=lambda: Affine(8, symmetric=True))
    inputs: Quantizer | None = field(default_factory=Affine)
    observer: Observer = field(default_factory=MovingAverage)
    weight_granularity: Literal["channel", "tensor"] | int = "channel"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    overrides: Mapping[str, Scheme] = field(default_factory=dict)
    exact_kernels: bool = False

    def __post_init__(self) -> None:
        """Refuse parts of the wrong kind, which Hydra's _target_ would let pass."""
        weights = "a Quantizer, for instance Affine(8, symmetric=True)"
        check_instance("Scheme.weight", self.weight, Quantizer, weights)
        if self.weight.bits > 8:
            accepted = "a Quantizer of at most 8 bits, since weights are stored as int8 or uint8"
            fix = "Take Affine(8, symmetric=True) here; activations (Scheme.inputs) may have 16."
            raise refusal("Scheme.weight", self.weight, accepted, fix)
        inputs = "a Quantizer or None, for instance Affine(8)"
        check_instance("Scheme.inputs", self.inputs, (Quantizer, type(None)), inputs)
        check_instance("Scheme.observer", self.observer, Observer, "an Observer, for instance MovingAverage()")
        meaning = "; take False unless every machine that runs the files has VNNI, or they run in ExecuTorch or LiteRT"
        check_flag("Scheme.exact_kernels", self.exact_kernels, meaning)
        # lists of a configuration file, so that equal schemes compare equal
        for name in ("include", "exclude"):
            check_names(f"Scheme.{name}", getattr(self, name))
            object.__setattr__(self, name, tuple(getattr(self, name)))
        size = self.weight_granularity
        if not (isinstance(size, str) and size in ("channel", "tensor")):
            accepted = "'channel' or 'tensor', or a whole number from 1, the size of a group"
            check_whole_number("Scheme.weight_granularity", size, accepted, low=1)
        check_by_name("Scheme.overrides", self.overrides, "a dict of schemes by name pattern, such as {'head': int8()}")
        object.__setattr__(self, "overrides", dict(self.overrides))
        for pattern, nested in self.overrides.items():
            check_instance(f"Scheme.overrides[{pattern!r}]", nested, Scheme, "a Scheme, for instance int8()")
            if nested.include or nested.exclude or nested.overrides:
                raise ValueError(
                    f"Scheme.overrides[{pattern!r}] has an include, exclude or overrides of its own: accepted is a "
                    "Scheme without, for the pattern says where. Put them into the outer Scheme."
                )

    def for_layer(self, name: str) -> Scheme:
        """The scheme of a layer: that of the first override whose pattern its name matches, or this one."""
        return next((nested for pattern, nested in self.overrides.items() if matches(name, [pattern])), self)

    def weight_of(self, name: str) -> Quantizer:
        """The quantizer that writes a layer's weight: that of its scheme, with codes that the kernels add exactly."""
        theirs = self.for_layer(name)
        exact = self.exact_kernels or theirs.exact_kernels
        return theirs.weight if exact else portable(theirs.weight, theirs.inputs)

    def to_state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint that loads without pickle."""
        return _to_state(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Scheme:
        """The scheme of :meth:`to_state`; classes of a user's own must be given again by hand.

        Raises:
            ValueError: If the state names a class that is not part of this package, or is no scheme's.
        """
        try:
            # a state from before there was a choice of codes is of a model that was trained in the full range
            found = _from_state({"class": "Scheme", "exact_kernels": True, **state})
        except TypeError as error:  # a field that is of another kind, unknown or missing
            raise ValueError(f"The checkpoint's scheme cannot be read: {first_line(error)}.") from error
        if not isinstance(found, Scheme):
            raise ValueError(f"The checkpoint's scheme cannot be read: it is {shown(found)}.")
        return found


def _to_state(value: object) -> Any:
    """Dataclasses as dicts with the name of their class, and what is in them likewise."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to_state(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {key: _to_state(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return list(value)
    return value


def _from_state(state: object) -> Any:
    """What :func:`_to_state` was given."""
    if not isinstance(state, dict):
        return state
    values = {key: _from_state(value) for key, value in state.items()}
    name = values.get("class")
    if not isinstance(name, str):
        return values
    kinds: dict[str, Any] = {"Scheme": Scheme}
    for module in _KNOWN:
        named = {key: getattr(module, key) for key in module.__all__}
        kinds |= {key: kind for key, kind in named.items() if isinstance(kind, type) and not isabstract(kind)}
    if name not in kinds:
        raise ValueError(f"The checkpoint's scheme uses {name}, a class of your own: pass the scheme to the loader.")
    del values["class"]
    return kinds[name](**values)
