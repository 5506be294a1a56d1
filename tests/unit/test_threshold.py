"""The exact lowest scores, against a full sort."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, inf, nan

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_compress.pruning.threshold import CHUNK, find_threshold, keep_highest, num_dropped

from .helpers import noise

SHARES = [0.0, 0.001, 0.25, 0.5, 0.9, 0.999, 1.0]


def by_sort(scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """The same by torch's stable sort of all scores."""
    flat = torch.cat([s.flatten() for s in scores])
    order = torch.sort(flat, stable=True).indices
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[order[: ceil(Fraction(str(sparsity)) * len(flat))]] = False
    return [part.view(s.shape) for part, s in zip(keep.split([s.numel() for s in scores]), scores, strict=True)]


def assert_like_sort(scores: list[Tensor], sparsity: float) -> None:
    got, expected = keep_highest(scores, sparsity), by_sort(scores, sparsity)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(a.dtype == torch.bool for a in got)


@pytest.mark.parametrize("sparsity", SHARES)
@pytest.mark.parametrize("seed", range(3))
def test_distinct_scores_of_many_tensors(seed: int, sparsity: float) -> None:
    assert_like_sort([noise(7, 5, seed=seed), noise(1, seed=seed + 9), noise(2, 3, 3, 3, seed=seed + 99)], sparsity)


@pytest.mark.parametrize("sparsity", SHARES)
@pytest.mark.parametrize("num_values", [1, 2, 5])
def test_equal_scores_are_dropped_in_order_of_tensor_and_index(num_values: int, sparsity: float) -> None:
    scores = [(noise(*shape, seed=5).abs() * 10).floor() % num_values for shape in ((13, 7), (50,), (3, 3, 3))]
    assert_like_sort(scores, sparsity)


@pytest.mark.parametrize("sparsity", SHARES)
@pytest.mark.parametrize("values", [[inf, -inf, 0.0], [-inf], [inf], [0.0, -0.0], [-inf, -inf, 1e-45]])
def test_infinite_and_zero_scores(values: list[float], sparsity: float) -> None:
    assert_like_sort([torch.tensor(values * 7), torch.tensor(values[::-1] * 5)], sparsity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_other_precision(dtype: torch.dtype) -> None:
    assert_like_sort([(noise(40) * 4).round().to(dtype), noise(30, seed=1).to(torch.float16).to(dtype)], 0.5)


def test_scores_that_are_not_contiguous_and_empty_ones() -> None:
    assert_like_sort([noise(5, 4).t(), torch.empty(0), noise(6)], 0.4)
    assert keep_highest([torch.empty(0, 3)], 0.5)[0].shape == (0, 3)


def test_sparsity_zero_keeps_all_and_one_drops_all() -> None:
    scores = [noise(4, 4), torch.full((3,), inf)]
    assert all(bool(keep.all()) for keep in keep_highest(scores, 0.0))
    assert not any(bool(keep.any()) for keep in keep_highest(scores, 1.0))


def test_scores_stay_as_they_are() -> None:
    scores = noise(10)
    before = scores.clone()
    keep_highest([scores], 0.5)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("position", [0, 9])
def test_a_nan_is_an_error(position: int, sparsity: float) -> None:
    scores = noise(10)
    scores[position] = nan
    with pytest.raises(ValueError, match="NaN"):
        keep_highest([noise(4), scores], sparsity)


@pytest.mark.parametrize("num", [1, 3, 10, 100, 1000, 266_610])
def test_the_number_dropped_is_the_exact_share_rounded_up(num: int) -> None:
    for percent in range(101):
        assert num_dropped(percent / 100, num) == ceil(Fraction(percent, 100) * num)


@pytest.mark.parametrize("sparsity", [0.0, 1e-5, 0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("digits", [0, 2, 9], ids=["few values", "many ties", "distinct"])
def test_more_scores_than_are_looked_at_together(digits: int, sparsity: float) -> None:
    sizes = [2 * CHUNK + 3, 1, 7, 8, 9, 63, 65, 1001, CHUNK - 1]
    assert_like_sort([noise(size, seed=i).abs().round(decimals=digits) for i, size in enumerate(sizes)], sparsity)


@pytest.mark.parametrize("position", [0, 5, CHUNK - 1, CHUNK, 2 * CHUNK + 2])
def test_one_nan_among_many_is_an_error(position: int) -> None:
    scores = noise(2 * CHUNK + 3)
    scores[position] = nan
    with pytest.raises(ValueError, match="NaN"):
        keep_highest([scores], 0.8)


@pytest.mark.parametrize("value", [-5.0, 0.0, 1e9])
@pytest.mark.parametrize("k", [1, 700, 4999, 5000])
def test_a_sample_that_misleads_costs_time_and_not_exactness(k: int, value: float) -> None:
    scores = noise(5000).numpy()
    cut = find_threshold(lambda: iter([scores[:3000], scores[3000:]]), 5000, k, lambda: np.full(50, value, np.float32))
    assert cut.value == np.sort(scores)[k - 1]
    assert (cut.num_ties, cut.num_equal) == (1, 1)
