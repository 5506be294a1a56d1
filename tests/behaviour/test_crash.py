"""A handful of the kills of `make test-crash`."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.crash.places import CHECKPOINT, Kill
from experiments.crash.sweeps import choose_sweeps, try_sweep
from experiments.crash.trials import refer, try_kill

from ..nightly import nightly


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        pytest.param(
            "WeightAveraging",
            [Kill("shape change", 0.9), Kill("mask update", 0.4), Kill(CHECKPOINT, 0.6)],
            marks=nightly,
        ),
        ("AccuracyGuard", [Kill("judgement", 0.7)]),
    ],
)
def test_a_killed_run_that_is_started_again_ends_as_if_nothing_had_been(
    name: str, kills: list[Kill], tmp_path: Path
) -> None:
    reference = refer(name, tmp_path / "whole")
    for i, kill in enumerate(kills):
        outcome = try_kill(name, kill, reference, tmp_path / str(i))
        assert outcome.end == "identical", outcome


def test_a_killed_sensitivity_evaluates_what_is_missing(tmp_path: Path) -> None:
    chosen = list(choose_sweeps("sensitivity", tmp_path / "whole", 1))
    kill, number = next(found for found in chosen if found[0].place == "sensitivity's file")
    outcome = try_sweep("sensitivity", kill, number, tmp_path / "whole", tmp_path / "killed")
    assert outcome.end == "identical", outcome
