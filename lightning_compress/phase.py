"""When: a stretch of the training run, and how far the run has come in it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from lightning_compress.checks import check_number, check_one_of

__all__ = ["Clock", "Phase", "Place", "check_phases", "check_places", "place_phases"]


@dataclass(frozen=True)
class Clock:
    """How far the run has come, and how far it goes.

    Args:
        step: Optimizer steps taken (Lightning's ``global_step``).
        epoch: Epochs trained, as a fraction.
        run: Share of the whole run, 0..1; NaN when the run has no known end.
        total_steps: Optimizer steps of the whole run; infinite when unknown.
        total_epochs: Epochs of the whole run; infinite when unknown.
    """

    step: int
    epoch: float
    run: float
    total_steps: float = math.inf
    total_epochs: float = math.inf


@dataclass(frozen=True)
class Phase:
    """A stretch of the run from ``begin`` (included) to ``end``.

    Args:
        begin: Where it begins, in ``unit``.
        end: Where it ends, in ``unit``.
        unit: ``"run"`` (fractions 0..1 of the whole run), ``"epoch"`` or ``"step"`` (optimizer steps).

    Raises:
        ValueError: If begin and end are out of order or out of range.

    Example:
        >>> Phase(0.25, 0.75).progress(Clock(step=50, epoch=5.0, run=0.5))
        0.5
    """

    begin: float = 0.0
    end: float = 1.0
    unit: Literal["run", "epoch", "step"] = "run"

    def __post_init__(self) -> None:
        """Refuse what can never be a stretch of a run."""
        check_one_of("Phase.unit", self.unit, ("run", "epoch", "step"))
        for field in ("begin", "end"):
            check_number(f"Phase.{field}", getattr(self, field), "a finite number, 0 <= begin <= end", low=0)
        if self.begin > self.end:
            raise ValueError(
                f"Phase(begin={self.begin}, end={self.end}): accepted is 0 <= begin <= end. "
                "Give the begin first and the end second."
            )
        if self.unit == "run" and self.end > 1:
            raise ValueError(
                f"Phase(end={self.end}, unit='run'): accepted is an end up to 1, fractions of the run lie in 0..1. "
                "For epochs or steps set unit='epoch' or unit='step'."
            )

    def progress(self, clock: Clock) -> float:
        """Below 0 before the phase, 0..1 inside, above 1 after it (1 exactly at the end)."""
        now = getattr(clock, self.unit)
        if self.end == self.begin:
            return -1.0 if now < self.begin else 1.0
        return (now - self.begin) / (self.end - self.begin)

    def fractions(self, clock: Clock) -> tuple[float, float]:
        """Begin and end as shares of the run; NaN where the run's length in ``unit`` is unknown."""
        total = {"run": 1.0, "epoch": clock.total_epochs, "step": clock.total_steps}[self.unit]
        return (self.begin / total, self.end / total) if math.isfinite(total) else (math.nan, math.nan)


Place = tuple[float, float, str, Phase]
"""Begin, end, name and phase; begin and end as shares of the run, or in the phase's unit where the run has no end."""


def check_phases(phases: Iterable[tuple[str, Phase]], clock: Clock) -> None:
    """Raise unless every phase fits the run and none overlaps another.

    Args:
        phases: Pairs of a name for messages and a phase; phases of the same name may overlap.
        clock: The run's clock at its start, with its totals.

    Raises:
        ValueError: If a phase cannot fit into the run, or two phases overlap.
    """
    placed = place_phases(phases, clock)
    for begin, end, name, phase in placed:
        if begin < end and (end - begin) * clock.total_steps < 1 - 1e-9 and not math.isnan(phase.fractions(clock)[0]):
            raise ValueError(
                f"{name} is {phase}: {(end - begin) * clock.total_steps:.2g} of an optimizer step in a run of "
                f"{clock.total_steps:g} steps. A phase takes at least one step: lengthen the phase or the run."
            )
    check_places(placed, clock)


def place_phases(phases: Iterable[tuple[str, Phase]], clock: Clock) -> list[Place]:
    """Where each phase lies in the run.

    Raises:
        ValueError: If a phase lies beyond the run's end, or in fractions of a run that has none.
    """
    placed: list[Place] = []
    for name, phase in phases:
        if phase.unit == "run" and math.isnan(clock.run):
            raise ValueError(
                f"{name} is {phase}, in fractions of the run, but the run has no known end (max_steps=-1 and "
                "max_epochs=-1, or a dataloader without a length). Set Trainer(max_steps=...) or give the phase in "
                "unit='step' or unit='epoch'."
            )
        begin, end = phase.fractions(clock)
        if math.isnan(begin):
            placed.append((phase.begin, phase.end, name, phase))
            continue
        if end > 1 + 1e-9:
            total = clock.total_epochs if phase.unit == "epoch" else clock.total_steps
            raise ValueError(
                f"{name} is {phase} but the run has {total:g} {phase.unit}s. Train longer or end the phase earlier."
            )
        placed.append((begin, end, name, phase))
    return placed


def check_places(placed: Iterable[Place], clock: Clock) -> None:
    """Raise if two phases of different names overlap; in a run without an end they are compared within their unit.

    Raises:
        ValueError: If two phases overlap.
    """
    placed = sorted(placed, key=lambda place: place[:2])
    for (_, end, name, phase), (begin, _, later, later_phase) in combinations(placed, 2):
        ends = [math.isfinite(each.fractions(clock)[0]) for each in (phase, later_phase)]
        comparable = all(ends) or (not any(ends) and phase.unit == later_phase.unit)
        if comparable and begin < end - 1e-9 and name != later:
            raise ValueError(
                f"{name} {phase} and {later} {later_phase} overlap. Phases follow each other: let {later} begin where "
                f"{name} ends."
            )
