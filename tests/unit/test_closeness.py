"""Agreement and largest difference, against numpy over unlike outputs, in parts and in processes that are joined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_compress.deploy import Agreement, LargestDifference

from .helpers import noise

SHAPES = [(6, 10), (6, 4, 10), (6, 3, 5, 5), (6, 1), (6, 2, 1)]


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    target = noise(*shape, seed=1)
    return target + 0.3 * noise(*shape, seed=2), target


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_what_numpy_finds(shape: tuple[int, ...]) -> None:
    preds, target = pair(shape)
    a, b = preds.numpy(), target.numpy()
    axis = 1 if len(shape) >= 4 else -1
    same = a.argmax(axis) == b.argmax(axis) if shape[axis] > 1 else abs(a - b) <= 0.01 * abs(b).max()
    assert float(Agreement()(preds, target)) == pytest.approx(same.mean())
    worst = abs(a - b).max()
    assert float(LargestDifference()(preds, target)) == worst
    assert float(LargestDifference(relative=True)(preds, target)) == pytest.approx(worst / np.ptp(b))


@pytest.mark.parametrize("make", [Agreement, LargestDifference, lambda: LargestDifference(relative=True)])
def test_in_parts_and_merged_they_are_those_of_all(make: type[Agreement]) -> None:
    preds, target = pair((6, 10))
    whole, parts, one, other = make(), make(), make(), make()
    whole.update(preds, target)
    for i in range(6):
        parts.update(preds[i : i + 1], target[i : i + 1])
        (one if i % 2 else other).update(preds[i : i + 1], target[i : i + 1])
    one.merge_state(other)
    assert float(parts.compute()) == float(one.compute()) == float(whole.compute())


def test_a_nan_is_seen_whenever_it_comes() -> None:
    metric = LargestDifference()
    metric.update(torch.tensor([math.nan]), torch.tensor([1.0]))
    metric.update(torch.tensor([2.0]), torch.tensor([1.0]))
    assert math.isnan(float(metric.compute()))


def test_outputs_of_one_value_differ_by_an_infinite_share_or_not_at_all() -> None:
    metric = LargestDifference(relative=True)
    metric.update(torch.ones(3), torch.ones(3))
    assert float(metric.compute()) == 0
    metric.update(torch.full((3,), 2.0), torch.ones(3))
    assert math.isinf(float(metric.compute()))
