"""Accuracy after pruning: ours beside its peers on three tasks, from the same trained models and in the same budget.

A dense model is trained once a task and seed. From there every method takes the same steps on the same batches. The
learning rate of every method is the best of 1x, 2x and 4x the task's on a sixth of the training part, for each
operating point (from dense models that never saw that sixth); then it is trained on the whole training part and tested
once, after the last epoch. Sparsity counts the weights of all linear and convolution layers, first and last included.
On the curve a method takes the rate of the nearest operating point, and random pruning everywhere that of magnitude.
Small dense models, which collapse at high rates, are tuned among 1/4, 1/2 and 1x the dense training's.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.jobs import (
    DENSE,
    FACTORS,
    MORE,
    PEERS,
    SMALL,
    STRUCTURED_PEERS,
    Job,
    Run,
    best_factors,
    load,
    plain,
    pool,
    task_arguments,
)
from experiments.recipes import OURS, STRUCTURED_OURS
from experiments.tasks import TASKS, data_folder

OF_SMALL = (0.25, 0.5, 1.0)
CURVE = (0.8, 0.9, 0.95, 0.98, 0.99)
ON_CURVE = ("ours", "global magnitude", "random", SMALL)
FEWER_MACS = 4.0
FLOOR, ITS_RATE_FROM = "random", "global magnitude"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to run, and where data and trained models lie."""
    task_arguments(parser)
    parser.add_argument("--tune-seeds", type=int, default=3, help="seeds on which learning rates are chosen")
    parser.add_argument("--method", action="append", dest="methods", help="only these beside ours; all without it")
    parser.add_argument("--no-curve", action="store_false", dest="curve", help="the operating points alone")
    parser.add_argument("--structured", action="store_true", help="channels, at 4x fewer multiplications, instead")


def _row(runs: list[Run], tuned: bool) -> dict[str, Any]:
    """One line of the table."""
    job, results = runs[0].job, [run.accuracy for run in runs]
    target = {DENSE: "-", MORE: "-"}.get(job.method, f"{job.target:g}x" if job.target > 1 else f"{job.target:g}")
    return {
        "task": job.task,
        "method": job.method,
        "target": target,
        "accuracy": mean(results),
        "sd": stdev(results) if len(results) > 1 else math.nan,
        "rate": f"{job.factor:g}x" + ("" if tuned else " (untuned)") if job.method != DENSE else "-",
        "reached": mean(run.reached for run in runs) if target != "-" else math.nan,
        "failed": sum(bool(run.failure) for run in runs),
        "seconds": mean(run.seconds for run in runs),
    }


def run(  # noqa: PLR0913  # the options of the command
    tasks: list[str] | None = None,
    seeds: int = 3,
    tune_seeds: int = 3,
    methods: list[str] | None = None,
    curve: bool = True,
    structured: bool = False,
    workers: int = 2,
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
) -> dict[str, Any]:
    """Headline: by task and operating point, ours and the best peer, mean and sample deviation over the seeds."""
    names = tasks or list(TASKS)
    pool_of = [*STRUCTURED_OURS, *STRUCTURED_PEERS] if structured else [*OURS, *PEERS, MORE]
    chosen = [name for name in pool_of if not methods or name in methods or name.startswith("ours")] + [SMALL]
    points: dict[str, tuple[float, ...]] = {
        name: (FEWER_MACS,) if structured else TASKS[name].sparsities for name in names
    }
    curve = curve and not structured
    base = Job("", DENSE, 0.0, 1.0, 0, False, data_folder(data), folder)
    for name in names:
        load(name, base.data)  # what is missing is said before anything is trained

    def jobs(name: str, method: str, target: float, factor: float, num: int, cut: bool) -> list[Job]:
        job = replace(base, task=name, method=method, target=target, factor=factor, cut=cut)
        return [replace(job, seed=seed) for seed in range(num)]

    def targets(name: str, method: str) -> tuple[float, ...]:
        return (0.0,) if method == MORE else points[name]

    with pool(workers) as run_all:
        todo = [job for name in names for job in jobs(name, DENSE, 0.0, 1.0, tune_seeds, True)]
        start = [job for name in names for job in jobs(name, DENSE, 0.0, 1.0, seeds, False)]
        denses = run_all("dense models", [*todo, *start])[len(todo) :]
        todo = [
            job
            for name in names
            for method in chosen
            if method != FLOOR or ITS_RATE_FROM not in chosen
            for target in targets(name, method)
            for factor in (OF_SMALL if method == SMALL else FACTORS)
            for job in jobs(name, method, target, factor, tune_seeds, True)
        ]
        tuning = run_all("learning rates", todo)
        best = best_factors(tuning)
        asked = [(name, method, target, best[name, method, target], True) for name, method, target in best]
        if FLOOR in chosen and ITS_RATE_FROM in chosen:
            best |= {(n, FLOOR, t): factor for (n, method, t), factor in best.items() if method == ITS_RATE_FROM}
            asked += [(n, FLOOR, t, best[n, FLOOR, t], False) for n in names for t in points[n]]
        for name in names:
            extra = [t for t in CURVE if t not in points[name]] if curve else []
            for method in ON_CURVE:
                for target in extra if method in chosen else []:
                    near = min(points[name], key=lambda point: abs(math.log((1 - point) / (1 - target))))
                    asked.append((name, method, target, best[name, method, near], False))
        finals = run_all("methods", [job for a in asked for job in jobs(*a[:4], seeds, False)])
    rows = [_row(denses[i * seeds : (i + 1) * seeds], True) for i in range(len(names))]
    rows += [_row(finals[i * seeds : (i + 1) * seeds], asked[i][4]) for i in range(len(asked))]
    rows.sort(
        key=lambda row: (names.index(row["task"]), -1 if row["target"] == "-" else float(row["target"].rstrip("x")))
    )
    everything = [*denses, *tuning, *finals]
    return {
        "headline": _headline(rows, points),
        "rows": rows,
        "failures": [plain(run) for run in everything if run.failure],
        "runs": [plain(run) for run in everything],
    }


def _headline(rows: list[dict[str, Any]], points: dict[str, tuple[float, ...]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, targets in points.items():
        for target in targets:
            label = f"{target:g}x" if target > 1 else f"{target:g}"
            here = [row for row in rows if row["task"] == name and row["target"] == label]
            peers = [row for row in here if row["method"] in {**PEERS, **STRUCTURED_PEERS}]
            ours = [row for row in here if row["method"].startswith("ours")]
            for key, those in (("ours", ours), ("best_peer", peers)):
                if those:
                    best = max(those, key=lambda row: row["accuracy"])
                    found |= {f"{name}@{label}_{key}": best["accuracy"], f"{name}@{label}_{key}_sd": best["sd"]}
    return found
