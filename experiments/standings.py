"""What the outcomes of trials say: the learning rates that were chosen, metrics by seed, who is ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from experiments.arena import TASKS
from experiments.methods import METHODS
from experiments.protocol import (
    DENSE,
    MORE_SEEDS,
    Compared,
    Outcome,
    Point,
    Trial,
    best_factor,
    compare,
    deployed,
    final_trials,
    methods_of,
    tuning_trials,
)
from experiments.records import Records

__all__ = ["CONTROL", "OURS", "Cell", "Standings"]

OURS, CONTROL = "ours", "dense trained on"


@dataclass(frozen=True)
class Cell:
    """One method at one point of one task.

    Args:
        task: The task's name.
        point: What is asked.
        method: The method's name.
        factor: Its learning rate in units of the task's.
        values: By seed, the metric of the file that ships.
        outcomes: Those of all its final trials.
        compared: Ours beside it; None for ours, and where there is one seed.
    """

    task: str
    point: Point
    method: str
    factor: float
    values: dict[int, float]
    outcomes: list[Outcome]
    compared: Compared | None = None

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return mean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        """Sample deviation over the seeds."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def role(self) -> str:
        """Ours, a peer, or a control."""
        return METHODS[self.method, self.point.kind].role

    @property
    def failures(self) -> list[str]:
        """What went wrong, each once."""
        return sorted({outcome["failure"] for outcome in self.outcomes if outcome["failure"]})

    def average(self, key: str) -> float | None:
        """Mean of a number of the outcomes that have it."""
        found = [outcome[key] for outcome in self.outcomes if outcome.get(key) is not None]
        return mean(found) if found else None

    @property
    def gap(self) -> float | None:
        """The metric of the file minus that of the trained model."""
        pairs = [(o["deployed"], o["trained"]) for o in self.outcomes]
        found = [a - b for a, b in pairs if a is not None and b is not None]
        return mean(found) if found else None

    @property
    def times_faster(self) -> float | None:
        """How often the file runs while the dense model's runs once, at batch 1."""
        found = [outcome["ms_dense"] / outcome["ms"] for outcome in self.outcomes if outcome.get("ms")]
        return mean(found) if found else None


class Standings:
    """What is known of every cell.

    Args:
        records: The outcomes.
    """

    def __init__(self, records: Records) -> None:
        self.records = records

    def factor(self, task: str, point: Point, method: str) -> float:
        """The learning rate that was best on the task's cuts."""
        known = self.records.outcomes
        trials = tuning_trials(task, point, method, TASKS[task].cuts)
        tuned = {trial: known[trial] for trial in trials if trial in known}
        return best_factor(tuned, TASKS[task].metric.higher)

    def finals(self, task: str, point: Point, method: str, seeds: int = MORE_SEEDS) -> list[Trial]:
        """The trials on the whole training part, at that rate."""
        return final_trials(task, point, method, self.factor(task, point, method), seeds)

    def cell(self, task: str, point: Point, method: str) -> Cell | None:
        """One method; None where nothing was run."""
        found = {trial: self.records.outcomes.get(trial) for trial in self.finals(task, point, method)}
        ran = {trial: outcome for trial, outcome in found.items() if outcome is not None}
        if not ran:
            return None
        compared = None
        ours = self.cell(task, point, OURS) if method != OURS and (OURS, point.kind) in METHODS else None
        if ours is not None:
            compared = self._compared(ours, ran)
        factor, values = self.factor(task, point, method), deployed(ran.items())
        return Cell(task, point, method, factor, values, list(ran.values()), compared)

    def _compared(self, ours: Cell, ran: dict[Trial, Outcome]) -> Compared | None:
        """Of pairs that started from the same dense model."""
        starts = {trial.seed: outcome.get("start") for trial, outcome in ran.items()}
        ours_from = dict(zip(ours.values, [o.get("start") for o in ours.outcomes if not o["failure"]], strict=True))
        theirs = {seed: v for seed, v in deployed(ran.items()).items() if ours_from.get(seed) == starts[seed]}
        if len(ours.values.keys() & theirs.keys()) < 2:
            return None
        metric = TASKS[ours.task].metric
        return compare(ours.values, theirs, metric.higher, metric.least)

    def cells(self, tasks: Sequence[str], points: Sequence[Point], only: Sequence[str] = ()) -> Iterator[Cell]:
        """All that were run, in the order of tasks, points and methods."""
        for task in tasks:
            for point in points:
                names = [CONTROL] if point == DENSE else methods_of(point, only)
                yield from (cell for name in names if (cell := self.cell(task, point, name)))
