"""What quantizers learn: where it begins, how it is held, saved and cut; and scales of groups."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import codebook, int4, int8, log4, lsq, ternary, w4a8, w8
from lightning_compress.layers import Layer
from lightning_compress.quantization import (
    AdditivePowerOfTwo,
    Affine,
    Codebook,
    Exponential,
    LearnedClip,
    LearnedStep,
    MinMax,
    Percentile,
    PowerOfTwo,
    Quantizer,
    Scheme,
)
from lightning_compress.quantization.fake_quant import activations, upgrade, weights
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize, WeightFakeQuantize
from lightning_compress.quantization.model import ModelQuantization, quantize_layers
from lightning_compress.structure.record import Record

from .helpers import noise, quantize, randomized, run, trace
from .test_placement import Residual

LEARNED = [LearnedStep(4, symmetric=True), LearnedClip(3, symmetric=True), AdditivePowerOfTwo(4), Exponential(4)]
LEARNED += [Codebook(3)]
X = noise(4, 2, 8, 8)


def rows(weight: Tensor, axis: int, size: int) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Every group of neighbours in a channel, by hand: its channel, its place there, its values."""
    found = []
    for channel in range(weight.shape[axis]):
        values = weight.select(axis, channel).flatten()
        found += [((channel, at), values[at : at + size]) for at in range(0, len(values), size)]
    return found


@pytest.mark.parametrize(
    "quantizer", [Affine(3, symmetric=True), PowerOfTwo(4), LearnedStep(3, symmetric=True)], ids=str
)
@pytest.mark.parametrize(("shape", "axis", "size"), [((6, 8), 0, 4), ((4, 4, 3, 3), 0, 9), ((4, 6, 2, 2), 1, 8)])
@pytest.mark.parametrize("begun", [False, True])
def test_a_group_is_quantized_as_a_tensor_of_its_own(
    shape: tuple[int, ...], axis: int, size: int, quantizer: Quantizer, begun: bool
) -> None:
    weight = noise(*shape)
    fake = WeightFakeQuantize(quantizer, axis, size)
    if begun:
        fake.begin(weight)
    fake.enabled = True
    got = fake(weight)
    codes, qparams = fake.codes(weight)
    assert got.shape == codes.shape == weight.shape
    assert len(qparams.scale) == weight.numel() // size
    for (channel, at), values in rows(weight, axis, size):
        alone = WeightFakeQuantize(quantizer, None)
        alone.enabled = True
        expected = alone(values)
        torch.testing.assert_close(got.select(axis, channel).flatten()[at : at + size], expected)
        numbers, _ = alone.codes(values)
        assert torch.equal(codes.select(axis, channel).flatten()[at : at + size], numbers)


def test_a_size_that_does_not_divide_a_channel_keeps_a_scale_a_channel() -> None:
    weight, plain = noise(4, 6), WeightFakeQuantize(Affine(3, symmetric=True), 0)
    fake = WeightFakeQuantize(Affine(3, symmetric=True), 0, 4)
    fake.enabled = plain.enabled = True
    assert torch.equal(fake(weight), plain(weight))
    assert len(fake.qparams(weight).scale) == 4


def test_gradients_reach_every_weight_and_scale_of_a_group() -> None:
    weight = nn.Parameter(noise(4, 8))
    fake = WeightFakeQuantize(LearnedStep(3, symmetric=True), 0, 4)
    fake.begin(weight)
    fake.enabled = True
    fake(weight).square().sum().backward()
    assert fake.logarithms["scale"].grad.shape == (8,)
    assert fake.logarithms["scale"].grad.abs().min() > 0
    inside = fake.codes(weight)[0].abs() < 3
    assert weight.grad[inside].abs().max() > 0


@pytest.mark.parametrize("quantizer", LEARNED, ids=str)
@pytest.mark.parametrize("axis", [0, None])
def test_what_is_learned_begins_where_it_was_fitted(quantizer: Quantizer, axis: int | None) -> None:
    weight = noise(5, 12)
    fake = WeightFakeQuantize(quantizer, axis)
    fake.enabled = True
    before = fake(weight)
    assert not fake.logarithms
    assert fake.to_state() == {}
    fake.begin(weight)
    assert set(fake.logarithms) == set(quantizer.learned)
    torch.testing.assert_close(fake(weight), before)
    first = dict(fake.logarithms)
    fake.begin(3 * weight)  # what has begun goes on
    assert all(fake.logarithms[name] is log for name, log in first.items())


def test_what_learns_nothing_never_begins() -> None:
    fake = WeightFakeQuantize(PowerOfTwo(4), 0)
    fake.begin(noise(3, 4))
    assert fake.held is None
    activation = ActivationFakeQuantize(LearnedStep(4), MinMax(), of_input=True)
    activation.begin()  # has seen nothing
    assert not activation.logarithms


@pytest.mark.parametrize("quantizer", LEARNED, ids=str)
@pytest.mark.parametrize(("axis", "group"), [(0, None), (None, None), (0, 4)])
def test_a_state_of_plain_values_gives_back_the_very_numbers(
    quantizer: Quantizer, axis: int | None, group: int | None
) -> None:
    weight = noise(5, 12)
    fake, fresh = (WeightFakeQuantize(quantizer, axis, group) for _ in range(2))
    fake.begin(weight)
    with torch.no_grad():
        for log in fake.logarithms.values():
            log += 0.1
    buffer = io.BytesIO()
    torch.save(fake.to_state(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh.from_state(state)
    fake.enabled = fresh.enabled = True
    assert torch.equal(fresh(weight), fake(weight))
    assert all(torch.equal(fresh.logarithms[name], log) for name, log in fake.logarithms.items())
    with torch.no_grad():
        fresh.logarithms["scale"] += 1
    assert torch.equal(state["log_scale"], fake.logarithms["scale"])  # nothing is shared
    fresh.from_state({})
    assert fresh.held is None
    assert not fresh.logarithms


def test_no_step_takes_a_scale_below_zero() -> None:
    weight = noise(5, 12)
    fake = WeightFakeQuantize(LearnedStep(2, symmetric=True), 0)
    fake.begin(weight)
    with torch.no_grad():
        fake.logarithms["scale"] -= 50
    assert (fake.qparams(weight).scale > 0).all()


@pytest.mark.parametrize("quantizer", LEARNED, ids=str)
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("cut", [{0: [0, 3]}, {1: [1, 2, 5]}, {0: [4], 1: [0, 1]}, {}])
def test_scales_follow_the_channels_that_stay(
    quantizer: Quantizer, axis: int | None, cut: dict[int, list[int]]
) -> None:
    """What the smaller weight shows is what these channels showed before."""
    weight = noise(5, 12)
    fake = WeightFakeQuantize(quantizer, axis)
    fake.begin(weight)
    fake.enabled = True
    logs = dict(fake.logarithms)
    fake.logarithms["scale"].grad = torch.ones_like(fake.logarithms["scale"])
    expected, small, kept = fake(weight).detach(), weight, {along: torch.tensor(index) for along, index in cut.items()}
    for along, index in kept.items():
        expected, small = expected.index_select(along, index), small.index_select(along, index)
    fake.keep(small, kept)
    assert torch.equal(fake(small), expected)
    assert all(fake.logarithms[name] is log for name, log in logs.items())
    fake(small).sum().backward()
    assert fake.logarithms["scale"].grad.shape == fake.logarithms["scale"].shape


def test_groups_begin_anew_when_channels_go() -> None:
    weight = noise(4, 8)
    fake, other = (WeightFakeQuantize(LearnedStep(3, symmetric=True), 0, 4) for _ in range(2))
    fake.begin(weight)
    small = weight[:, :4]
    fake.keep(small, {1: torch.arange(4)})
    other.begin(small)
    assert torch.equal(fake.logarithms["scale"], other.logarithms["scale"])
    fake.enabled = other.enabled = True
    assert torch.equal(fake(small), other(small))


def test_a_prepared_model_hands_the_kept_indices_on() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    prepared_ = quantize(model, noise(3, 4), scheme=w4a8())
    prepared_.begin()
    before = {name: log.detach().clone() for name, log in prepared_.learned().items()}
    kept = torch.tensor([1, 4])
    first, second = model[0], model[1]
    with torch.no_grad():
        first._parameters["weight"].data = first._parameters["weight"].data[kept]
        second._parameters["weight"].data = second._parameters["weight"].data[:, kept]
    record = Record({"0.weight": {0: kept}, "1.weight": {1: kept}})
    prepared_.follow(model, record)
    assert torch.equal(prepared_.learned()["0:scale"], before["0:scale"][kept])
    assert torch.equal(prepared_.learned()["1:scale"], before["1:scale"])


@pytest.mark.parametrize(
    ("scheme", "weights_learn", "activations_learn"),
    [
        (int8(), [], []),
        (log4(), [], []),
        (ternary(), ["scale"], []),
        (int4(), ["scale"], ["scale"]),
        (codebook(3), ["scale"], []),
        (Scheme(Exponential(4)), ["scale", "base"], []),
    ],
)
def test_what_is_learned_is_named_by_place_and_field(
    scheme: Scheme, weights_learn: list[str], activations_learn: list[str]
) -> None:
    model = randomized(Residual())
    prepared_ = quantize(model, X, scheme=scheme)
    assert prepared_.learned() == {}
    prepared_.begin()
    expected = {f"{layer.name}:{field}" for layer in prepared_.layers for field in weights_learn}
    expected |= {f"{place}:{field}" for place in prepared_.activations for field in activations_learn}
    assert set(prepared_.learned()) == expected
    assert not {id(log) for log in prepared_.learned().values()} & {id(p) for p in model.parameters()}
    assert {k for k in model.state_dict() if "scale" in k} == set()


def test_a_state_carries_what_was_learned_and_an_earlier_one_takes_it_away() -> None:
    model, fresh = (randomized(Residual()).eval() for _ in range(2))
    first = quantize(model, X, scheme=int4())
    early = copy.deepcopy(first.state_dict())
    first.begin()
    with torch.no_grad():
        for i, log in enumerate(first.learned().values()):
            log += 0.01 * i
    late = first.state_dict()
    second = quantize_layers(fresh, int4())
    second.load_state_dict(fresh, late)
    assert torch.equal(run(fresh, X), run(model, X))
    second.load_state_dict(fresh, early)
    assert second.learned() == {}
    second.load_state_dict(fresh, quantize_layers(randomized(Residual()), int4()).state_dict())
    assert second.placement is None
    assert not second.activations
    assert not any(activations(module) for module in fresh.modules())
    assert torch.equal(run(fresh, X), run(randomized(Residual()).eval(), X))


def test_a_state_of_another_scheme_is_refused_unless_it_has_not_begun() -> None:
    model = randomized(Residual())
    state = quantize(randomized(Residual()), X, scheme=ternary()).state_dict()
    with pytest.raises(ValueError, match=r"another scheme: weight is .*LearnedStep.* there and .*Affine.* here"):
        quantize_layers(model, int8()).load_state_dict(model, state)
    overridden = int8(overrides={"conv": w8()})
    with pytest.raises(ValueError, match="another scheme: overrides is"):
        quantize_layers(randomized(other := Residual()), overridden).load_state_dict(
            other, quantize(randomized(Residual()), X).state_dict()
        )
    before = quantize_layers(randomized(Residual()), ternary()).state_dict()
    quantize_layers(model, int8()).load_state_dict(model, before)


def test_the_layer_that_reads_a_value_says_how_it_is_quantized() -> None:
    """conv -> relu -> fc: the output of relu is written as the layer after it wants it, the input as the first does."""
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    overrides = {"2": lsq(3), "4": Scheme(Affine(4, symmetric=True), Affine(5), Percentile(0.9))}
    prepared_ = quantize_layers(model, int8(overrides=overrides))
    prepared_.place(model, trace(model, noise(3, 4)))
    found = {place: (a.quantizer, a.observer) for place, a in prepared_.activations.items()}
    moving = int8().observer
    assert found == {
        "0:input": (Affine(8), moving),
        "1:output": (LearnedStep(3), moving),
        "3:output": (Affine(5), Percentile(0.9)),
    }
    assert [weights(model[i])["weight"].quantizer for i in (0, 2, 4)] == [
        Affine(8, symmetric=True, top=64),  # what pairs of 8-bit products leave
        LearnedStep(3, symmetric=True),
        Affine(4, symmetric=True),
    ]


def test_a_reader_without_quantized_inputs_gets_none() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)))
    prepared_ = quantize_layers(model, int8(overrides={"2": w8()}))
    prepared_.place(model, trace(model, noise(3, 4)))
    assert list(prepared_.activations) == ["0:input"]


def test_a_histogram_is_filled_before_it_is_used_and_then_left() -> None:
    """In training only what has seen nothing yet observes on; a moving average follows every batch."""
    scheme = Scheme(observer=Percentile(0.9), overrides={"2": int8()})
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)))
    prepared_: ModelQuantization = quantize_layers(model, scheme)
    prepared_.place(model, trace(model, noise(3, 4)))
    counted, averaged = prepared_.activations["0:input"], prepared_.activations["1:output"]
    prepared_.observe(True, once=False)
    assert counted.observing  # nothing seen so far
    run(model, noise(3, 4))
    prepared_.observe(True)
    run(model, noise(3, 4, seed=1))
    assert int(counted.state[2:].sum()) == 24
    prepared_.observe(True, once=False)
    assert not counted.observing
    assert averaged.observing
    before = averaged.state.clone()
    run(model, noise(3, 4, seed=2) * 5)
    assert int(counted.state[2:].sum()) == 24
    assert not torch.equal(averaged.state, before)


def test_a_learned_activation_no_longer_observes() -> None:
    activation = ActivationFakeQuantize(LearnedStep(4), MinMax(), of_input=True)
    activation.observing = True
    activation.quantize(noise(10))
    activation.begin()
    before, scale = activation.state.clone(), activation.qparams().scale.clone()
    activation.enabled = True
    activation.quantize(100 * noise(10))
    assert torch.equal(activation.state, before)
    assert torch.equal(activation.qparams().scale, scale)


def test_granularity_by_scheme_reaches_the_layers() -> None:
    for granularity, num_scales in (("channel", 6), ("tensor", 1), (4, 12)):
        model = nn.Linear(8, 6)
        upgrade([Layer("fc", model)], Affine(4, symmetric=True), granularity)
        fake = weights(model)["weight"]
        assert fake.qparams(model._parameters["weight"]).scale.numel() == num_scales
