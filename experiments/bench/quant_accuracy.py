"""Accuracy after quantization: every scheme on three tasks, from the same trained models and in the same budget.

Every method starts from the dense models of ``prune_accuracy`` and takes the same steps on the same batches. All linear
and convolution layers are quantized, first and last included; activations have 8 bits, and 4 in lsq4, whose steps are
learned at the rate of the weights. The learning rate of ``ternary``, our recipe, and of ``naive_ternary``, its peer,
is the best of 1x, 2x and 4x the task's on a sixth of the training part; that of the others is the task's. Tested is the
fake-quantized model, once, after the last epoch, on the whole test part.
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
    QUANTIZED_PEERS,
    Job,
    Run,
    best_factors,
    load,
    plain,
    pool,
    task_arguments,
)
from experiments.recipes import QUANTIZED
from experiments.tasks import TASKS, data_folder

TUNED = ("ternary", *QUANTIZED_PEERS)
SCHEMES = (MORE, *QUANTIZED_PEERS, *QUANTIZED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to run, and where data and trained models lie."""
    task_arguments(parser)
    parser.add_argument("--scheme", choices=SCHEMES, action="append", dest="schemes", help="all without it")
    parser.add_argument("--tune-seeds", type=int, default=1, help="seeds on which learning rates are chosen")


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan


def _row(runs: list[Run], denses: list[Run]) -> dict[str, Any]:
    """One line of the table; what was lost is the mean over the seeds, each beside its own dense model."""
    job, results = runs[0].job, [run.accuracy for run in runs]
    rate = f"{job.factor:g}x" + ("" if job.method in TUNED else " (untuned)")
    return {
        "task": job.task,
        "scheme": job.method,
        "accuracy": mean(results),
        "sd": _spread(results),
        "lost": mean(dense.accuracy - run.accuracy for dense, run in zip(denses, runs, strict=True)),
        "rate": "-" if job.method == DENSE else rate,
        "smallest scale": min(run.smallest_scale for run in runs),
        "failed": sum(bool(run.failure) for run in runs),
        "seconds": mean(run.seconds for run in runs),
    }


def run(
    tasks: list[str] | None = None,
    schemes: list[str] | None = None,
    seeds: int = 3,
    tune_seeds: int = 1,
    workers: int = 2,
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
) -> dict[str, Any]:
    """Headline: by task and scheme, mean and sample deviation over the seeds, and the dense model's mean."""
    names, chosen = tasks or list(TASKS), schemes or list(SCHEMES)
    base = Job("", DENSE, 0.0, 1.0, 0, False, data_folder(data), folder)
    for name in names:
        load(name, base.data)  # what is missing is said before anything is trained

    def jobs(name: str, method: str, factor: float, num: int, cut: bool) -> list[Job]:
        job = replace(base, task=name, method=method, factor=factor, cut=cut)
        return [replace(job, seed=seed) for seed in range(num)]

    tuned = [name for name in TUNED if name in chosen]
    with pool(workers) as run_all:
        cuts = [job for name in names for job in jobs(name, DENSE, 1.0, tune_seeds, True)] if tuned else []
        whole = [job for name in names for job in jobs(name, DENSE, 1.0, seeds, False)]
        starts = run_all("dense models", [*cuts, *whole])[len(cuts) :]
        tuning = run_all(
            "learning rates",
            [j for name in names for method in tuned for f in FACTORS for j in jobs(name, method, f, tune_seeds, True)],
        )
        best = {(name, method): factor for (name, method, _), factor in best_factors(tuning).items()}
        asked = [(name, method) for name in names for method in chosen]
        finals = run_all("schemes", [j for key in asked for j in jobs(*key, best.get(key, 1.0), seeds, False)])
    rows = []
    for i, name in enumerate(names):
        denses = starts[i * seeds : (i + 1) * seeds]
        rows.append(_row(denses, denses))
        of_task = [runs for runs in _by(finals, seeds) if runs[0].job.task == name]
        rows += [_row(runs, denses) for runs in of_task]
    everything = [*starts, *tuning, *finals]
    return {
        "headline": _headline(rows),
        "rows": rows,
        "failures": [plain(run) for run in everything if run.failure],
        "runs": [plain(run) for run in everything],
    }


def _by(runs: list[Run], num: int) -> list[list[Run]]:
    return [runs[i : i + num] for i in range(0, len(runs), num)]


def _headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        key = f"{row['task']}_{row['scheme'].replace(' + C', '_more')}"
        found |= {key: row["accuracy"]} | ({} if row["scheme"] == DENSE else {f"{key}_sd": row["sd"]})
    return found
