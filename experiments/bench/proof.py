"""Ours beside every peer: tasks by operating points, from the files that ship. The protocol is experiments/protocol.py.

Goes on where it was stopped: trials that are in the file of results are not run again, unless --again says so. Without
options it is the main table; --hours ends it early. Prints what it ran and the cells that are whole.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.arena import MAIN_TASKS, TASKS
from experiments.protocol import (
    DENSE,
    MAIN,
    MORE_SEEDS,
    POINTS,
    SEEDS,
    Point,
    Trial,
    are_close,
    best_factor,
    compare,
    deployed,
    final_trials,
    methods_of,
    tuning_trials,
)
from experiments.records import Records, said
from experiments.tasks import data_folder
from experiments.workers import missing_environments, run_trials

OURS = "ours"
RESULTS = Path("experiments/results/proof.json")


def point_of(words: str) -> Point:
    """A point as it is named on the command line: ``zeros=0.95``."""
    kind, _, amount = words.partition("=")
    point = Point(kind, float(amount))
    if point not in POINTS:
        accepted = ", ".join(f"{kind}={amount:g}" for kind, amount in POINTS)
        raise argparse.ArgumentTypeError(f"no point {words!r}; there are {accepted}")
    return point


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cells, and for how long."""
    parser.add_argument("--task", choices=list(TASKS), action="append", dest="tasks", help="the main four without it")
    parser.add_argument("--point", type=point_of, action="append", dest="points", help="such as zeros=0.95, bits=4")
    parser.add_argument("--method", action="append", dest="methods", help="only these; all without it")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--more-seeds", action="store_true", help="two more where methods are close")
    parser.add_argument("--again", action="store_true", help="also what is in the file of results")
    parser.add_argument("--hours", type=float, default=math.inf, help="begins no trial after them")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--data", type=Path, help="folder of the data")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the dense models")
    parser.add_argument("--results", type=Path, default=RESULTS)


class _Bench:
    """What is to be run, in stages: each follows from the outcomes of the one before."""

    def __init__(self, records: Records, names: list[str], points: list[Point], methods: list[str], seeds: int) -> None:
        self.records, self.names, self.seeds = records, names, seeds
        self.cells = [
            (name, point, method) for name, point in product(names, points) for method in methods_of(point, methods)
        ]

    def factor(self, task: str, point: Point, method: str) -> float:
        """The learning rate that was best on the cut."""
        tuned = {t: self.records.outcomes[t] for t in tuning_trials(task, point, method) if t in self.records.outcomes}
        return best_factor(tuned, TASKS[task].metric.higher)

    def finals(self, task: str, point: Point, method: str, seeds: int) -> list[Trial]:
        """On the whole training part, at that rate."""
        return final_trials(task, point, method, self.factor(task, point, method), seeds)

    def by_seed(self, task: str, point: Point, method: str) -> dict[int, float]:
        """The metric of the files."""
        trials = self.finals(task, point, method, MORE_SEEDS)
        return deployed((trial, self.records.outcomes[trial]) for trial in trials if trial in self.records.outcomes)

    def dense(self) -> list[Trial]:
        """The control that only trains on."""
        control = "dense trained on"
        return [trial for name in self.names for trial in final_trials(name, DENSE, control, 1.0, self.seeds)]

    def tuning(self) -> list[Trial]:
        """On the cut."""
        return [trial for cell in self.cells for trial in tuning_trials(*cell)]

    def all_finals(self) -> list[Trial]:
        """Of every cell."""
        return [trial for cell in self.cells for trial in self.finals(*cell, self.seeds)]

    def closer(self) -> list[Trial]:
        """More seeds of ours and of those that are close to it."""
        trials: list[Trial] = []
        for task, point, method in self.cells:
            ours, other = self.by_seed(task, point, OURS), self.by_seed(task, point, method)
            if method != OURS and len(ours.keys() & other.keys()) > 1 and are_close(ours, other):
                trials += [*self.finals(task, point, OURS, MORE_SEEDS), *self.finals(task, point, method, MORE_SEEDS)]
        return list(dict.fromkeys(trials))

    def rows(self) -> list[dict[str, Any]]:
        """A row a method that has outcomes."""
        return [row for cell in self.cells if (row := self._row(*cell))]

    def _row(self, task: str, point: Point, method: str) -> dict[str, Any]:
        values, ours = self.by_seed(task, point, method), self.by_seed(task, point, OURS)
        found = [self.records.outcomes.get(trial) for trial in self.finals(task, point, method, MORE_SEEDS)]
        ran = [outcome for outcome in found if outcome]
        if not ran:
            return {}
        metric = TASKS[task].metric
        beside = len(ours.keys() & values.keys()) > 1 and method != OURS
        compared = compare(ours, values, metric.higher, metric.least) if beside else None
        last = {key: [o[key] for o in ran if o.get(key) is not None] for key in ("zstd", "trained", "deployed")}
        gap = [a - b for a, b in zip(last["deployed"], last["trained"], strict=False)]
        return {
            "task": task,
            "point": str(point),
            "method": method,
            metric.name: mean(values.values()) if values else math.nan,
            "sd": stdev(values.values()) if len(values) > 1 else math.nan,
            "seeds": len(values),
            "file - model": mean(gap) if gap else math.nan,
            "KB": mean(last["zstd"]) / 1e3 if last["zstd"] else math.nan,
            "rate": f"{self.factor(task, point, method):g}x",
            "ours is": f"{compared.difference:+.2f} +- {compared.error:.2f}, {compared.verdict}" if compared else "",
            "failed": "; ".join(sorted({o["failure"] for o in ran if o["failure"]})),
        }


def run(  # noqa: PLR0913  # the options of the command
    tasks: list[str] | None = None,
    points: list[Point] | None = None,
    methods: list[str] | None = None,
    seeds: int = SEEDS,
    more_seeds: bool = False,
    again: bool = False,
    hours: float = math.inf,
    workers: int = 2,
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Headline: how often ours wins, ties and loses against a peer or control."""
    until = time.time() + 3600 * hours
    records = Records(results, shlex.join(["python", "-m", "experiments.bench", *sys.argv[1:]]))
    bench = _Bench(records, tasks or list(MAIN_TASKS), points or list(MAIN), methods or [], seeds)
    folder.mkdir(parents=True, exist_ok=True)
    ran: set[Trial] = set()
    for stage in (bench.dense, bench.tuning, bench.all_finals, *([bench.closer] if more_seeds else [])):
        todo = [trial for trial in stage() if (again and trial not in ran) or trial not in records.outcomes]
        if absent := missing_environments(todo):
            raise SystemExit(f"Environments of peers are missing: {', '.join(absent)}. Run: make peers")
        left = len(todo)

        def done(trial: Trial, outcome: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            ran.add(trial)
            records.add(trial, outcome)
            value = outcome["failure"] or outcome["trained"]
            which = f"{trial.task}, {trial.point}, {trial.method}, {trial.factor:g}x, seed {trial.seed}"
            said(f"{which}{', cut' if trial.cut else ''}: {value} ({left} left)")

        run_trials(todo, data_folder(data), folder, workers, until, done)
    rows = bench.rows()
    verdicts = [row["ours is"].rpartition(" ")[2] for row in rows if row["ours is"]]
    spent = sum(outcome.get("cpu_seconds") or 0.0 for outcome in records.outcomes.values()) / 3600
    words = {"wins": "win", "ties": "tie", "losses": "loss"}
    counts = {name: float(verdicts.count(word)) for name, word in words.items()}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"headline": {**counts, "cpu_hours": spent}, "rows": rows, "columns": columns}
