"""What was seen, against the observers of torch.ao."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver

from lightning_compress.quantization import MinMax, MovingAverage, Observer

from .helpers import noise

BATCHES = [noise(4, 3, seed=i) * (i + 1) + i for i in range(6)]
NOTHING = torch.tensor([torch.inf, -torch.inf])


def seen(observer: Observer, batches: list[Tensor]) -> Tensor:
    found = NOTHING
    for batch in batches:
        found = observer.update(found, batch)
    return found


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


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"MovingAverage\.rate"):
        MovingAverage(rate)
