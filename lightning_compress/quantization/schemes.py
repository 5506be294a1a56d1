"""Ready-made schemes, each a word that configuration files and commands use, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

from lightning_compress.checks import refusal, shown
from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.clusters import Binary, Codebook
from lightning_compress.quantization.definition import Scheme
from lightning_compress.quantization.float8 import Float8
from lightning_compress.quantization.learned import LearnedStep
from lightning_compress.quantization.levels import AdditivePowerOfTwo, Exponential, PowerOfTwo
from lightning_compress.quantization.per_token import PerToken
from lightning_compress.quantization.quantizer import Quantizer
from lightning_compress.quantization.short_scale import ShortScale

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
    "w4_groups",
    "w4a8",
    "w4a8_groups",
    "w8",
    "w8a16",
]

Names = Sequence[str]
Overrides = Mapping[str, Scheme] | None


def _scheme(
    weight: Quantizer, inputs: Quantizer | None, include: Names, exclude: Names, overrides: Overrides, **more: Any
) -> Scheme:
    return Scheme(
        weight, inputs, include=include, exclude=exclude, overrides={} if overrides is None else overrides, **more
    )


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


def w8a16(include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights of 8 bits, activations of 16 around zero: for outputs that 256 steps are too few for, such as sound.

    The 16x8 of LiteRT and TensorFlow Lite Micro, whose integer kernels ask for the zero point 0. The other runtimes
    that take its files compute around the codes in float: a smaller file, and no faster. Arguments as in :func:`int8`.

    Example:
        >>> w8a16().inputs.limits, w8a16().weight_of("layer").limits
        ((-32767, 32767), (-127, 127))
    """
    return _scheme(Affine(8, symmetric=True), Affine(16, symmetric=True), include, exclude, overrides)


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
    weight = LearnedStep(bits, symmetric=True)
    inputs = LearnedStep(bits)
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


def w4_groups(group: int = 32, include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights of 4 bits with a scale for every ``group`` inputs, activations in float: linear layers alone.

    Ships as ``MatMulNBits`` in ONNX files, as 8da4w in ExecuTorch (whose kernels quantize activations as they run:
    :func:`w4a8_groups` trains with that), and by :func:`lightning_compress.save_pack_quantized` to vLLM.

    Args:
        group: Inputs that share a scale; a divisor of those of every layer. onnxruntime takes 16, 32, 64, 128, 256,
            ExecuTorch multiples of 32.
        include: Name patterns of the layers to quantize; empty for all.
        exclude: Name patterns of layers to leave in float.
        overrides: Schemes of the layers whose names match a pattern, such as ``{"embedding": w8()}``.

    Example:
        >>> w4_groups(64).weight_granularity
        64
    """
    return _scheme(ShortScale(4), None, include, exclude, overrides, weight_granularity=group)


def w4a8_groups(group: int = 32, include: Names = (), exclude: Names = (), overrides: Overrides = None) -> Scheme:
    """Weights as in :func:`w4_groups`; activations of 8 bits, by the range of each token as the model runs (8da4w).

    Arguments as in :func:`w4_groups`.
    """
    return _scheme(ShortScale(4), PerToken(), include, exclude, overrides, weight_granularity=group)


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
    *(int8, w8, w8a16, int4, w4a8, w2a8, ternary, binary),
    *(log4, exp4, apot4, codebook, fp8, w4_groups, w4a8_groups, lsq),
)


def scheme(word: str, **arguments: object) -> Scheme:
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
    if not isinstance(word, str) or word not in words:
        near = get_close_matches(shown(word).lower(), words, 1, 0.0)[0]
        raise ValueError(f"scheme={shown(word)}: accepted are {', '.join(words)}. Did you mean {near!r}?")
    known = list(signature(words[word]).parameters)
    for name, value in arguments.items():
        if name not in known:
            raise refusal(
                f"scheme({word!r}).{name}", value, f"one of {', '.join(known)}", f"Leave {name} out.", TypeError
            )
    return words[word](**arguments)
