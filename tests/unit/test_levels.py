"""Levels, against numpy written from the papers."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_compress.quantization import (
    AdditivePowerOfTwo,
    Binary,
    Codebook,
    Exponential,
    Levels,
    PowerOfTwo,
    QParams,
    Quantizer,
    Ternary,
)
from lightning_compress.testing import check_quantizer

from .helpers import noise

QUANTIZERS = [
    *(kind(bits) for kind in (PowerOfTwo, AdditivePowerOfTwo, Codebook) for bits in (2, 3, 4, 5, 8)),
    *(Exponential(bits) for bits in (3, 4, 8)),
    Ternary(),
    Binary(),
]
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
WEIGHT = noise(12, 5, 3, 3) * torch.arange(1, 13).view(12, 1, 1, 1) / 50


def values(quantizer: Quantizer, x: Tensor, qparams: QParams) -> Tensor:
    return quantizer.dequantize(quantizer.quantize(x, qparams), qparams)


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.abs(x[..., None] - levels).argmin(-1)]


@every_quantizer
def test_the_contract_is_kept(quantizer: Quantizer) -> None:
    check_quantizer(quantizer)


@every_quantizer
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_codes_fit_eight_bits_and_count_from_zero(quantizer: Quantizer, axis: int | None) -> None:
    codes = quantizer.quantize(WEIGHT, quantizer.fit(WEIGHT, axis))
    assert torch.equal(codes.to(torch.int8).float(), codes)
    assert ((codes.sign() == WEIGHT.sign()) | (codes == 0)).all()
    assert len(codes.unique()) <= quantizer.num_codes
    assert quantizer.quantize(torch.zeros(3), quantizer.fit(WEIGHT)).eq(0).all()


@every_quantizer
def test_pruned_weights_stay_zero_and_the_others_do_not_all_follow(quantizer: Quantizer) -> None:
    mask = noise(*WEIGHT.shape, seed=3).abs() > 1.6
    sparse = noise(*WEIGHT.shape) * mask
    for axis in (None, 0):
        back = values(quantizer, sparse, quantizer.fit(sparse, axis))
        assert back[~mask].eq(0).all()
        assert back[mask].ne(0).float().mean() > 0.1


@every_quantizer
def test_channels_are_quantized_one_by_one(quantizer: Quantizer) -> None:
    qparams = quantizer.fit(WEIGHT, 0)
    together = values(quantizer, WEIGHT, qparams)
    for row, scale, expected in zip(WEIGHT, qparams.scale, together, strict=True):
        alone = qparams._replace(scale=scale, axis=None)
        torch.testing.assert_close(values(quantizer, row, alone), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_powers_of_two_are_rounded_in_the_logarithm(bits: int) -> None:
    quantizer, x = PowerOfTwo(bits), noise(4000)
    share = np.abs(x.double().numpy()) / 2.5
    smallest = 2 - 2 ** (bits - 1)
    with np.errstate(divide="ignore"):
        expected = 2.5 * 2.0 ** np.clip(np.round(np.log2(share)), smallest, 0)
    expected = np.where(share < 2.0**smallest / 2, 0, np.sign(x.numpy()) * expected)
    qparams = quantizer.qparams(torch.tensor(-1.0), torch.tensor(2.5))
    np.testing.assert_allclose(values(quantizer, x, qparams).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("base", [0.1, 0.7, 1.0, 3.0])
def test_exponential_levels_are_powers_of_the_base(base: float) -> None:
    quantizer = Exponential(4)
    qparams = quantizer.qparams(torch.tensor(-2.0), torch.tensor(1.0))._replace(base=torch.tensor(base))
    codes = torch.arange(-7.0, 8.0)
    magnitudes = 2 * (1 + base) ** -(7.0 - np.arange(1, 8))
    expected = [*-magnitudes[::-1], 0, *magnitudes]
    np.testing.assert_allclose(quantizer.dequantize(codes, qparams).numpy(), expected, rtol=1e-5)


def test_the_base_has_the_gradient_of_the_levels() -> None:
    quantizer, x = Exponential(4), noise(500).double()
    qparams = quantizer.fit(x)
    upstream = noise(500, seed=1).double()
    base = qparams.base.clone().requires_grad_()
    (quantizer.fake_quantize(x, qparams._replace(base=base)) * upstream).sum().backward()
    codes = quantizer.quantize(x, qparams)
    step = 1e-6
    ends = [quantizer.dequantize(codes, qparams._replace(base=qparams.base + s)) for s in (step, -step)]
    expected = ((ends[0] - ends[1]) / (2 * step) * upstream).sum()
    torch.testing.assert_close(base.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_fitted_base_errs_less_than_powers_of_two() -> None:
    for x in (noise(3000), noise(3000).sign() * noise(3000, seed=1).abs() ** 3):
        errors = [float((values(q, x, q.fit(x)) - x).square().mean()) for q in (Exponential(4), PowerOfTwo(4))]
        assert errors[0] < errors[1]


# sums of one number a term, written out from the authors' code
TERMS = {
    2: [[0, 1]],
    3: [[0, 2**-1, 2**-2, 2**-3]],
    4: [[0, 2**-1, 2**-2, 2**-4], [0, 2**-3]],
    5: [[0, 2**-1, 2**-3, 2**-5], [0, 2**-2, 2**-4, 2**-6]],
    6: [[0, 2**-1, 2**-3, 2**-6], [0, 2**-2, 2**-4, 2**-7], [0, 2**-5]],
    7: [[0, 2**-1, 2**-4, 2**-7], [0, 2**-2, 2**-5, 2**-8], [0, 2**-3, 2**-6, 2**-9]],
}


@pytest.mark.parametrize("bits", TERMS)
def test_additive_powers_of_two_are_those_of_the_paper(bits: int) -> None:
    sums = np.unique([sum(numbers) for numbers in itertools.product(*TERMS[bits])])
    levels = np.unique(np.concatenate([-sums, sums])) / sums.max()
    quantizer, x = AdditivePowerOfTwo(bits), noise(2000)
    qparams = quantizer.qparams(torch.tensor(-1.5), torch.tensor(1.0))
    np.testing.assert_allclose(quantizer.levels(qparams).numpy(), levels, rtol=1e-6)
    np.testing.assert_allclose(
        values(quantizer, x, qparams).numpy(), nearest(x.double().numpy(), 1.5 * levels), rtol=1e-5
    )


def kmeans(x: np.ndarray, levels: np.ndarray, zero: int) -> np.ndarray:
    for _ in range(300):
        index = np.abs(x[:, None] - levels).argmin(1)
        new = np.array([x[index == i].mean() if (index == i).any() else levels[i] for i in range(len(levels))])
        new[zero] = 0
        if np.allclose(new, levels, rtol=0, atol=1e-12):
            break
        levels = new
    return levels


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codebook_is_that_of_k_means_from_equal_steps(bits: int) -> None:
    x, half = noise(3000, seed=bits), 2 ** (bits - 1)
    most = float(x.abs().max())
    start = np.concatenate([np.linspace(-1, 0, half + 1), np.linspace(0, 1, half)[1:]])
    expected = kmeans(x.double().numpy() / most, start, half)
    levels = Codebook(bits).fit(x).levels
    assert levels[half] == 0
    np.testing.assert_allclose(levels.numpy(), expected, atol=2e-4)


def test_a_codebook_holds_few_different_weights_exactly() -> None:
    few = torch.tensor([-0.7, -0.2, 0.0, 0.11, 0.5, 0.9])
    x = few[torch.randint(6, (40, 50), generator=torch.Generator().manual_seed(0))]
    quantizer = Codebook(4)
    torch.testing.assert_close(values(quantizer, x, quantizer.fit(x)), x)


def test_a_codebook_of_a_million_weights_is_fitted_in_seconds() -> None:
    x = noise(1000, 1000)
    begin = time.perf_counter()
    Codebook(8).fit(x)
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize("axis", [None, 0])
def test_the_ternary_scale_is_the_mean_of_what_the_threshold_keeps(axis: int | None) -> None:
    rows = WEIGHT.double().numpy().reshape(12 if axis == 0 else 1, -1)
    expected = []
    for row in np.abs(rows):
        expected.append(row[row > 0.7 * row.mean()].mean())
    scale = Ternary().fit(WEIGHT, axis).scale
    np.testing.assert_allclose(scale.flatten().numpy(), expected, rtol=1e-5)
    assert scale.shape == ((12,) if axis == 0 else ())


@pytest.mark.parametrize("axis", [None, 1])
def test_binary_is_the_sign_times_the_mean_magnitude_of_what_is_kept(axis: int | None) -> None:
    x = WEIGHT * (noise(*WEIGHT.shape, seed=9) > 0)
    rows = x.movedim(1, 0).flatten(1) if axis == 1 else x.reshape(1, -1)
    expected = torch.stack([row[row != 0].abs().mean() for row in rows])
    quantizer = Binary()
    qparams = quantizer.fit(x, axis)
    torch.testing.assert_close(qparams.scale.flatten(), expected)
    back = values(quantizer, x, qparams)
    assert torch.equal(back.sign(), x.sign())


@pytest.mark.parametrize("quantizer", [Ternary(), Binary(), PowerOfTwo(4)], ids=str)
def test_without_a_learned_scale_the_gradient_passes_everywhere(quantizer: Quantizer) -> None:
    x = (noise(100) * 3).requires_grad_()
    qparams = quantizer.qparams(torch.tensor(-1.0), torch.tensor(1.0))
    faked = quantizer.fake_quantize(x, qparams)
    assert torch.equal(faked.detach(), values(quantizer, x.detach(), qparams))
    faked.backward(torch.arange(100.0))
    assert torch.equal(x.grad, torch.arange(100.0))


@pytest.mark.parametrize("kind", [PowerOfTwo, Exponential, AdditivePowerOfTwo, Codebook])
@pytest.mark.parametrize("bits", [1, 9, 4.0, "4", None])
def test_a_width_that_no_code_has_is_refused(kind: type[Levels], bits: object) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.bits.*\.\.8"):
        kind(bits)


class Thirds(Levels):
    bits = 3

    def levels(self, qparams: QParams) -> Tensor:
        return torch.arange(-3, 4) / 3


def test_a_table_of_ones_own_is_a_quantizer() -> None:
    check_quantizer(Thirds())
