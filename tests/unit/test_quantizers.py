"""How numbers are written, against numpy and the quantized tensors and fused operations of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from lightning_compress.quantization import Affine, Float8, LearnedClip, LearnedStep, QParams, Quantizer
from lightning_compress.testing import check_quantizer

from .helpers import noise

RANGES = [(-1.0, 1.0), (0.0, 6.0), (-3.0, 0.0), (-0.3, 2.7), (0.5, 4.0), (-4.0, -0.5), (-1e-4, 2e-4), (-3e4, 1e3)]


def qparams(quantizer: Quantizer, low: float, high: float) -> QParams:
    return quantizer.qparams(torch.tensor(low), torch.tensor(high))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_the_contract_is_kept(bits: int, symmetric: bool) -> None:
    check_quantizer(Affine(bits, symmetric))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_codes_are_the_affine_formula(bits: int, share: float) -> None:
    top = 2**bits - 1
    low = -0.37 * round(share * top)  # 0 falls on a code
    high = low + 0.37 * top
    x = np.linspace(low, high, 1001, dtype=np.float64)
    exact = (x - low) / (high - low) * top
    x, exact = x[np.abs(exact % 1 - 0.5) > 1e-3], exact[np.abs(exact % 1 - 0.5) > 1e-3]
    quantizer = Affine(bits)
    codes = quantizer.quantize(torch.from_numpy(x).float(), qparams(quantizer, low, high))
    np.testing.assert_array_equal(codes.numpy(), np.round(exact))
    assert (codes.min(), codes.max()) == (0, top)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_codes_are_shares_of_the_largest_value(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    x = noise(999).clamp(-3, 3)
    exact = x.double().numpy() / 3 * top
    quantizer = Affine(bits, symmetric=True)
    codes = quantizer.quantize(x, qparams(quantizer, -3.0, 2.0))
    np.testing.assert_array_equal(codes.numpy(), np.round(exact))
    assert codes.abs().max() <= top


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_scale_and_zero_point_are_those_of_torch(low: float, high: float) -> None:
    observer = MinMaxObserver(torch.quint8, torch.per_tensor_affine, eps=1e-12)
    observer(torch.tensor([low, high]))
    scale, zero_point = observer.calculate_qparams()
    ours = qparams(Affine(), low, high)
    torch.testing.assert_close(ours.scale, scale.squeeze())
    assert int(ours.zero_point) == int(zero_point)


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_of_channels_are_those_of_torch(axis: int) -> None:
    weight = noise(4, 5, 3) * torch.arange(1, 6).view(5, 1)
    observer = PerChannelMinMaxObserver(axis, torch.qint8, torch.per_channel_symmetric, quant_min=-127, quant_max=127)
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    dims = [d for d in range(3) if d != axis]
    ours = Affine(8, symmetric=True).qparams(weight.amin(dims), weight.amax(dims), axis)
    torch.testing.assert_close(ours.scale, scale)
    assert torch.equal(ours.zero_point.long(), zero_point.long())


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_codes_and_values_are_those_of_a_quantized_tensor(low: float, high: float) -> None:
    x = noise(2000) * (high - low)
    quantizer = Affine()
    ours = qparams(quantizer, low, high)
    reference = torch.quantize_per_tensor(x, float(ours.scale), int(ours.zero_point), torch.quint8)
    codes = quantizer.quantize(x, ours)
    assert torch.equal(codes.to(torch.uint8), reference.int_repr())
    torch.testing.assert_close(quantizer.dequantize(codes, ours), reference.dequantize())


def test_a_value_half_way_between_two_codes_goes_where_the_exported_operation_puts_it() -> None:
    x = torch.arange(-127, 128) + 0.5
    quantizer = Affine()
    ours = qparams(quantizer, -127.0, 128.0)
    assert (float(ours.scale), int(ours.zero_point)) == (1.0, 127)
    codes = torch.ops.quantized_decomposed.quantize_per_tensor(x, 1.0, 127, 0, 255, torch.uint8)
    assert torch.equal(quantizer.quantize(x, ours).to(torch.uint8), codes)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_fake_quantize_gives_the_values_of_the_codes(low: float, high: float, symmetric: bool) -> None:
    x = noise(2000) * (high - low)
    for bits in (3, 8):
        quantizer = Affine(bits, symmetric)
        ours = qparams(quantizer, low, high)
        values = quantizer.dequantize(quantizer.quantize(x, ours), ours)
        assert torch.equal(quantizer.fake_quantize(x, ours), values)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("low", "high"), [*RANGES, (0.0, 0.0), (1e-30, 1e-30), (-1e30, 1e30)])
def test_zero_stays_exactly_zero(low: float, high: float, symmetric: bool) -> None:
    for bits in (2, 5, 8):
        quantizer = Affine(bits, symmetric)
        ours = qparams(quantizer, low, high)
        assert quantizer.dequantize(quantizer.quantize(torch.zeros(3), ours), ours).eq(0).all()
        assert quantizer.fake_quantize(torch.zeros(3), ours).eq(0).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_are_quantized_one_by_one(axis: int) -> None:
    x = noise(3, 4, 5) * torch.arange(1, 6)
    dims = [d for d in range(3) if d != axis]
    quantizer = Affine(4)
    together = quantizer.qparams(x.amin(dims), x.amax(dims), axis)
    values = quantizer.fake_quantize(x, together)
    assert torch.equal(values, quantizer.dequantize(quantizer.quantize(x, together), together))
    for i in range(x.shape[axis]):
        channel = x.select(axis, i)
        alone = quantizer.fake_quantize(channel, quantizer.qparams(channel.min(), channel.max()))
        assert torch.equal(values.select(axis, i), alone)


def test_the_gradient_is_straight_through_inside_the_range_and_zero_outside() -> None:
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.9, 1.5, 1.6], requires_grad=True)
    quantizer = Affine()
    quantizer.fake_quantize(x, qparams(quantizer, -1.0, 1.5)).backward(torch.arange(1.0, 8.0))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]


class Ternary(Quantizer):
    bits = 2

    def qparams(self, low: Tensor, high: Tensor, axis: int | None = None) -> QParams:
        scale = torch.maximum(-low, high).clamp(min=1e-12)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), axis)

    def _scale(self, x: Tensor, p: QParams) -> Tensor:
        return p.scale if p.axis is None else p.scale.view([-1 if d == p.axis else 1 for d in range(x.dim())])

    def quantize(self, x: Tensor, p: QParams) -> Tensor:
        return (x / self._scale(x, p)).clamp(-1, 1).round()

    def dequantize(self, codes: Tensor, p: QParams) -> Tensor:
        return codes * self._scale(codes, p)


def test_a_quantizer_of_ones_own_keeps_the_contract_by_the_inherited_round_trip() -> None:
    check_quantizer(Ternary())
    x = noise(50).requires_grad_()
    quantizer = Ternary()
    ours = qparams(quantizer, -1.0, 1.0)
    values = quantizer.fake_quantize(x, ours)
    torch.testing.assert_close(values, x.detach().clamp(-1, 1).round())
    values.backward(torch.arange(50.0))
    assert torch.equal(x.grad, torch.arange(50.0))


@pytest.mark.parametrize(("kind", "highest"), [(Affine, 16), (LearnedStep, 8), (LearnedClip, 8)])
@pytest.mark.parametrize("bits", [1, 17, 0, -4, 8.0, "8", None])
def test_a_width_that_no_code_has_is_refused(kind: type[Affine], highest: int, bits: object) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.bits.*2\.\.{highest}.*{kind.__name__}\(8\)"):
        kind(bits)


LEARNED = [
    kind(bits, symmetric) for kind in (LearnedStep, LearnedClip) for bits in (2, 4, 8) for symmetric in (True, False)
]
every_learned = pytest.mark.parametrize("quantizer", LEARNED, ids=str)


@every_learned
def test_what_is_learned_keeps_the_contract(quantizer: Quantizer) -> None:
    check_quantizer(quantizer)


@every_learned
def test_what_is_learned_has_the_values_of_affine(quantizer: LearnedStep) -> None:
    affine = Affine(quantizer.bits, quantizer.symmetric)
    x = noise(5, 300) + 0.2
    for axis, low, high in ((None, x.min(), x.max()), (0, x.amin(1), x.amax(1))):
        ours = affine.qparams(low / 2, high / 2, axis)
        assert torch.equal(quantizer.quantize(x, ours), affine.quantize(x, ours))
        assert torch.equal(quantizer.fake_quantize(x, ours), affine.fake_quantize(x, ours))


def gradients(quantizer: Affine, axis: int | None) -> tuple[np.ndarray, ...]:
    """Of x and scale by the quantizer; and x, scale, rounded x, upstream gradient as rows of numpy."""
    x, upstream = (noise(6, 200, seed=i) + 0.2 for i in range(2))
    x.requires_grad_()
    with torch.no_grad():
        ours = quantizer.qparams(*((x.amin(1), x.amax(1)) if axis == 0 else (x.min(), x.max())), axis)
        ours = ours._replace(scale=ours.scale * 0.4)
        rounded = quantizer.dequantize(quantizer.quantize(x, ours), ours)
    scale = ours.scale.clone().requires_grad_()
    quantizer.fake_quantize(x, ours._replace(scale=scale)).backward(upstream)
    zero_point = ours.zero_point.double().numpy().reshape(-1, 1)
    arrays = (x.grad, scale.grad, x, scale.view(-1, 1), rounded, upstream)
    return (*(t.detach().double().numpy() for t in arrays), zero_point)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (4, True), (4, False), (8, False)])
def test_a_learned_step_has_the_gradient_of_the_paper(bits: int, symmetric: bool, axis: int | None) -> None:
    quantizer = LearnedStep(bits, symmetric)
    x_grad, scale_grad, x, scale, _, upstream, zero_point = gradients(quantizer, axis)
    lowest, highest = (limit - zero_point for limit in quantizer.limits)
    v = x / scale  # equation 3
    expected = np.where(v <= lowest, lowest, np.where(v >= highest, highest, np.round(v) - v)) * upstream
    np.testing.assert_allclose(scale_grad, expected.sum(1 if axis == 0 else None), rtol=1e-4)
    np.testing.assert_array_equal(x_grad, np.where((v > lowest) & (v < highest), upstream, 0))


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (4, True), (4, False), (8, False)])
def test_a_learned_clip_has_the_gradient_of_the_paper(bits: int, symmetric: bool, axis: int | None) -> None:
    quantizer = LearnedClip(bits, symmetric)
    x_grad, scale_grad, x, scale, _, upstream, zero_point = gradients(quantizer, axis)
    lowest, highest = (limit - zero_point for limit in quantizer.limits)
    clipped_below, clipped_above = x / scale < lowest, x / scale > highest
    by_clip = np.where(clipped_above, upstream * highest, 0) + np.where(clipped_below, upstream * lowest, 0)
    np.testing.assert_allclose(scale_grad, by_clip.sum(1 if axis == 0 else None), rtol=1e-4)
    np.testing.assert_array_equal(x_grad, np.where(clipped_above | clipped_below, 0, upstream))


def test_a_learned_step_has_the_gradient_of_torchs_own_operation() -> None:
    x, upstream = noise(6, 200), noise(6, 200, seed=1)
    ours = LearnedStep(4, symmetric=True).qparams(-x.abs().amax(1), x.abs().amax(1), 0)
    scales = [ours.scale.clone().requires_grad_() for _ in range(2)]
    LearnedStep(4, symmetric=True).fake_quantize(x, ours._replace(scale=scales[0])).backward(upstream)
    torch._fake_quantize_learnable_per_channel_affine(x, scales[1], torch.zeros(6), 0, -7, 7, 1.0).backward(upstream)
    torch.testing.assert_close(scales[0].grad, scales[1].grad)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_fitted_clip_errs_no_more_than_any_other_of_numpy(bits: int, axis: int | None) -> None:
    weight = noise(8, 5, 40) ** 3
    quantizer, top = LearnedClip(bits, symmetric=True), 2 ** (bits - 1) - 1
    ours = quantizer.fit(weight, axis)
    rows = weight.numpy().reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1).numpy()
    for row, scale in zip(rows, ours.scale.reshape(-1).tolist(), strict=True):

        def error(step: float, row: np.ndarray = row) -> float:
            return float(np.square(np.clip(np.round(row / step), -top, top) * step - row).sum())

        steps = np.geomspace(0.06, 1.0, 200) * np.abs(row).max() / top
        assert error(scale) <= 1.1 * min(error(step) for step in steps)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_fitted_step_is_the_start_of_the_paper_up_to_the_range(bits: int, axis: int | None) -> None:
    weight = noise(8, 5, 40) * (noise(8, 5, 40, seed=1) > 0)  # pruned weights do not count
    rows = weight.numpy().reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1).numpy()
    top = 2 ** (bits - 1) - 1
    starts = [2 * np.abs(row[row != 0]).mean() / np.sqrt(top) for row in rows]
    expected = np.minimum(starts, np.abs(rows).max(1) / top)
    scale = LearnedStep(bits, symmetric=True).fit(weight, axis).scale
    np.testing.assert_allclose(scale.flatten().numpy(), expected, rtol=1e-5)


def test_a_channel_of_zeros_is_given_a_step_that_can_be_learned() -> None:
    weight = torch.stack([torch.zeros(5), torch.ones(5), torch.full((5,), 3.0)])
    for quantizer in (LearnedStep(4, symmetric=True), LearnedClip(4, symmetric=True)):
        torch.testing.assert_close(quantizer.fit(weight, 0).scale[0], torch.tensor(3 / 7))
        torch.testing.assert_close(quantizer.fit(torch.zeros(5)).scale, torch.tensor(1 / 7))


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_float8_keeps_the_contract(format: str) -> None:
    check_quantizer(Float8(format))


@pytest.mark.parametrize(
    ("format", "mantissa", "smallest", "most"), [("e4m3", 3, -6, 448.0), ("e5m2", 2, -14, 57344.0)]
)
def test_float8_has_the_numbers_of_the_format(format: str, mantissa: int, smallest: int, most: float) -> None:
    steps = np.arange(1, 2**mantissa) / 2**mantissa * 2.0**smallest  # subnormal
    normal = [(1 + i / 2**mantissa) * 2.0**e for e in range(smallest, 16) for i in range(2**mantissa)]
    magnitudes = np.array([*steps, *[v for v in normal if v <= most]])
    numbers = np.array([*-magnitudes[::-1], 0, *magnitudes])
    quantizer = Float8(format)
    ours = qparams(quantizer, -2 * most, most)
    assert ours.scale == 2
    codes = torch.arange(-len(magnitudes), len(magnitudes) + 1.0)
    np.testing.assert_array_equal(quantizer.dequantize(codes, ours).numpy(), 2 * numbers)
    x = noise(3000) * torch.logspace(-6, 3, 3000)
    error = np.abs(quantizer.fake_quantize(x, ours).numpy() - x.numpy())
    np.testing.assert_allclose(error, np.abs(x.numpy()[:, None] - 2 * numbers).min(1), rtol=1e-3, atol=1e-9)


def test_a_float_format_that_torch_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Float8\.format='e3m4'.*'e4m3' and 'e5m2'"):
        Float8("e3m4")


def test_learned_values_move_to_a_smaller_error() -> None:
    x = noise(4, 500)
    for quantizer in (LearnedStep(3, symmetric=True), LearnedStep(3)):
        start = quantizer.qparams(x.amin(1) * 2, x.amax(1) * 2, 0)
        log = start.scale.log().requires_grad_()
        optimizer = torch.optim.Adam([log], 0.02)
        errors = []
        for _ in range(150):
            error = (quantizer.fake_quantize(x, start._replace(scale=log.exp())) - x).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            errors.append(float(error.detach()))
        assert errors[-1] < 0.5 * errors[0]
