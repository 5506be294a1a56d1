"""What a teacher is worth in the quantized regime: two-bit weights, and int8 after pruning, with and without it.

Every method starts from the dense models of ``prune_accuracy`` and takes the same steps on the same batches; the
teacher is the dense model itself. The learning rate of each is the best of 1x, 2x and 4x the task's on a sixth of the
training part. Tested is the fake-quantized model, once, after the last epoch, on the whole test part; mean and sample
deviation over the seeds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.jobs import DENSE, FACTORS, Job, Run, best_factors, load, plain, pool, task_arguments
from experiments.recipes import DISTILLED
from experiments.tasks import TASKS, data_folder

SPARSITIES = (0.95, 0.99)
TEACHER = " + teacher"


add_arguments = task_arguments


def _cell(runs: list[Run]) -> str:
    values = [run.accuracy for run in runs]
    return f"{mean(values):.2f} +- {stdev(values) if len(values) > 1 else math.nan:.2f}"


def run(
    tasks: list[str] | None = None,
    seeds: int = 3,
    workers: int = 2,
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
) -> dict[str, Any]:
    """Headline: by task and method, the mean alone and taught."""
    names = tasks or list(TASKS)
    base = Job("", DENSE, 0.0, 1.0, 0, False, data_folder(data), folder)
    for name in names:
        load(name, base.data)  # what is missing is said before anything is trained
    asked = [
        (name, method, target)
        for name in names
        for method in DISTILLED
        for target in (SPARSITIES if method.startswith("sparse") else (0.0,))
    ]

    def jobs(key: tuple[str, str, float], factor: float, num: int, cut: bool) -> list[Job]:
        job = replace(base, task=key[0], method=key[1], target=key[2], factor=factor, cut=cut)
        return [replace(job, seed=seed) for seed in range(num)]

    with pool(workers) as run_all:
        starts = [job for name in names for cut in (True, False) for job in jobs((name, DENSE, 0.0), 1.0, seeds, cut)]
        denses = run_all("dense models", [job for job in starts if not job.cut or job.seed == 0])
        tuning = run_all("learning rates", [job for key in asked for f in FACTORS for job in jobs(key, f, 1, True)])
        best = best_factors(tuning)
        finals = run_all("methods", [job for key in asked for job in jobs(key, best[key], seeds, False)])
    of = {key: finals[i * seeds : (i + 1) * seeds] for i, key in enumerate(asked)}
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for name, method, target in asked:
        if method.endswith(TEACHER):
            continue
        label = method if target == 0 else f"{target:g} {method}"
        alone, taught = of[name, method, target], of[name, method + TEACHER, target]
        gain = mean(b.accuracy - a.accuracy for a, b in zip(alone, taught, strict=True))
        dense = mean(r.accuracy for r in denses if r.job.task == name and not r.job.cut)
        rows.append(
            {
                "task": name,
                "method": label,
                "dense": f"{dense:.2f}",
                "alone": _cell(alone),
                "taught": _cell(taught),
                "gain": gain,
                "rates": f"{alone[0].job.factor:g}x, {taught[0].job.factor:g}x",
                "failed": sum(bool(run.failure) for run in (*alone, *taught)),
            }
        )
        key = f"{name}_{label.replace(', ', '_').replace(' ', '_')}"
        headline |= {key: mean(r.accuracy for r in alone), f"{key}_taught": mean(r.accuracy for r in taught)}
    everything = [*denses, *tuning, *finals]
    failures = [plain(run) for run in everything if run.failure]
    return {"headline": headline, "rows": rows, "failures": failures, "runs": [plain(run) for run in everything]}
