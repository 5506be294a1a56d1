"""Runs that are too short for their phases."""

from __future__ import annotations

import math
import random

import pytest

from lightning_compress.phase import Clock, Phase
from lightning_compress.squeeze import Squeezed, squeeze


def clock(num_steps: int, at: float = 0, epochs: int = 1) -> Clock:
    share = at / num_steps
    return Clock(int(at), share * epochs, share, total_steps=num_steps, total_epochs=epochs)


def steps_inside(found: Squeezed, phase: Phase, num_steps: int, epochs: int = 1) -> list[int]:
    """The steps that begin within a phase."""
    inside = [phase.progress(found.read(clock(num_steps, at, epochs))) for at in range(num_steps)]
    return [at for at, progress in enumerate(inside) if 0 <= progress < 1]


def random_phases(generator: random.Random, num: int) -> list[tuple[str, Phase]]:
    ends = sorted(generator.choices([i / 1000 for i in range(1001)], k=2 * num))
    return [(f"{i}", Phase(a, b)) for i, (a, b) in enumerate(zip(ends[::2], ends[1::2], strict=True)) if a < b]


@pytest.mark.parametrize("seed", range(200))
def test_each_phase_has_a_step_and_they_keep_their_order(seed: int) -> None:
    generator = random.Random(seed)
    phases = random_phases(generator, generator.randint(1, 5))
    num_steps = generator.randint(max(1, len(phases)), 12)
    found = squeeze(phases, clock(num_steps), num_steps, lenient=False)
    if found is None:  # as they are given, each has one
        for _, phase in phases:
            assert any(0 <= phase.progress(clock(num_steps, at)) < 1 for at in range(num_steps))
        return
    shares = [found.read(clock(num_steps, at)).run for at in range(num_steps + 1)]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    taken = [steps_inside(found, phase, num_steps) for _, phase in phases]
    assert all(taken)
    flat = [step for steps in taken for step in steps]
    assert flat == sorted(set(flat))


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_with_fewer_steps_than_phases_the_last_ones_have_them(num_steps: int) -> None:
    phases = [("prune", Phase(0.2, 0.6)), ("tune", Phase(0.6, 0.7)), ("see", Phase(0.7, 0.75)), ("q", Phase(0.75, 1))]
    found = squeeze(phases, clock(num_steps), num_steps, lenient=True)
    assert found is not None
    taken = [steps_inside(found, phase, num_steps) for _, phase in phases]
    assert taken == [[]] * (4 - num_steps) + [[i] for i in range(num_steps)]


def test_a_run_that_is_long_enough_is_left_alone() -> None:
    assert squeeze([("prune", Phase(0.2, 0.6)), ("q", Phase(0.6, 1.0))], clock(5), 5, lenient=True) is None
    assert squeeze([("at once", Phase(0.5, 0.5))], clock(1), 1, lenient=True) is None


def test_a_short_phase_of_a_long_run_moves_nothing_else() -> None:
    phases = [("prune", Phase(0.2, 0.6)), ("see", Phase(0.605, 0.6051)), ("q", Phase(0.7, 1.0))]
    found = squeeze(phases, clock(100), 100, lenient=False)
    assert found is not None
    assert [steps_inside(found, phase, 100) for _, phase in phases] == [
        list(range(20, 60)),
        [61],
        list(range(70, 100)),
    ]


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_epochs_and_steps_are_squeezed_where_the_trainer_cuts_a_run_short(unit: str) -> None:
    phases = [("prune", Phase(10, 60, unit)), ("q", Phase(70, 100, unit))]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"has [12] {unit}s"):
        squeeze(phases, clock(2), 2, lenient=False)
    found = squeeze(phases, clock(2), 2, lenient=True)
    assert found is not None
    assert [steps_inside(found, phase, 2) for _, phase in phases] == [[0], [1]]


def test_steps_are_counted_as_they_are_where_no_phase_is_given_in_steps() -> None:
    found = squeeze([("prune", Phase(0.2, 0.3))], clock(2), 2, lenient=False)
    assert found is not None
    assert [found.read(clock(2, at)).step for at in range(3)] == [0, 1, 2]


def test_phases_still_may_not_overlap() -> None:
    with pytest.raises(ValueError, match="overlap"):
        squeeze([("prune", Phase(0.2, 0.6)), ("q", Phase(0.5, 1.0))], clock(1), 1, lenient=True)


def test_a_run_without_an_end_is_not_squeezed() -> None:
    endless = Clock(0, 0.0, math.nan, math.inf, math.inf)
    assert squeeze([("prune", Phase(2, 3, "epoch"))], endless, math.inf, lenient=True) is None
