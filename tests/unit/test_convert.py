"""Fake quantization to explicit operations: the converted model against the fake-quantized one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import convert, int8
from lightning_compress.quantization import Affine, Float8, LearnedStep, QParams, Quantizer, Scheme, Ternary
from lightning_compress.quantization import PowerOfTwo as NonLinear
from lightning_compress.quantization.convert import to_float
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.model import quantization_of, quantize_layers

from .helpers import largest_difference, noise, quantize, randomized, run
from .test_placement import Residual

IMAGES, VECTORS, SEQUENCES = noise(4, 2, 8, 8), noise(12, 6), noise(4, 5, 6)
TOKENS = torch.arange(20).view(4, 5) % 7


def negative_gamma() -> nn.Module:
    model = randomized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-1.5, 1.0, -0.01, 0.0]))
    return model


def dead_channel() -> nn.Module:
    """A channel that was pruned away and lives on by its bias alone."""
    model = randomized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[1].bias[1] = 50.0
    return model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mha, self.fc = nn.Embedding(7, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.fc(self.mha(y, y, y)[0])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.net, self.fc = kind(6, 5, 2, batch_first=True, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x)[0][:, -1])


def norm_behind(layer: nn.Module, norm: nn.Module) -> Callable[[], nn.Module]:
    return lambda: randomized(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: randomized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), VECTORS),
    "conv+bn negative gamma": (negative_gamma, IMAGES),
    "conv+bn dead channel": (dead_channel, IMAGES),
    "conv+bn no bias": (norm_behind(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)), IMAGES),
    "conv+bn not affine": (norm_behind(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False)), IMAGES),
    "depthwise conv+bn": (norm_behind(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)), IMAGES),
    "transposed conv+bn": (norm_behind(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4)), IMAGES),
    "grouped transposed conv": (norm_behind(nn.ConvTranspose2d(2, 4, 3, groups=2), nn.ReLU()), IMAGES),
    "grouped transposed conv+bn": (norm_behind(nn.ConvTranspose2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)), IMAGES),
    "conv1d+bn": (norm_behind(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4)), SEQUENCES),
    "linear+bn": (norm_behind(nn.Linear(6, 4), nn.BatchNorm1d(4)), VECTORS),
    "linear+bn over time": (norm_behind(nn.Linear(6, 5), nn.BatchNorm1d(5)), SEQUENCES),
    "bn without statistics": (norm_behind(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), IMAGES),
    "residual": (lambda: randomized(Residual()), IMAGES),
    "residual, functional": (lambda: randomized(Residual("function")), IMAGES),
    "lstm": (lambda: randomized(Recurrent(nn.LSTM)), SEQUENCES),
    "gru": (lambda: randomized(Recurrent(nn.GRU)), SEQUENCES),
    "attention": (lambda: randomized(Attention()), TOKENS),
}
every_model = pytest.mark.parametrize("name", MODELS)


def assert_converted_alike(model: nn.Module, x: Tensor, scheme: Scheme | None = None) -> nn.Module:
    plain = run(model.eval(), x)
    quantize(model, x, scheme=scheme)
    fake_quantized = run(model, x)
    converted = convert(model)
    error = largest_difference(fake_quantized, plain)
    assert error > 1e-4  # quantization shows, so that its loss would show
    assert largest_difference(run(converted, x), fake_quantized) < 0.02 * error
    if x.is_floating_point():  # values beyond the ranges saturate alike
        assert largest_difference(run(converted, 3 * x), run(model, 3 * x)) < 0.02 * error
    return converted


@every_model
def test_a_converted_model_computes_what_the_fake_quantized_one_computes(name: str) -> None:
    build, x = MODELS[name]
    assert_converted_alike(build(), x)


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(Scheme(weight_granularity="tensor"), id="one scale a weight"),
        pytest.param(Scheme(weight=Affine(4, symmetric=True)), id="4-bit weights"),
        pytest.param(Scheme(inputs=Affine(4)), id="4-bit activations"),
        pytest.param(Scheme(inputs=None), id="weights only"),
        pytest.param(Scheme(exclude=["3"]), id="one layer in float"),
    ],
)
def test_every_part_of_a_scheme_converts(scheme: Scheme) -> None:
    assert_converted_alike(negative_gamma(), IMAGES, scheme)


class PowerOfTwo(Quantizer):
    """Codes that no step times a scale gives back."""

    bits = 4

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        scale = torch.maximum(-low, high).clamp(min=1e-12)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), axis)

    def _scale(self, x: Tensor, p: QParams) -> Tensor:
        return p.scale if p.axis is None else p.scale.view([-1 if d == p.axis else 1 for d in range(x.dim())])

    def quantize(self, x: Tensor, p: QParams) -> Tensor:
        share = x.abs() / self._scale(x, p)
        codes = 7 + torch.log2(share.clamp(min=1e-12)).round().clamp(-6, 0)
        return torch.where(share < 2**-6.5, 0, x.sign() * codes)

    def dequantize(self, codes: Tensor, p: QParams) -> Tensor:
        return torch.where(codes == 0, 0, codes.sign() * 2 ** (codes.abs() - 7)) * self._scale(codes, p)


@pytest.mark.parametrize(
    ("field", "quantizer"),
    [
        pytest.param("weight", Affine(8), id="asymmetric weights"),
        pytest.param("inputs", Affine(8, symmetric=True), id="symmetric activations"),
        pytest.param("weight", PowerOfTwo(), id="weights of no affine form"),
        pytest.param("inputs", PowerOfTwo(), id="activations of no affine form"),
    ],
)
def test_what_cannot_ship_as_it_was_trained_is_refused_and_never_changed(field: str, quantizer: Quantizer) -> None:
    try:
        assert_converted_alike(negative_gamma(), IMAGES, Scheme(**{field: quantizer}))
    except ValueError as error:
        assert field in str(error)  # noqa: PT017


def written(model: nn.Module) -> set[str]:
    program = torch.export.export(model, (IMAGES,))
    return {
        str(node.args[-1])
        for node in program.graph.nodes
        if "quantized_decomposed.quantize_per_tensor" in str(node.target)
    }


def test_the_other_integers_compute_the_same() -> None:
    model = negative_gamma()
    quantize(model, IMAGES)
    unsigned, signed = convert(model), convert(model, "int8")
    assert (written(unsigned), written(signed)) == ({"torch.uint8"}, {"torch.int8"})
    assert torch.equal(run(unsigned, 3 * IMAGES), run(signed, 3 * IMAGES))


def test_rounded_weights_compute_the_same() -> None:
    model = negative_gamma()
    quantize(model, IMAGES)
    assert torch.equal(run(convert(model, rounded_weights=True), IMAGES), run(convert(model), IMAGES))


def test_unknown_integers_are_refused() -> None:
    model = negative_gamma()
    quantize(model, IMAGES)
    with pytest.raises(ValueError, match="activations='int4': accepted are 'uint8' and 'int8'"):
        convert(model, "int4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(Scheme(weight=LearnedStep(4, symmetric=True), inputs=LearnedStep(8)), id="learned steps"),
        pytest.param(Scheme(weight=Ternary()), id="ternary weights"),
        pytest.param(Scheme(inputs=Affine(8, symmetric=True)), id="symmetric activations"),
    ],
)
def test_whatever_has_equal_steps_converts(scheme: Scheme) -> None:
    assert_converted_alike(negative_gamma(), IMAGES, scheme)


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        pytest.param(Scheme(weight=NonLinear(4)), "Scheme.weight=PowerOfTwo.*simulated only.*save_packed", id="log"),
        pytest.param(Scheme(weight=Float8()), "Scheme.weight=Float8.*simulated only", id="fp8"),
        pytest.param(
            Scheme(weight=Affine(4, symmetric=True), weight_granularity=9),
            "weight_granularity=9: accepted is 'channel' or 'tensor' for 0, a Conv2d",
            id="groups",
        ),
    ],
)
def test_what_no_integer_kernel_takes_is_said_to_be_simulated_only(scheme: Scheme, said: str) -> None:
    model = negative_gamma()
    quantize(model, IMAGES, scheme=scheme)
    with pytest.raises(ValueError, match=said):
        convert(model)


@pytest.mark.parametrize("prepare_first", [False, True])
def test_a_model_that_is_not_quantized_is_refused(prepare_first: bool) -> None:
    model = nn.Linear(3, 3)
    if prepare_first:
        quantize_layers(model, int8())
    with pytest.raises(ValueError, match="not quantized"):
        convert(model)


def test_the_model_itself_stays_as_it_was() -> None:
    model = dead_channel()
    quantize(model, IMAGES)
    model.train()
    before, outputs, kinds = copy.deepcopy(model.state_dict()), run(model, IMAGES), [type(m) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    convert(model)
    assert model.training
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    model.load_state_dict(before)
    assert torch.equal(run(model, IMAGES), outputs)


def test_a_converted_model_is_in_eval_mode_without_the_norms_that_were_folded() -> None:
    model = randomized(Residual())
    quantize(model, IMAGES)
    converted = convert(model.train())
    assert not any(module.training for module in converted.modules())
    assert not [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 5


def test_a_norm_that_is_not_folded_stays() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)))
    assert isinstance(assert_converted_alike(model, IMAGES)[2], nn.BatchNorm2d)


def test_the_codes_that_ship_are_those_that_were_trained() -> None:
    model = negative_gamma()
    quantize(model, IMAGES)
    trained, (scale, *_) = weights(model[0])["weight"].codes(model[0].weight)
    factor = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    shipped = weights(convert(model)[0])["weight"]
    signs = torch.tensor([-1, 1, -1, 1]).view(4, 1, 1, 1)
    assert shipped.codes.dtype == torch.int8
    assert torch.equal(shipped.codes[:3], (trained * signs)[:3])
    torch.testing.assert_close(shipped.scale[:3], (scale * factor.abs())[:3])
    assert not shipped.codes[3].any()  # by a gamma of 0
    step = next(iter(quantization_of(model).activations.values())).qparams().scale
    assert bool((convert(model)[0].bias.abs() / (shipped.scale * step) < 2**31).all())


def test_a_pruned_weight_is_the_code_zero() -> None:
    model = randomized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        model[0].weight[noise(8, 6) > 0] = 0
    quantize(model, VECTORS)
    codes = weights(convert(model)[0])["weight"].codes
    assert bool((codes[noise(8, 6) > 0] == 0).all())


def test_a_converted_model_holds_one_quantize_and_dequantize_operation_a_place() -> None:
    model = randomized(Residual())
    prepared_ = quantize(model, IMAGES)
    program = torch.export.export(convert(model), (IMAGES,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    num_places, num_layers = len(prepared_.activations), len(prepared_.layers)
    assert num_places == 9
    assert num_layers == 6
    assert sum("quantized_decomposed.quantize_per_tensor" in name for name in names) == num_places
    assert sum("quantized_decomposed.dequantize_per_tensor" in name for name in names) == num_places
    assert sum("quantized_decomposed.dequantize_per_channel" in name for name in names) == num_layers
    assert not [name for name in names if "fake_quantize" in name or "batch_norm" in name]


def test_the_ranges_of_a_converted_model_stay() -> None:
    model = negative_gamma()
    quantize(model, IMAGES).observe(True)
    converted = convert(model)
    first = run(converted, IMAGES)
    run(converted, 100 * IMAGES)
    assert torch.equal(run(converted, IMAGES), first)


@every_model
def test_to_float_is_the_plain_model(name: str) -> None:
    build, x = MODELS[name]
    model = build().eval()
    expected = run(model, x)
    quantize(model, x)
    twin = to_float(model.train())
    assert largest_difference(run(twin, x), expected) == 0
    assert quantization_of(model).enabled
    assert model.training


def test_to_float_takes_a_model_that_was_never_prepared() -> None:
    model: Any = nn.Linear(6, 3)
    assert torch.equal(run(to_float(model), VECTORS), run(model, VECTORS))
