"""What is quantized how."""

from __future__ import annotations

import io
from dataclasses import dataclass

import hydra
import pytest
import torch

from lightning_compress.quantization import (
    MSE,
    AdditivePowerOfTwo,
    Affine,
    Binary,
    Codebook,
    Entropy,
    Exponential,
    Float8,
    LearnedClip,
    LearnedStep,
    MinMax,
    MovingAverage,
    Percentile,
    PerToken,
    PowerOfTwo,
    Quantizer,
    Scheme,
    ShortScale,
    Ternary,
    codebook,
    int4,
    int8,
    lsq,
    scheme,
    w4a8,
    w8,
)

WORDS = ["int8", "w8", "int4", "w4a8", "w2a8", "ternary", "binary", "log4", "exp4", "apot4", "codebook", "fp8", "lsq"]
WORDS += ["w4_groups", "w4a8_groups", "w8a16"]
SCHEMES = [
    *(scheme(word) for word in WORDS),
    int8(overrides={"head": w8(), "body.*": lsq(3)}),
    codebook(3, include=["a"], overrides={"head": Scheme(Codebook(8), observer=Percentile(0.99))}),
    Scheme(Ternary(), LearnedClip(4), MSE(), 32),
    Scheme(AdditivePowerOfTwo(3), Float8("e5m2"), Entropy(), overrides={"class": w4a8()}),
    int8(include=["a", "b.*"], exclude=["c"]),
    Scheme(Affine(4, symmetric=True), None, MinMax(), "tensor"),
    Scheme(inputs=Affine(5), observer=MovingAverage(0.2)),
]


def test_int8_is_symmetric_for_weights_by_channel_and_asymmetric_for_inputs() -> None:
    scheme = int8(["a"], ["b"])
    assert (scheme.weight, scheme.inputs) == (Affine(8, symmetric=True), Affine(8, symmetric=False))
    assert (scheme.weight_granularity, scheme.observer) == ("channel", MovingAverage(0.01))
    assert (scheme.include, scheme.exclude) == (("a",), ("b",))


LEARNED, PLAIN = LearnedStep(4, symmetric=True), Affine(8)


@pytest.mark.parametrize(
    ("word", "weight", "inputs", "granularity"),
    [
        ("int8", Affine(8, symmetric=True), PLAIN, "channel"),
        ("w8", Affine(8, symmetric=True), None, "channel"),
        ("int4", LEARNED, LearnedStep(4), "channel"),
        ("lsq", LEARNED, LearnedStep(4), "channel"),
        ("w4a8", LEARNED, PLAIN, "channel"),
        ("w2a8", LearnedStep(2, symmetric=True), PLAIN, "channel"),
        ("ternary", LearnedStep(2, symmetric=True), PLAIN, "channel"),
        ("binary", Binary(), PLAIN, "channel"),
        ("log4", PowerOfTwo(4), PLAIN, "channel"),
        ("exp4", Exponential(4), PLAIN, "channel"),
        ("apot4", AdditivePowerOfTwo(4), PLAIN, "channel"),
        ("codebook", Codebook(4), PLAIN, "tensor"),
        ("fp8", Float8("e4m3"), Float8("e4m3"), "channel"),
        ("w4_groups", ShortScale(4), None, 32),
        ("w4a8_groups", ShortScale(4), PerToken(), 32),
        ("w8a16", Affine(8, symmetric=True), Affine(16, symmetric=True), "channel"),
    ],
)
def test_a_word_says_how(word: str, weight: Quantizer, inputs: Quantizer | None, granularity: str) -> None:
    given = scheme(word, include=["a"], exclude=["a.b"], overrides={"a.c": int8()})
    assert (given.weight, given.inputs, given.weight_granularity) == (weight, inputs, granularity)
    assert (given.include, given.exclude, given.overrides) == (("a",), ("a.b",), {"a.c": int8()})
    assert type(given.weight) is type(weight)


def test_three_codes_are_ternary() -> None:
    assert scheme("w2a8").weight.limits == (-1, 1)


@pytest.mark.parametrize(
    ("word", "near"), [("int", "int8"), ("W4A8", "w4a8"), ("ternery", "ternary"), ("", "int8"), (8, "int8")]
)
def test_an_unknown_word_is_refused_with_those_that_are_accepted(word: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"scheme={word!r}: accepted are int8, .*lsq\. Did you mean '\w+'") as error:
        scheme(word)
    assert near in str(error.value)
    if word not in ("", 8):
        assert f"Did you mean {near!r}" in str(error.value)


def test_the_first_override_that_matches_decides() -> None:
    first, second = w8(), int4()
    mixed = int8(overrides={"body.0": first, "body": second, "*.head": first})
    assert mixed.for_layer("body.0") is first
    assert mixed.for_layer("body.0.conv") is first
    assert mixed.for_layer("body.1") is second
    assert mixed.for_layer("net.head") is first
    assert mixed.for_layer("other") is mixed


@pytest.mark.parametrize("nested", [int8(["a"]), int8(exclude=["a"]), int8(overrides={"a": w8()})])
def test_an_override_that_says_where_is_refused(nested: Scheme) -> None:
    with pytest.raises(ValueError, match=r"Scheme\.overrides\['head'\] has an include, exclude or overrides"):
        int8(overrides={"head": nested})


def test_an_override_that_is_no_scheme_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Scheme\.overrides\['head'\]=None"):
        int8(overrides={"head": None})


def test_a_configuration_file_makes_a_scheme() -> None:
    node = {"_target_": "lightning_compress.quantization.w4a8", "_convert_": "all", "exclude": ["head"]}
    node["overrides"] = {"first": {"_target_": "lightning_compress.quantization.int8"}}
    made = hydra.utils.instantiate(node)
    assert made == w4a8(exclude=["head"], overrides={"first": int8()})
    assert Scheme.from_state(made.to_state()) == made


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_comes_back_from_a_checkpoint_that_holds_plain_values(scheme: Scheme) -> None:
    buffer = io.BytesIO()
    torch.save(scheme.to_state(), buffer)
    buffer.seek(0)
    loaded = Scheme.from_state(torch.load(buffer, weights_only=True))
    for field in ("weight", "inputs", "observer", "weight_granularity", "overrides"):
        assert getattr(loaded, field) == getattr(scheme, field)
    assert list(loaded.include) == list(scheme.include)
    assert list(loaded.exclude) == list(scheme.exclude)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_equals_the_one_it_was_saved_from(scheme: Scheme) -> None:
    assert Scheme.from_state(scheme.to_state()) == scheme


@dataclass(frozen=True)
class Mine(Affine):
    bits: int = 4


def test_a_class_of_ones_own_must_be_given_by_hand() -> None:
    with pytest.raises(ValueError, match="Mine, a class of your own"):
        Scheme.from_state(Scheme(weight=Mine(symmetric=True)).to_state())


@pytest.mark.parametrize(
    ("field", "value"),
    [("weight", None), ("weight", MinMax()), ("inputs", 8), ("observer", Affine()), ("weight", Affine)],
)
def test_a_part_of_the_wrong_kind_is_refused(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"Scheme\.{field}"):
        Scheme(**{field: value})


@pytest.mark.parametrize("granularity", ["row", 0, -4, 2.0, True, None])
def test_an_unknown_granularity_is_refused(granularity: object) -> None:
    with pytest.raises(ValueError, match="'channel' or 'tensor', or a whole number from 1"):
        Scheme(weight_granularity=granularity)
