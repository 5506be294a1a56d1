"""When: phases on a clock."""

from __future__ import annotations

import math

import pytest

from lightning_compress.phase import Clock, Phase, check_phases

RUN = Clock(step=0, epoch=0.0, run=0.0, total_steps=100, total_epochs=10)
ENDLESS = Clock(step=0, epoch=0.0, run=math.nan)


@pytest.mark.parametrize(
    ("phase", "clock", "expected"),
    [
        (Phase(0.2, 0.6), Clock(20, 2.0, 0.2), 0.0),
        (Phase(0.2, 0.6), Clock(40, 4.0, 0.4), 0.5),
        (Phase(0.2, 0.6), Clock(60, 6.0, 0.6), 1.0),
        (Phase(0.2, 0.6), Clock(0, 0.0, 0.0), -0.5),
        (Phase(0.2, 0.6), Clock(100, 10.0, 1.0), 2.0),
        (Phase(2, 4, "epoch"), Clock(7, 2.5, 0.9), 0.25),
        (Phase(10, 30, "step"), Clock(15, 9.0, 0.9), 0.25),
        (Phase(), Clock(0, 0.0, 0.75), 0.75),
    ],
)
def test_progress_is_the_share_of_the_phase_that_has_passed(phase: Phase, clock: Clock, expected: float) -> None:
    assert phase.progress(clock) == pytest.approx(expected)


def test_progress_is_exactly_one_at_the_end() -> None:
    assert all(Phase(0.1, end / 97).progress(Clock(0, 0.0, end / 97)) == 1.0 for end in range(10, 98))


def test_a_phase_without_length_passes_from_before_to_after() -> None:
    assert [Phase(5, 5, "step").progress(Clock(step, 0.0, 0.0)) for step in (4, 5, 6)] == [-1.0, 1.0, 1.0]


def test_progress_by_steps_and_epochs_needs_no_known_end() -> None:
    clock = Clock(step=5, epoch=0.5, run=math.nan)
    assert Phase(0, 10, "step").progress(clock) == Phase(0, 1, "epoch").progress(clock) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0.2), "begin first"),
        ((-0.1, 0.5), "0 <= begin <= end"),
        ((math.nan, 0.5), "0 <= begin <= end"),
        ((0.0, math.nan), "0 <= begin <= end"),
        ((0, math.inf, "step"), "0 <= begin <= end"),
        ((0.0, 30.0), "unit='epoch' or unit='step'"),
        ((0.0, 1.0, "batch"), "'run', 'epoch' and 'step'"),
    ],
)
def test_an_impossible_phase_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(*arguments)


@pytest.mark.parametrize("phase", [Phase(0.2, 0.6), Phase(2, 6, "epoch"), Phase(20, 60, "step")])
def test_fractions_are_shares_of_the_run_in_every_unit(phase: Phase) -> None:
    assert phase.fractions(RUN) == pytest.approx((0.2, 0.6))


def test_fractions_are_nan_where_the_end_is_unknown() -> None:
    assert all(map(math.isnan, (*Phase(2, 6, "epoch").fractions(ENDLESS), *Phase(2, 6, "step").fractions(ENDLESS))))


def test_phases_that_follow_each_other_in_any_order_and_unit_are_accepted() -> None:
    check_phases([("c", Phase(60, 100, "step")), ("a", Phase(0.0, 0.3)), ("b", Phase(3, 6, "epoch"))], RUN)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Phase(0.2, 0.6), Phase(0.5, 0.9)),
        (Phase(0.2, 0.6), Phase(5, 9, "epoch")),
        (Phase(20, 60, "step"), Phase(5, 9, "epoch")),
        (Phase(0.0, 1.0), Phase(0.4, 0.5)),
        (Phase(0.2, 0.6), Phase(0.4, 0.4)),
    ],
)
def test_an_overlap_is_refused_and_both_phases_are_named(first: Phase, second: Phase) -> None:
    for pair in ([("prune", first), ("quantize", second)], [("quantize", second), ("prune", first)]):
        with pytest.raises(ValueError, match=r"prune.*quantize.*overlap"):
            check_phases(pair, RUN)


def test_an_overlap_with_a_later_than_the_next_phase_is_seen() -> None:
    with pytest.raises(ValueError, match=r"a .* and c .* overlap"):
        check_phases([("a", Phase(0.0, 0.9)), ("a", Phase(0.1, 0.2)), ("c", Phase(0.5, 1.0))], RUN)


def test_phases_of_one_name_may_overlap() -> None:
    check_phases([("prune", Phase(0.2, 0.6)), ("prune", Phase(0.3, 0.5))], RUN)


@pytest.mark.parametrize(
    ("phase", "message"), [(Phase(5, 11, "epoch"), "10 epochs"), (Phase(5, 101, "step"), "100 steps")]
)
def test_a_phase_that_ends_after_the_run_is_refused(phase: Phase, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_phases([("prune", phase)], RUN)


def test_a_phase_shorter_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        check_phases([("prune", Phase(0.2, 0.205))], RUN)
    check_phases([("prune", Phase(0.2, 0.21))], RUN)


def test_fractions_of_an_endless_run_are_refused() -> None:
    with pytest.raises(ValueError, match="no known end"):
        check_phases([("prune", Phase(0.2, 0.6))], ENDLESS)


def test_steps_and_epochs_of_an_endless_run_are_accepted() -> None:
    check_phases([("prune", Phase(0, 100, "step")), ("quantize", Phase(100, 200, "step"))], ENDLESS)


def test_an_overlap_is_refused_beside_a_phase_that_cannot_be_placed() -> None:
    clock = Clock(step=0, epoch=0.0, run=0.0, total_epochs=10)  # manual optimization: steps are not known beforehand
    apart = [("prune", Phase(0.2, 0.5)), ("quantize", Phase(5, 9, "epoch")), ("fine-tune", Phase(100, 200, "step"))]
    check_phases(apart, clock)
    with pytest.raises(ValueError, match=r"prune .* and quantize .* overlap"):
        check_phases([("prune", Phase(0.2, 0.6)), *apart[1:]], clock)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_an_overlap_in_an_endless_run_is_refused(unit: str) -> None:
    with pytest.raises(ValueError, match="overlap"):
        check_phases([("prune", Phase(0, 100, unit)), ("quantize", Phase(50, 150, unit))], ENDLESS)
