"""Milliseconds: their middle and their spread."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lightning_compress.deploy.timing import are_apart, time_together, times_faster


def test_medians_are_milliseconds_in_the_order_of_the_calls() -> None:
    slow, fast = time_together([lambda: time.sleep(0.01), lambda: None], seconds=0.05)
    assert 10 <= slow.ms < 100
    assert fast.ms < 1
    assert are_apart(slow[1:3], fast[1:3])


def test_what_disturbs_both_calls_of_a_turn_does_not_hide_their_difference() -> None:
    pauses = iter([0.001, 0.01, 0.001, 0.02, 0.001, 0.01, 0.02])  # the first one warms up
    turn = [0.0]

    def short() -> None:
        turn[0] = next(pauses)
        time.sleep(turn[0])

    one, other = time_together([short, lambda: time.sleep(2 * turn[0])], seconds=0.0)
    assert not are_apart(one[1:3], other[1:3])
    ratio, low, high = times_faster(one, other)
    assert 1.2 < low <= ratio <= high < 2.5


def test_the_quartiles_hold_the_middle_half_of_what_was_measured() -> None:
    pauses = iter([0, 0.001, 0.002, 0.03, 0.04, 0.05])  # the first call warms up
    (timed,) = time_together([lambda: time.sleep(next(pauses))], seconds=0.0)
    assert 2 <= timed.low < 30 <= timed.ms < timed.high
    assert timed.high >= 40


def test_each_call_runs_at_least_five_times_interleaved_and_without_gradients() -> None:
    calls: list[str] = []
    modes: list[bool] = []

    def record(name: str) -> Callable[[], None]:
        return lambda: (calls.append(name), modes.append(torch.is_grad_enabled()))

    time_together([record("a"), record("b")], seconds=0.0)
    assert calls == ["a", "b"] * 6
    assert not any(modes[2:])
