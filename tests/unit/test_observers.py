"""What was seen, against the observers of torch.ao and against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver

from lightning_compress.quantization import (
    MSE,
    AdditivePowerOfTwo,
    Affine,
    Entropy,
    Float8,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    Quantizer,
)
from lightning_compress.testing import check_observer

from .helpers import noise

BATCHES = [noise(4, 3, seed=i) * (i + 1) + i for i in range(6)]
NOTHING = torch.tensor([torch.inf, -torch.inf])
HISTOGRAMS = [Percentile(), Percentile(0.9), MSE(), Entropy()]
every_histogram = pytest.mark.parametrize("observer", HISTOGRAMS)


def seen(observer: Observer, batches: list[Tensor]) -> Tensor:
    state = observer.start()
    for batch in batches:
        state = observer.update(state, batch)
    return state


def found(observer: Observer, values: Tensor, quantizer: Quantizer) -> list[float]:
    return observer.range(seen(observer, [values]), quantizer).tolist()


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(), MovingAverage(1.0), *HISTOGRAMS])
def test_the_contract_is_kept(observer: Observer) -> None:
    check_observer(observer)


@pytest.mark.parametrize("num", range(1, len(BATCHES) + 1))
def test_min_max_sees_what_torch_sees(num: int) -> None:
    reference = MinMaxObserver()
    for batch in BATCHES[:num]:
        reference(batch)
    assert torch.equal(seen(MinMax(), BATCHES[:num]), torch.stack([reference.min_val, reference.max_val]))


@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0])
def test_moving_average_is_that_of_torch(rate: float) -> None:
    reference = MovingAverageMinMaxObserver(averaging_constant=rate)
    for batch in BATCHES:
        reference(batch)
    expected = torch.stack([reference.min_val, reference.max_val])
    torch.testing.assert_close(seen(MovingAverage(rate), BATCHES), expected)


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(0.01)])
def test_the_first_batch_is_taken_whole(observer: Observer) -> None:
    low, high = BATCHES[0].min(), BATCHES[0].max()
    assert torch.equal(seen(observer, BATCHES[:1]), torch.stack([low, high]))


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(0.3)])
def test_the_range_before_stays_as_it_was(observer: Observer) -> None:
    before = torch.tensor([-1.0, 1.0])
    observer.update(before, BATCHES[5])
    assert before.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(0.3)])
def test_a_batch_without_values_leaves_the_range_as_it_is(observer: Observer) -> None:
    before = torch.tensor([-1.0, 1.0])
    assert torch.equal(observer.update(before, torch.empty(0, 3)), before)


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(0.3)])
def test_ranks_come_together_in_the_widest_range(observer: Observer) -> None:
    states = torch.stack([torch.tensor([-1.0, 1.0]), NOTHING, torch.tensor([0.5, 4.0])])
    assert observer.merge(states).tolist() == [-1.0, 4.0]


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"MovingAverage\.rate"):
        MovingAverage(rate)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_percentile_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"Percentile\.share"):
        Percentile(share)


@every_histogram
def test_counts_are_those_of_numpy_in_bins_to_a_power_of_two(observer: Observer) -> None:
    state = seen(observer, BATCHES)
    values = torch.cat(BATCHES).flatten().numpy()
    reach = 2.0 ** np.ceil(np.log2(np.abs(values).max()))
    counts, _ = np.histogram(values, bins=np.linspace(-reach, reach, 4097))
    assert state[:2].tolist() == [values.min(), values.max()]
    np.testing.assert_array_equal(state[2:].numpy(), counts)


@every_histogram
@pytest.mark.parametrize("first", [0.0, 1e-20, 1e-3])
def test_neither_the_order_of_batches_nor_the_ranks_that_saw_them_show(observer: Observer, first: float) -> None:
    batches = [torch.full((3,), first), *BATCHES, torch.tensor([-40.0, 0.25])]
    whole = seen(observer, batches)
    assert torch.equal(seen(observer, batches[::-1]), whole)
    ranks = [seen(observer, batches[i::3]) for i in range(3)]
    assert torch.equal(observer.merge(torch.stack([*ranks, observer.start()])), whole)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
def test_a_percentile_is_that_of_numpy_to_a_bin(share: float) -> None:
    values = noise(20_000) + 0.3
    low, high = found(Percentile(share), values, Affine())
    expected = np.quantile(values.numpy(), [(1 - share) / 2, (1 + share) / 2], method="inverted_cdf")
    np.testing.assert_allclose([low, high], expected, atol=8 / 2048)
    assert (low <= expected[0]) & (high >= expected[1])


def test_a_percentile_of_rectified_values_begins_at_zero() -> None:
    assert found(Percentile(0.9), noise(1000).relu(), Affine())[0] == 0


def cuts(values: np.ndarray) -> list[tuple[float, float]]:
    farthest = np.abs(values).max()
    ends = [farthest * 0.94**i for i in range(48)]
    return [(max(values.min(), -end), min(values.max(), end)) for end in ends]


QUANTIZERS = [Affine(2), Affine(4), Affine(8), Affine(4, symmetric=True), AdditivePowerOfTwo(4), Float8()]
SAMPLES = {
    "normal": noise(30_000),
    "rectified": noise(30_000, seed=1).relu(),
    "heavy": noise(30_000, seed=2) ** 5,
    "shifted": noise(30_000, seed=3).relu() - 0.17,
}


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_error_is_the_least_among_all_cuts_of_the_values_themselves(sample: str, quantizer: Quantizer) -> None:
    values = SAMPLES[sample]

    def error(low: float, high: float) -> float:
        qparams = quantizer.qparams(torch.tensor(low), torch.tensor(high))
        back = quantizer.dequantize(quantizer.quantize(values, qparams), qparams)
        return float((back - values).double().square().mean())

    least = min(error(*cut) for cut in cuts(values.numpy()))
    assert error(*found(MSE(), values, quantizer)) <= 1.02 * least + 1e-9


def divergence(bins: np.ndarray, stop: int, num_codes: int) -> float:
    """Of values counted from 0 up, cut at a bin, as in NVIDIA's calibrators."""
    inside = bins[:stop].astype(float)
    last = np.nonzero(inside)[0].max()
    p = inside.copy()
    p[last] += bins[stop:].sum()
    scale = (stop * 1.0) / (num_codes - 1)
    codes = np.round((np.arange(stop) + 0.5) / scale).astype(int)
    q = np.zeros(stop)
    for code in np.unique(codes):
        where = (codes == code) & (inside > 0)
        if where.any():
            q[where] = inside[codes == code].sum() / where.sum()
    p, q = p / p.sum(), q / q.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("power", [1, 2, 5])
def test_entropy_is_the_least_divergence_of_a_histogram_of_numpy(bits: int, power: int) -> None:
    values = noise(100_000, seed=power).abs() ** power
    low, high = found(Entropy(), values, Affine(bits))
    farthest = float(values.max())
    width = 2.0 ** np.ceil(np.log2(farthest)) / 2048
    bins, _ = np.histogram(values.numpy(), bins=np.arange(2049) * width)
    bins[0] = bins[1]
    stops = [int(farthest * 0.94**i / width + 0.5) for i in range(48)]
    divergences = [divergence(bins, stop, 2**bits) for stop in stops]
    ours = divergence(bins, int(high / width + 0.5), 2**bits)
    assert low == float(values.min())
    assert ours <= min(divergences) * 1.05 + 1e-6


@pytest.mark.parametrize("zeros", [0, 10_000])
def test_zeros_do_not_move_the_range_of_entropy(zeros: int) -> None:
    values = noise(20_000).relu()
    more = torch.cat([values, torch.zeros(zeros)])
    assert found(Entropy(), more, Affine()) == found(Entropy(), values, Affine())


@every_histogram
@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-25])
def test_a_constant_gives_a_range_that_holds_it(observer: Observer, value: float) -> None:
    low, high = found(observer, torch.full((50,), value), Affine())
    quantizer = Affine()
    qparams = quantizer.qparams(torch.tensor(low), torch.tensor(high))
    back = quantizer.fake_quantize(torch.tensor([value]), qparams)
    torch.testing.assert_close(back, torch.tensor([value]), rtol=0.07, atol=1e-9)
