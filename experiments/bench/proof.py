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
from pathlib import Path
from typing import Any

from experiments.arena import MAIN_TASKS, TASKS
from experiments.protocol import (
    DENSE,
    MAIN,
    POINTS,
    SEEDS,
    Point,
    Trial,
    are_close,
    final_trials,
    methods_of,
    tuning_trials,
)
from experiments.records import Records, said
from experiments.standings import CONTROL, OURS, Cell, Standings
from experiments.tasks import data_folder
from experiments.workers import missing_environments, run_trials

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


class _Stages:
    """What is to be run: each stage follows from the outcomes of the one before."""

    def __init__(self, standings: Standings, names: list[str], cells: list[tuple[str, Point, str]], seeds: int) -> None:
        self.standings, self.names, self.cells, self.seeds = standings, names, cells, seeds

    def dense(self) -> list[Trial]:
        """The control that only trains on."""
        return [trial for name in self.names for trial in final_trials(name, DENSE, CONTROL, 1.0, self.seeds)]

    def tuning(self) -> list[Trial]:
        """On the cuts."""
        return [trial for cell in self.cells for trial in tuning_trials(*cell, TASKS[cell[0]].cuts)]

    def finals(self) -> list[Trial]:
        """Of every cell."""
        return [trial for cell in self.cells for trial in self.standings.finals(*cell, self.seeds)]

    def closer(self) -> list[Trial]:
        """More seeds of ours and of those that are close to it."""
        trials: list[Trial] = []
        for task, point, method in self.cells:
            ours, other = self.standings.cell(task, point, OURS), self.standings.cell(task, point, method)
            if ours and other and other.compared and are_close(ours.values, other.values):
                trials += [*self.standings.finals(task, point, OURS), *self.standings.finals(task, point, method)]
        return list(dict.fromkeys(trials))


def _row(cell: Cell) -> dict[str, Any]:
    """A line of the table."""
    metric, compared = TASKS[cell.task].metric, cell.compared
    size, faster = cell.average("zstd"), cell.times_faster
    return {
        "task": cell.task,
        "point": str(cell.point),
        "method": cell.method,
        "metric": metric.name,
        "file": "-" if cell.mean is None else cell.mean,
        "sd": "-" if cell.sd is None else cell.sd,
        "seeds": len(cell.values),
        "file - model": "-" if cell.gap is None else round(cell.gap, 3),
        "KB": "-" if size is None else size / 1e3,
        "faster": "-" if faster is None else faster,
        "rate": f"{cell.factor:g}x",
        "ours is": f"{compared.difference:+.2f} +- {compared.error:.2f}, {compared.verdict}" if compared else "",
        "failed": "; ".join(cell.failures),
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
    standings = Standings(records)
    names, asked = tasks or list(MAIN_TASKS), points or list(MAIN)
    cells = [(name, point, method) for name in names for point in asked for method in methods_of(point, methods or [])]
    stages = _Stages(standings, names, cells, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    ran: set[Trial] = set()
    for stage in (stages.dense, stages.tuning, stages.finals, *([stages.closer] if more_seeds else [])):
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
    rows = [_row(cell) for cell in standings.cells(names, [DENSE, *asked], methods or [])]
    verdicts = [row["ours is"].rpartition(" ")[2] for row in rows if row["ours is"]]
    spent = sum(outcome.get("cpu_seconds") or 0.0 for outcome in records.outcomes.values()) / 3600
    words = {"wins": "win", "ties": "tie", "losses": "loss"}
    counts = {name: float(verdicts.count(word)) for name, word in words.items()}
    return {"headline": {**counts, "cpu_hours": spent}, "rows": rows}
