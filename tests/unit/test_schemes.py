"""What is quantized how."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
import torch

from lightning_compress import int8
from lightning_compress.quantization import Affine, MinMax, MovingAverage, Scheme

SCHEMES = [
    int8(),
    int8(include=["a", "b.*"], exclude=["c"]),
    Scheme(Affine(4, symmetric=True), None, MinMax(), "tensor"),
    Scheme(inputs=Affine(5), observer=MovingAverage(0.2)),
]


def test_int8_is_symmetric_for_weights_by_channel_and_asymmetric_for_inputs() -> None:
    scheme = int8(["a"], ["b"])
    assert (scheme.weight, scheme.inputs) == (Affine(8, symmetric=True), Affine(8, symmetric=False))
    assert (scheme.weight_granularity, scheme.observer) == ("channel", MovingAverage(0.01))
    assert (scheme.include, scheme.exclude) == (("a",), ("b",))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_comes_back_from_a_checkpoint_that_holds_plain_values(scheme: Scheme) -> None:
    buffer = io.BytesIO()
    torch.save(scheme.to_state(), buffer)
    buffer.seek(0)
    loaded = Scheme.from_state(torch.load(buffer, weights_only=True))
    for field in ("weight", "inputs", "observer", "weight_granularity"):
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


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match="'channel' and 'tensor'"):
        Scheme(weight_granularity="row")
