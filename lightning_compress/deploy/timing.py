"""Milliseconds with their spread, and whether two of them can be told apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import quantiles
from typing import Any, NamedTuple

import torch

from lightning_compress.checks import check_callable, check_list, check_number

__all__ = ["Timed", "are_apart", "plain_times", "time_together", "times_faster"]


class Timed(NamedTuple):
    """Milliseconds of a call: the median of its repetitions, and their quartiles.

    Args:
        ms: The median.
        low: A quarter of the repetitions took less.
        high: A quarter of them took more.
        taken: All of them, in their order.
    """

    ms: float
    low: float
    high: float
    taken: tuple[float, ...] = ()


def time_together(calls: Sequence[Callable[[], Any]], seconds: float = 1.0) -> list[Timed]:
    """Milliseconds of each call, interleaved so that a noisy machine disturbs all alike.

    Args:
        calls: What to time.
        seconds: Time to spend in all; each call runs 5 times at least.

    Example:
        >>> (timed,) = time_together([lambda: None], seconds=0.0)
        >>> timed.low <= timed.ms <= timed.high
        True
    """
    check_list("time_together.calls", calls, object, "a function without arguments", fewest=1)
    for i, call in enumerate(calls):
        check_callable(f"time_together.calls[{i}]", call, "a function without arguments")
    check_number("time_together.seconds", seconds, "a number of seconds from 0", low=0)
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    with torch.no_grad():
        while time.perf_counter() < end or len(times[0]) < 5:
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                taken.append((time.perf_counter() - start) * 1e3)
    return [_spread(taken) for taken in times]


def _spread(taken: list[float]) -> Timed:
    low, middle, high = quantiles(taken, n=4, method="inclusive")
    return Timed(middle, low, high, tuple(taken))


def plain_times(timed: Mapping[str, Timed]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Medians and quartiles by batch size, as they stand in report.json.

    Example:
        >>> plain_times({"1": Timed(0.25, 0.24, 0.27)})
        ({'1': 0.25}, {'1': [0.24, 0.27]})
    """
    medians = {size: round(one.ms, 4) for size, one in timed.items()}
    return medians, {size: [round(one.low, 4), round(one.high, 4)] for size, one in timed.items()}


def times_faster(one: Timed, other: Timed) -> list[float]:
    """How often one call fits into the other, turn by turn: the median, and the quartiles below and above.

    What disturbs a turn disturbs both calls in it, so that this varies less than either time. A difference is one where
    three quarters of the turns show it: where both quartiles lie on the same side of 1.

    Args:
        one: Of :func:`time_together`.
        other: Of the same call of it.

    Example:
        >>> times_faster(Timed(1.0, 1.0, 5.0, (1.0, 1.0, 5.0)), Timed(2.0, 2.0, 9.0, (2.0, 2.0, 9.0)))
        [2.0, 1.9, 2.0]
    """
    low, middle, high = quantiles([b / a for a, b in zip(one.taken, other.taken, strict=True)], n=4, method="inclusive")
    return [round(ratio, 4) for ratio in (middle, low, high)]


def are_apart(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether two intervals, each a lower and an upper end, do not overlap; False where one is not known.

    Example:
        >>> are_apart((0.20, 0.24), (0.40, 0.45)), are_apart((0.20, 0.24), (0.23, 0.30)), are_apart((0.2, 0.3), None)
        (True, False, False)
    """
    return one is not None and other is not None and (one[1] < other[0] or other[1] < one[0])
