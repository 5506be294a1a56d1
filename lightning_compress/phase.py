"""When: a stretch of the training run, and how far the run has come in it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Literal

__all__ = ["Clock", "Phase", "check_phases"]


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
        if self.unit not in ("run", "epoch", "step"):
            raise ValueError(f"Phase.unit={self.unit!r}: accepted are 'run', 'epoch' and 'step'.")
        if not 0 <= self.begin <= self.end or math.isinf(self.end):
            raise ValueError(
                f"Phase(begin={self.begin}, end={self.end}): accepted is 0 <= begin <= end. "
                "Give the begin first and the end second."
            )
        if self.unit == "run" and self.end > 1:
            raise ValueError(
                f"Phase(end={self.end}, unit='run'): fractions of the run lie in 0..1. "
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


def check_phases(phases: Iterable[tuple[str, Phase]], clock: Clock) -> None:
    """Raise unless every phase fits the run and none overlaps another.

    Args:
        phases: Pairs of a name for messages and a phase; phases of the same name may overlap.
        clock: The run's clock at its start, with its totals.

    Raises:
        ValueError: If a phase cannot fit into the run, or two phases overlap.
    """
    placed: list[tuple[float, float, str, Phase]] = []
    endless: list[tuple[float, float, str, Phase]] = []  # in a run without an end, compared within their unit
    for name, phase in phases:
        if phase.unit == "run" and math.isnan(clock.run):
            raise ValueError(
                f"{name} is {phase}, in fractions of the run, but the run has no known end (max_steps=-1 and "
                "max_epochs=-1, or a dataloader without a length). Set Trainer(max_steps=...) or give the phase in "
                "unit='step' or unit='epoch'."
            )
        begin, end = phase.fractions(clock)
        if math.isnan(begin):
            endless.append((phase.begin, phase.end, name, phase))
            continue
        if end > 1 + 1e-9:
            total = clock.total_epochs if phase.unit == "epoch" else clock.total_steps
            raise ValueError(
                f"{name} is {phase} but the run has {total:g} {phase.unit}s. Train longer or end the phase earlier."
            )
        if begin < end and (end - begin) * clock.total_steps < 1 - 1e-9:
            raise ValueError(
                f"{name} is {phase}: {(end - begin) * clock.total_steps:.2g} of an optimizer step in a run of "
                f"{clock.total_steps:g} steps. A phase takes at least one step: lengthen the phase or the run."
            )
        placed.append((begin, end, name, phase))
    pairs = chain(
        combinations(sorted(placed, key=_place), 2),
        (pair for pair in combinations(sorted(endless, key=_place), 2) if pair[0][3].unit == pair[1][3].unit),
    )
    for (_, end, name, phase), (begin, _, later, later_phase) in pairs:
        if begin < end - 1e-9 and name != later:
            raise ValueError(
                f"{name} {phase} and {later} {later_phase} overlap. Phases follow each other: let {later} begin where "
                f"{name} ends."
            )


def _place(item: tuple[float, float, str, Phase]) -> tuple[float, float]:
    return item[:2]
