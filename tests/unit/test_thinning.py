"""Histories are whole while they are short, and bounded however long a run is."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest

from lightning_compress.analysis.history import History
from lightning_compress.callbacks import AccuracyGuard
from lightning_compress.thinning import LIMIT, Thinning


def grown(num: int, limit: int = LIMIT) -> list[int]:
    thinning, points = Thinning(limit=limit), []
    for x in range(num):
        thinning.add(points, x)
    return points


@pytest.mark.parametrize("limit", [2, 5, 16])
def test_all_of_few_and_of_many_the_first_every_nth_and_the_last(limit: int) -> None:
    for num in range(1, 200):
        points = grown(num, limit)
        if num <= limit:
            assert points == list(range(num))
        assert len(points) <= limit
        assert points[0] == 0
        assert points[-1] == num - 1
        gaps = {b - a for a, b in pairwise(points[:-1])}
        assert len(gaps) <= 1  # the last one may lie nearer
        assert len(points) >= min(num, limit // 2)


def test_points_that_were_not_counted_are_thinned_too() -> None:
    points = list(range(1000))
    thinning = Thinning(limit=8)
    for x in range(1000, 1100):
        thinning.add(points, x)
    assert len(points) <= 8
    assert (points[0], points[-1]) == (0, 1099)


def looked(num: int, history: History) -> History:
    for step in range(len(history.steps) and history.steps[-1] + 1, num):
        history.look(step, {"a": step / num} | ({"b": 0.5} if step > num // 2 else {}), {"a": 8, "b": 4})
        history.validate(step, step / 2)
    return history


def test_a_report_keeps_a_picture_of_a_long_run_with_the_values_of_its_steps() -> None:
    num = 20 * LIMIT + 3
    history = looked(num, History())
    assert len(history.steps) <= LIMIT
    assert len(history.metric) <= LIMIT
    assert (history.steps[0], history.steps[-1]) == (0, num - 1)
    assert history.sparsity["a"] == [step / num for step in history.steps]
    assert history.sparsity["b"] == [0.5 if step > num // 2 else None for step in history.steps]
    assert history.bits["b"] == [4] * len(history.steps)
    assert history.metric == [[step, step / 2] for step in history.steps]


def test_a_short_history_is_whole() -> None:
    history = looked(LIMIT, History())
    assert history.steps == list(range(LIMIT))
    assert len(history.metric) == LIMIT


@pytest.mark.parametrize("cut", [10, LIMIT, LIMIT + 1, 3 * LIMIT + 1])
def test_a_history_that_was_saved_goes_on_as_if_it_had_not_been(cut: int) -> None:
    first = looked(cut, History())
    resumed = History.from_state(copy.deepcopy(first.to_state()))
    for history in (first, resumed):
        for step in range(cut, 5 * LIMIT):
            history.look(step, {"a": 0.0}, {"a": 8})
            history.validate(step, 0.0)
    assert first == resumed


def test_the_state_of_an_earlier_version_is_taken_up() -> None:
    state = looked(2 * LIMIT, History()).to_state()
    state["metric"] = [[step, 0.0] for step in range(2 * LIMIT)]
    del state["looks"], state["validations"]
    history = looked(6 * LIMIT, History.from_state(state))
    assert len(history.steps) <= LIMIT
    assert len(history.metric) <= LIMIT


def test_the_judgements_of_a_guard_are_bounded_and_survive_a_checkpoint() -> None:
    guard = AccuracyGuard(0.1, "val_acc")
    for step in range(3 * LIMIT):
        guard._thinning.add(guard.history, {"step": step})
        if step == 2 * LIMIT:
            resumed = AccuracyGuard(0.1, "val_acc")
            resumed.load_state_dict(copy.deepcopy(guard.state_dict()))
            guard = resumed
    steps = [entry["step"] for entry in guard.history]
    assert len(steps) <= LIMIT
    assert (steps[0], steps[-1]) == (0, 3 * LIMIT - 1)
