"""How much: sparsity over a phase."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from lightning_compress.pruning import Constant, Cubic, Exponential, Linear, Rounds, Schedule

GRID = np.linspace(0, 1, 41)
KINDS = [Linear, Cubic, Exponential]


def values(schedule: Schedule, at: np.ndarray = GRID) -> np.ndarray:
    return np.array([schedule(float(p)) for p in at])


@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.9), (0.3, 0.8), (0.5, 0.5)])
def test_cubic_is_the_formula_of_zhu_and_gupta(initial: float, final: float) -> None:
    np.testing.assert_allclose(values(Cubic(final, initial)), final + (initial - final) * (1 - GRID) ** 3, atol=1e-12)


@pytest.mark.parametrize("rate", [0.5, 3.0, 20.0])
def test_exponential_is_its_formula(rate: float) -> None:
    expected = 0.1 + 0.8 * (1 - np.exp(-rate * GRID)) / (1 - np.exp(-rate))
    np.testing.assert_allclose(values(Exponential(0.9, 0.1, rate=rate)), expected, atol=1e-12)


def test_linear_takes_equal_steps() -> None:
    np.testing.assert_allclose(values(Linear(0.9, 0.1)), np.linspace(0.1, 0.9, 41), atol=1e-12)


def test_constant_is_final_at_once() -> None:
    assert set(values(Constant(0.7, 0.2))) == {0.7}


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_goes_from_initial_to_final_without_falling(kind: type[Schedule]) -> None:
    got = values(kind(0.9, 0.2))
    assert got[0] == pytest.approx(0.2)
    assert got[-1] == pytest.approx(0.9, abs=1e-15)
    assert (np.diff(got) > 0).all()


@pytest.mark.parametrize("kind", [Constant, Rounds, *KINDS])
def test_progress_outside_of_the_phase_is_clipped(kind: type[Schedule]) -> None:
    schedule = kind(0.9, 0.2)
    assert (schedule(-5.0), schedule(7.0)) == (schedule(0.0), schedule(1.0))


@pytest.mark.parametrize("kind", [Constant, Rounds, *KINDS])
def test_a_sparsity_that_is_no_share_is_refused(kind: type[Schedule]) -> None:
    for field in ("final", "initial"):
        for value in (90, -0.1, 1.0001, math.nan, "0.5", None, True):
            with pytest.raises(ValueError, match=rf"{kind.__name__}\.{field}={re.escape(repr(value))}"):
                kind(**{field: value})


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, "3"])
def test_a_rate_of_decay_that_is_not_above_zero_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"Exponential\.rate"):
        Exponential(0.9, rate=rate)


@pytest.mark.parametrize(
    ("initial", "final"), [(0.0, 0.9), (0.0, 0.0), (0.3, 0.8), (0.5, 0.5), (0.2, 1.0), (0.0, 0.99)]
)
@pytest.mark.parametrize("num", [1, 2, 3, 7, 10, 49])
def test_rounds_each_drop_the_same_share_of_what_is_left(initial: float, final: float, num: int) -> None:
    schedule = Rounds(final, initial, num=num)
    left, share = 1 - initial, ((1 - final) / (1 - initial)) ** (1 / num) if final < 1 else 1.0
    for done in range(num):
        begin, end = done / num, (done + 1) / num
        for progress in (begin, begin + 0.5 / num, end - 1e-6):
            assert schedule(progress) == pytest.approx(1 - left, abs=1e-12)
        left *= share
    assert schedule(1.0) == final


@pytest.mark.parametrize("num", [0, -1, 2.0, "3", None])
def test_a_number_of_rounds_that_is_none_is_refused(num: object) -> None:
    with pytest.raises(ValueError, match=r"Rounds\.num=.*whole number of rounds from 1"):
        Rounds(0.9, num=num)
