"""A prepared model as one thing to switch, save and load."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import int4, int8, w4a8, w8
from lightning_compress.quantization import Affine, MinMax, Scheme
from lightning_compress.quantization.fake_quant import activations, weights
from lightning_compress.quantization.model import ModelQuantization, quantization_of, quantize_layers
from lightning_compress.quantization.processes import Processes

from .helpers import noise, quantize, randomized, run, trace
from .test_placement import Residual

X = noise(4, 2, 8, 8)


def test_a_prepared_model_is_bitwise_the_plain_one_until_it_is_enabled() -> None:
    model = randomized(Residual()).eval()
    expected = run(model, X)
    prepared_ = quantize_layers(model, int8())
    assert torch.equal(run(model, X), expected)
    prepared_.place(model, trace(model, X))
    assert torch.equal(run(model, X), expected)
    prepared_.observe(True)
    assert torch.equal(run(model, X), expected)
    prepared_.enable(True)
    assert not torch.equal(run(model, X), expected)
    prepared_.enable(False)
    assert torch.equal(run(model, X), expected)


def test_preparing_twice_leaves_the_first() -> None:
    model = nn.Linear(3, 3)
    assert quantization_of(model) is None
    first = quantize_layers(model, int8())
    assert quantize_layers(model, Scheme(weight=Affine(2, symmetric=True))) is first is quantization_of(model)
    assert first.is_by(int8())
    assert not first.is_by(Scheme(weight=Affine(2, symmetric=True)))
    assert list(model.state_dict()) == ["weight", "bias"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x)[0])


@pytest.mark.parametrize(("make", "x"), [(Residual, X), (Recurrent, noise(2, 3, 4))])
def test_where_the_first_is_removed_another_begins_anew(make: type[nn.Module], x: torch.Tensor) -> None:
    """Nothing of the first is left: the model is bitwise the plain one, and then as if it had been prepared once."""
    model, once = randomized(make()).eval(), randomized(make()).eval()
    expected, state = run(model, x), {name: value.clone() for name, value in model.state_dict().items()}
    first = quantize(model, x, scheme=int8())
    first.remove(model)
    second = quantize_layers(model, Scheme(Affine(3, symmetric=True), exclude=["fc"] if make is Residual else ["head"]))
    assert second is quantization_of(model)
    assert second is not first
    assert torch.equal(run(model, x), expected)
    assert not any(activations(module) for module in model.modules())
    assert {name: torch.equal(value, state[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        state, True
    )
    named = {layer.name for layer in second.layers}
    assert all(bool(weights(layer.module)) == (layer.name in named) for layer in first.layers)
    again = quantize(once, x, scheme=second.scheme)
    second.place(model, trace(model, x))
    second.load_state_dict(model, again.state_dict())
    assert torch.equal(run(model, x), run(once, x))


def test_an_activation_that_has_seen_nothing_stays_in_float() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    prepared_ = quantize_layers(model, int8())
    prepared_.place(model, trace(model, noise(3, 4)))
    prepared_.enable(True)
    assert prepared_.enabled
    assert not any(a.enabled for a in prepared_.activations.values())
    assert bool(torch.isfinite(run(model, noise(3, 4))).all())


def test_a_scheme_without_inputs_places_no_activation_quantizer_but_folds() -> None:
    model = randomized(Residual())
    prepared_ = quantize(model, X, scheme=Scheme(inputs=None))
    assert not prepared_.activations
    assert list(prepared_.folded(model).values()) == [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_fresh_model_takes_up_the_state_and_computes_the_same(enabled: bool) -> None:
    model, fresh = randomized(Residual()).eval(), randomized(Residual()).eval()
    scheme = Scheme(Affine(4, symmetric=True), Affine(5), MinMax(), exclude=["fc"])
    first = quantize(model, X, scheme=scheme)
    first.enable(enabled)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    second = quantize_layers(fresh, Scheme.from_state(state["scheme"]))
    second.load_state_dict(fresh, state)
    assert second.placement == first.placement
    assert second.enabled is enabled
    assert torch.equal(run(fresh, X), run(model, X))


def test_a_state_before_any_batch_was_watched_loads() -> None:
    model = randomized(Residual())
    state = quantize_layers(randomized(Residual()), int8()).state_dict()
    second = quantize_layers(model, int8())
    second.load_state_dict(model, state)
    assert second.placement is None
    assert not second.enabled


def test_a_state_of_another_model_is_refused_and_names_what_is_missing() -> None:
    state = quantize(randomized(Residual()), X).state_dict()
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"modules that this model does not have: conv, relu"):
        quantize_layers(model, int8()).load_state_dict(model, state)


def test_layers_that_are_left_alone_are_listed() -> None:
    prepared_ = quantize_layers(Residual(), int8(exclude=["block1"]))
    assert prepared_.skipped == dict.fromkeys(("block1.conv1", "block1.conv2"), "excluded by name")
    with pytest.raises(ValueError, match="matches no layer"):
        quantize_layers(Residual(), int8(include=["head"]))


def old_state(prepared_: ModelQuantization) -> dict[str, Any]:
    """The state as it was written before there was a choice of codes."""
    state = prepared_.state_dict()
    scheme = {key: value for key, value in state["scheme"].items() if key != "exact_kernels"}
    for key in ("weight", "inputs"):
        scheme[key] = {k: v for k, v in scheme[key].items() if k != "top"}
    return {**state, "scheme": scheme}


def test_a_checkpoint_from_before_portable_codes_computes_as_it_was_trained() -> None:
    model = randomized(Residual())
    state = old_state(quantize(model, X, scheme=int8(exact_kernels=True)))
    other = copy_of(model)
    quantize_layers(other, Scheme.from_state(state["scheme"])).load_state_dict(other, state)
    assert torch.equal(run(other.eval(), X), run(model, X))


def test_a_checkpoint_of_the_full_range_is_refused_by_a_scheme_that_would_narrow_its_codes() -> None:
    model = randomized(Residual())
    state = old_state(quantize(model, X, scheme=int8(exact_kernels=True)))
    with pytest.raises(ValueError, match=r"Give Scheme\(..., exact_kernels=True\) to go on as it was trained"):
        quantize_layers(copy_of(model), int8()).load_state_dict(copy_of(model), state)


@pytest.mark.parametrize("scheme", [w4a8(), int4(), w8()], ids=["w4a8", "int4", "w8"])
def test_an_old_checkpoint_whose_codes_are_the_same_either_way_goes_on(scheme: Scheme) -> None:
    model = randomized(Residual())
    quantization = quantize(model, X, scheme=scheme)
    quantization.begin()
    state = quantization.state_dict()
    state["scheme"] = {key: value for key, value in state["scheme"].items() if key != "exact_kernels"}
    other = copy_of(model)
    quantize_layers(other, scheme).load_state_dict(other, state)
    assert torch.equal(run(other.eval(), X), run(model, X))


def copy_of(model: nn.Module) -> nn.Module:
    """A plain model with the same weights."""
    other = Residual()
    other.load_state_dict(model.state_dict())
    return other


def test_the_stage_says_what_the_layers_compute() -> None:
    model = randomized(Residual())
    quantization = quantize_layers(model, int8())
    assert (quantization.stage, quantization.enabled) == ("plain", False)
    quantization.start_tracing(model)
    assert quantization.stage == "tracing"
    copied = quantization_of(copy.deepcopy(model))
    assert copied is not None
    assert copied.stage == "plain"
    run(model, X)
    quantization.end_batch(model, Processes())
    assert (quantization.stage, quantization.enabled) == ("observing", False)
    quantization.observe(True)
    run(model, X)
    quantization.end_batch(model, Processes())
    assert quantization.stage == "observing"
    quantization.quantize(Processes())
    assert (quantization.stage, quantization.enabled) == ("quantized", True)
    norms = list(quantization.folded(model).values())
    quantization.freeze(model)
    assert (quantization.stage, quantization.enabled) == ("frozen", True)
    assert norms
    assert not any(norm.training for norm in norms)
    quantization.enable(True)
    assert quantization.stage == "frozen"
    quantization.thaw()
    assert quantization.stage == "quantized"
    assert all(norm.training for norm in norms)
    quantization.enable(False)
    assert quantization.stage == "observing"


def test_what_stops_in_the_middle_of_a_traced_batch_is_plain_again() -> None:
    model = randomized(Residual())
    quantization = quantize_layers(model, int8())
    quantization.start_tracing(model)
    quantization.stop_tracing()
    assert quantization.stage == "plain"
    assert quantization.stop_tracing() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
