"""What is quantized how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from lightning_compress.layers import matches
from lightning_compress.quantization import levels, observers, quantizers
from lightning_compress.quantization.levels import AdditivePowerOfTwo, Binary, Codebook, Exponential, PowerOfTwo
from lightning_compress.quantization.observers import MovingAverage, Observer
from lightning_compress.quantization.overflow import portable
from lightning_compress.quantization.quantizers import Affine, Float8, LearnedStep, Quantizer

__all__ = [
    "Scheme",
    "apot4",
    "binary",
    "codebook",
    "exp4",
    "fp8",
    "int4",
    "int8",
    "log4",
    "lsq",
    "scheme",
    "ternary",
    "w2a8",
    "w4a8",
    "w8",
]


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are quantized, and where.

    Args:
        weight: Quantizer of the weights.
        inputs: Quantizer of the activations; None leaves them in float.
        observer: What determines the range of the activations.
        weight_granularity: ``"channel"`` for one scale an output channel, ``"tensor"`` for one a weight; or a size, so
            many weights along the input axis share a scale.
        include: Name patterns of the layers to quantize; empty for all.
        exclude: Name patterns of layers to leave in float.
        overrides: Schemes of the layers whose names match a pattern; the first match decides. They only say how, not
            where: no include, exclude or overrides of their own.
        exact_kernels: Promise that whatever runs the files adds products in 32 bits, so that weights of 8 bits use the
            codes -127..127: ExecuTorch, LiteRT and ARM do, and onnxruntime, OpenVINO and Inductor on an x86 CPU with
            VNNI. Without it 8-bit weights that meet 8-bit activations use -64..64, which every x86 CPU adds exactly
            (:mod:`~lightning_compress.quantization.overflow`).

    Example:
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
        for name, kind, optional, example in (
            ("weight", Quantizer, False, "Affine(8, symmetric=True)"),
            ("inputs", Quantizer, True, "Affine(8)"),
            ("observer", Observer, False, "MovingAverage()"),
        ):
            value = getattr(self, name)
            if not (isinstance(value, kind) or (optional and value is None)):
                what = f"{'an' if kind is Observer else 'a'} {kind.__name__}{' or None' if optional else ''}"
                raise TypeError(f"Scheme.{name}={value!r}: accepted is {what}, for instance {example}.")
        if not isinstance(self.exact_kernels, bool):
            raise TypeError(
                f"Scheme.exact_kernels={self.exact_kernels!r}: accepted are True and False. Take False unless every "
                "machine that runs the files has VNNI, or they run in ExecuTorch or LiteRT."
            )
        for name in ("include", "exclude"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        size = self.weight_granularity
        if size not in ("channel", "tensor") and not (type(size) is int and size > 0):
            raise ValueError(
                f"Scheme.weight_granularity={size!r}: accepted are 'channel' and 'tensor', or a whole number above 0, "
                "the size of a group."
            )
        object.__setattr__(self, "overrides", dict(self.overrides))
        for pattern, nested in self.overrides.items():
            if not isinstance(nested, Scheme):
                raise TypeError(f"Scheme.overrides[{pattern!r}]={nested!r}: accepted is a Scheme, for instance int8().")
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
            ValueError: If the state names a class that is not part of this package.
        """
        # a state from before there was a choice of codes is of a model that was trained in the full range
        return _from_state({"class": "Scheme", "exact_kernels": True, **state})


Names = Sequence[str]
Overrides = Mapping[str, Scheme] | None


def _scheme(
    weight: Quantizer, inputs: Quantizer | None, include: Names, exclude: Names, overrides: Overrides, **more: Any
) -> Scheme:
    return Scheme(weight, inputs, include=include, exclude=exclude, overrides=overrides or {}, **more)


def int8(include: Names = (), exclude: Names = (), overrides: Overrides = None, exact_kernels: bool = False) -> Scheme:
    """8 bits: weights symmetric with one scale per output channel, activations asymmetric with one scale per tensor.

    Args:
        include: Name patterns of the layers to quantize; empty for all.
        exclude: Name patterns of layers to leave in float.
        overrides: Schemes of the layers whose names match a pattern.
        exact_kernels: Use the codes -127..127 rather than -64..64 for weights, which needs VNNI on x86, or ExecuTorch
            or LiteRT: see :class:`Scheme`.

    Example:
        >>> int8(exclude=["head"]).weight.bits
        8
        >>> int8().weight_of("layer").limits, int8(exact_kernels=True).weight_of("layer").limits
        ((-64, 64), (-127, 127))
    """
    return _scheme(Affine(8, symmetric=True), Affine(8), include, exclude, overrides, exact_kernels=exact_kernels)


def w8(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights of 8 bits, activations in float: a smaller file. Arguments as in :func:`int8`."""
    return _scheme(Affine(8, symmetric=True), None, include, exclude, overrides)


def lsq(
    bits: int = 4,
    include: Names = (),
    exclude: Names = (),
    overrides: Overrides = None,
    exact_kernels: bool = False,
) -> Scheme:
    """Weights and activations of a few bits, all with learned steps (Esser 2020, arXiv:1902.08153).

    The paper keeps the first and the last layer at 8 bits: ``overrides={"first": int8(), "last": int8()}``.

    Args:
        bits: Bits of weights and activations, 2..8.
        include: Name patterns of the layers to quantize; empty for all.
        exclude: Name patterns of layers to leave in float.
        overrides: Schemes of the layers whose names match a pattern.
        exact_kernels: Use all codes of 8 bits for weights: see :class:`Scheme`.

    Example:
        >>> lsq(3, overrides={"head": int8()}).for_layer("head").inputs.bits
        8
    """
    weight, inputs = LearnedStep(bits, symmetric=True), LearnedStep(bits)
    return _scheme(weight, inputs, include, exclude, overrides, exact_kernels=exact_kernels)


def int4(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights and activations of 4 bits (W4A4), with learned steps: ``lsq(4)``.

    First and last layer: see :func:`lsq`. Arguments as in :func:`int8`.
    """
    return lsq(4, include, exclude, overrides)


def w4a8(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights of 4 bits with learned steps, activations of 8.

    First and last layer: see :func:`lsq`. Arguments as in :func:`int8`.
    """
    return _scheme(LearnedStep(4, symmetric=True), Affine(8), include, exclude, overrides)


def w2a8(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights of 2 bits with learned steps, activations of 8; the codes of the weights are -1, 0 and 1.

    First and last layer: see :func:`lsq`. Arguments as in :func:`int8`.
    """
    return _scheme(LearnedStep(2, symmetric=True), Affine(8), include, exclude, overrides)


def ternary(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights -scale, 0 and scale with learned scales, activations of 8 bits: another word for :func:`w2a8`."""
    return w2a8(include, exclude, overrides)


def binary(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights of one bit, a sign times a channel's mean magnitude; activations of 8 bits.

    First and last layer: see :func:`lsq`. Arguments as in :func:`int8`.
    """
    return _scheme(Binary(), Affine(8), include, exclude, overrides)


def log4(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights of 4 bits that are powers of two times a scale, activations of 8 bits.

    First and last layer: see :func:`lsq`. Arguments as in :func:`int8`.
    """
    return _scheme(PowerOfTwo(4), Affine(8), include, exclude, overrides)


def exp4(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights of 4 bits that are powers of a learned base times a learned scale, activations of 8 bits.

    First and last layer: see :func:`lsq`. Arguments as in :func:`int8`.
    """
    return _scheme(Exponential(4), Affine(8), include, exclude, overrides)


def apot4(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights of 4 bits that are sums of powers of two times a learned scale, activations of 8 bits.

    First and last layer: see :func:`lsq`. Arguments as in :func:`int8`.
    """
    return _scheme(AdditivePowerOfTwo(4), Affine(8), include, exclude, overrides)


def codebook(bits: int = 4, include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights from a table of 2^bits values, one table a layer; activations of 8 bits.

    Args:
        bits: Bits of an index into the table, 2..8.
        include: Name patterns of the layers to quantize; empty for all.
        exclude: Name patterns of layers to leave in float.
        overrides: Schemes of the layers whose names match a pattern.

    Example:
        >>> codebook(3).weight.num_codes
        8
    """
    return _scheme(Codebook(bits), Affine(8), include, exclude, overrides, weight_granularity="tensor")


def fp8(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights and activations as floating point of 8 bits, e4m3. Arguments as in :func:`int8`."""
    return _scheme(Float8(), Float8(), include, exclude, overrides)


_WORDS: tuple[Callable[..., Scheme], ...] = (
    *(int8, w8, int4, w4a8, w2a8, ternary, binary),
    *(log4, exp4, apot4, codebook, fp8, lsq),
)


def scheme(word: str, **arguments: Any) -> Scheme:
    """The scheme of a word, for configuration files and commands.

    Args:
        word: Name of one of the functions of this module.
        arguments: Its arguments.

    Raises:
        ValueError: If there is no such word.

    Example:
        >>> scheme("w4a8", exclude=["head"]) == w4a8(exclude=["head"])
        True
    """
    words = {function.__name__: function for function in _WORDS}
    if word not in words:
        near = get_close_matches(str(word).lower(), words, 1, 0.0)[0]
        raise ValueError(f"scheme={word!r}: accepted are {', '.join(words)}. Did you mean {near!r}?")
    return words[word](**arguments)


def _to_state(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to_state(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {key: _to_state(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, list | tuple) else value


def _from_state(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    values = {key: _from_state(value) for key, value in state.items()}
    name = values.get("class")
    if not isinstance(name, str):
        return values
    kinds = {"Scheme": Scheme}
    kinds |= {key: getattr(module, key) for module in (quantizers, levels, observers) for key in module.__all__}
    if name not in kinds:
        raise ValueError(f"The checkpoint's scheme uses {name}, a class of your own: pass the scheme to the loader.")
    return kinds[name](**{key: value for key, value in values.items() if key != "class"})
