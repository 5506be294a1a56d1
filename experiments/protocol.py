"""How methods are compared: what a trial is, which trials there are, and when one method beats another.

A dense model is trained once a task and seed, and kept. From there every method takes the same steps on the same
batches, in the same order and augmentation. Its learning rate is the best of the same number of trials on a sixth of
the training part, which the dense model of those trials never saw; on several sixths where one is small. Then it is
trained on the whole training part and tested once, after the last step, by the file that ships in its runtime. Two
methods are compared seed by seed; one wins where the mean difference is more than two of its standard errors and more
than the metric's ``least``. Where it is within two of them after three seeds, there are two more (Blalock 2020,
arXiv:2003.03033, says what such a comparison owes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

from experiments.methods import METHODS

__all__ = [
    "DENSE",
    "FACTORS",
    "MAIN",
    "POINTS",
    "Compared",
    "Point",
    "Trial",
    "best_factor",
    "compare",
    "final_trials",
    "methods_of",
    "tuning_trials",
]


class Point(NamedTuple):
    """What a method is asked to reach."""

    kind: str
    amount: float

    def __str__(self) -> str:
        """As tables have it."""
        return {
            "zeros": f"{100 * self.amount:g} % zeros",
            "macs": f"{self.amount:g}x fewer MACs",
            "bits": f"{self.amount:g} bits",
            "sparse8": f"{100 * self.amount:g} % zeros, 8 bits",
            "dense": "dense",
        }[self.kind]


POINTS = (
    *(Point("zeros", share) for share in (0.8, 0.9, 0.95, 0.98, 0.99)),
    *(Point("macs", times) for times in (2, 4, 8)),
    *(Point("bits", bits) for bits in (8, 4, 3, 2)),
    *(Point("sparse8", share) for share in (0.9, 0.95)),
)
# where methods differ: at fewer zeros, and with more channels, all of them are as good as the dense model
MAIN = (
    Point("zeros", 0.95),
    Point("zeros", 0.98),
    Point("macs", 8),
    Point("bits", 8),
    Point("bits", 4),
    Point("bits", 2),
)
DENSE = Point("dense", 0)

# learning rates in units of the task's own, by kind of point: as many for each method
FACTORS: Mapping[str, tuple[float, ...]] = {
    "zeros": (1.0, 2.0, 4.0),
    "macs": (1.0, 2.0, 4.0),
    "bits": (0.5, 1.0, 2.0),
    "sparse8": (1.0, 2.0, 4.0),
    "dense": (1.0,),
}
SEEDS, MORE_SEEDS = 3, 5


@dataclass(frozen=True)
class Trial:
    """One training of one method.

    Args:
        task: Name of the task.
        kind: Of the point.
        amount: Of the point.
        method: Name of the method.
        seed: Of the dense model, and of the batches.
        factor: Learning rate in units of the task's.
        cut: Whether it is trained on five sixths of the training part and measured on the last.
    """

    task: str
    kind: str
    amount: float
    method: str
    seed: int
    factor: float = 1.0
    cut: bool = False

    @property
    def point(self) -> Point:
        """What is asked."""
        return Point(self.kind, self.amount)

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


Outcome = Mapping[str, Any]  # of a trial: see experiments/trial.py


def methods_of(point: Point, only: Sequence[str] = ()) -> list[str]:
    """The methods that have a point: ours, then the peers, then the controls."""
    order = {"ours": 0, "peer": 1, "control": 2}
    found = [
        (order[method.role], name)
        for (name, kind), method in METHODS.items()
        if kind == point.kind and (not method.amounts or point.amount in method.amounts)
    ]
    return [name for _, name in sorted(found, key=lambda pair: pair[0]) if not only or name in only]


def tuning_trials(task: str, point: Point, method: str, cuts: int = 1) -> list[Trial]:
    """On the cuts of the first seeds, one for each learning rate; none where there is no rate."""
    if not METHODS[method, point.kind].tuned:
        return []
    rates = FACTORS[point.kind]
    return [Trial(task, *point, method, cut, factor, cut=True) for cut in range(cuts) for factor in rates]


def best_factor(tuned: Mapping[Trial, Outcome], higher: bool) -> float:
    """The learning rate with the best mean metric on the cuts; the lowest of those that are alike.

    One that failed on a cut is out. 1 where none was tried.
    """
    failed = {trial.factor for trial, outcome in tuned.items() if outcome["failure"]}
    found: dict[float, list[float]] = {}
    for trial, outcome in tuned.items():
        if trial.factor not in failed:
            found.setdefault(trial.factor, []).append(outcome["trained"])
    worth = {factor: mean(values) * (1 if higher else -1) for factor, values in found.items()}
    return max(sorted(worth), key=worth.__getitem__, default=1.0)


def final_trials(task: str, point: Point, method: str, factor: float, seeds: int = SEEDS) -> list[Trial]:
    """On the whole training part."""
    return [Trial(task, *point, method, seed, factor) for seed in range(seeds)]


class Compared(NamedTuple):
    """One method beside another on the same seeds.

    Args:
        verdict: Whether the first is better.
        difference: Mean by how much, in the metric's unit; more is better for the first, whichever way the metric goes.
        error: Standard error of that mean; nan for one seed.
        seeds: Number of pairs.
    """

    verdict: Literal["win", "tie", "loss"]
    difference: float
    error: float
    seeds: int


def compare(first: Mapping[int, float], second: Mapping[int, float], higher: bool, least: float) -> Compared:
    """Metrics by seed of two methods; seeds of one alone do not count.

    Example:
        >>> compare({0: 98.0, 1: 97.5, 2: 98.2}, {0: 96.9, 1: 96.6, 2: 97.0}, higher=True, least=0.3).verdict
        'win'
        >>> compare({0: 98.0, 1: 97.0, 2: 98.2}, {0: 97.9, 1: 97.6, 2: 98.0}, higher=True, least=0.3).verdict
        'tie'
    """
    sign = 1 if higher else -1
    differences = [sign * (first[seed] - second[seed]) for seed in sorted(first.keys() & second.keys())]
    middle = mean(differences)
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    told_apart = len(differences) > 1 and abs(middle) > max(2 * error, least)
    return Compared(("win" if middle > 0 else "loss") if told_apart else "tie", middle, error, len(differences))


def are_close(first: Mapping[int, float], second: Mapping[int, float]) -> bool:
    """Whether two methods lie within two standard errors of their difference, so that more seeds are due."""
    compared = compare(first, second, higher=True, least=0.0)
    return compared.seeds < MORE_SEEDS and abs(compared.difference) <= 2 * compared.error


def deployed(outcomes: Iterable[tuple[Trial, Outcome]]) -> dict[int, float]:
    """By seed, the metric of the file; of the model where it has none. Trials that failed are left out."""
    found = {}
    for trial, outcome in outcomes:
        if not outcome["failure"]:
            metric = outcome["deployed"]
            found[trial.seed] = outcome["trained"] if metric is None else metric
    return found
