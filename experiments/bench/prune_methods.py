"""Every criterion, pattern, scope and schedule of ours on one task, for the method cards: what each is worth.

All start from the same trained model a seed and take the same steps on the same batches at the same rate (twice
the task's, not tuned by method); accuracy of the test part after the last epoch. Masks grow along a cubic over the
first half, if the row does not say otherwise. Patterns stand at half the weights, whole channels at
three quarters of each layer's, all others at 97 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from rich.progress import track
from torch import nn

from experiments.jobs import trained
from experiments.tasks import TASKS, data_folder
from experiments.training import Budget, accuracy, dense, fit, quiet, weights_of
from lightning_compress.callbacks import SET, GradualPruning, KnowledgeDistillation, RigL
from lightning_compress.phase import Phase
from lightning_compress.pruning import (
    LAMP,
    APoZ,
    BatchNormScale,
    Block,
    Channel,
    Constant,
    Exponential,
    Linear,
    Magnitude,
    MeanActivation,
    Movement,
    NofM,
    Random,
    Rounds,
    Taylor,
    Wanda,
)

HIGH, HALF, MOST, PHASE, SEEN = 0.97, 0.5, 0.75, Phase(0.0, 0.5), Phase(0.05, 0.5)
Callbacks = Callable[[], list[pl.Callback]]


def _prune(*args: Any, **options: Any) -> Callbacks:
    return lambda: [GradualPruning(*args, **{"phase": PHASE, **options})]


METHODS: dict[str, dict[str, Callbacks]] = {
    "criterion, 97 %": {
        "Magnitude": _prune(HIGH),
        "LAMP": _prune(HIGH, LAMP()),
        "Taylor": _prune(HIGH, Taylor(), phase=SEEN),
        "Movement": _prune(HIGH, Movement(), phase=SEEN),
        "Wanda": _prune(HIGH, Wanda(), phase=SEEN),
        "Random": _prune(HIGH, Random()),
    },
    "scope, 97 %": {
        "layer": _prune(HIGH, scope="layer"),
        "erk": _prune(HIGH, scope="erk"),
        "global, last layer dense": _prune(HIGH, keep_last=True),
    },
    "schedule, 97 %": {
        "Constant": _prune(Constant(HIGH), phase=Phase(0.0, 0.01)),
        "Linear": _prune(Linear(HIGH)),
        "Exponential": _prune(Exponential(HIGH)),
        "Rounds(num=4)": _prune(Rounds(HIGH, num=4), phase=Phase(0.05, 0.65)),
        "Rounds(num=4), rewound": _prune(Rounds(HIGH, num=4), phase=Phase(0.05, 0.65), rewind=0.05),
    },
    "dynamic sparse training, 97 %": {
        "RigL": lambda: [RigL(HIGH, every=20)],
        "SET": lambda: [SET(HIGH, every=20)],
    },
    "distillation, 97 %": {
        "Magnitude + KnowledgeDistillation": lambda: [*_prune(HIGH)(), KnowledgeDistillation()],
        "LAMP + KnowledgeDistillation": lambda: [*_prune(HIGH, LAMP())(), KnowledgeDistillation()],
    },
    "pattern, 50 %": {
        "Element": _prune(HALF),
        "NofM(2, 4)": _prune(pattern=NofM(2, 4)),
        "NofM(4, 8)": _prune(pattern=NofM(4, 8)),
        "Block(4, 4)": _prune(HALF, pattern=Block(4, 4)),
        "Block(16, 1)": _prune(HALF, pattern=Block(16, 1)),
    },
    "criterion with Channel, 75 % of each layer": {
        "MeanActivation": _prune(MOST, MeanActivation(), Channel(), scope="layer", phase=SEEN, keep_last=True),
        "APoZ": _prune(MOST, APoZ(), Channel(), scope="layer", phase=SEEN, keep_last=True),
        "BatchNormScale": _prune(MOST, BatchNormScale(), Channel(), scope="layer", phase=SEEN, keep_last=True),
        "Taylor": _prune(MOST, Taylor(), Channel(), scope="layer", phase=SEEN, keep_last=True),
        "Magnitude": _prune(MOST, Magnitude(), Channel(), scope="layer", keep_last=True),
        "Random": _prune(MOST, Random(), Channel(), scope="layer", keep_last=True),
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to run, and where data and trained models lie."""
    parser.add_argument("--task", choices=list(TASKS), default="mnist1d")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder of mnist70k.npz and fsdd.npz")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the dense models")


def run(
    task: str = "mnist1d", seeds: int = 3, data: Path | None = None, folder: Path = Path("outputs/bench")
) -> dict[str, Any]:
    """Headline: by method, mean accuracy in per cent."""
    quiet()
    chosen, where = TASKS[task], data_folder(data)
    loaded = chosen.load(where)
    cells = [
        ("-", "dense, trained on", None),
        *((g, n, made) for g, rows in METHODS.items() for n, made in rows.items()),
    ]
    rows = []
    for group, name, made in track(cells, "methods"):
        results, zeros, error = [], [], ""
        for seed in range(seeds):
            model = trained(TASKS[task], seed, loaded, folder)
            budget = Budget(chosen, loaded, seed + 1000, chosen.compress_epochs, 2 * chosen.compress_rate)
            try:
                model = dense(model, budget, 0.0) if made is None else fit(model, budget, made())
                results.append(accuracy(model, loaded))
                zeros.append(_sparsity(model))
            except ValueError as refused:  # a method that this model does not take
                error = str(refused).split(":")[-1].strip()
        deviation = stdev(results) if len(results) > 1 else 0.0
        rows.append(
            {"what": group, "method": name, "accuracy": mean(results or [0.0]), "sd": deviation}
            | {"sparsity": mean(zeros or [0.0]), "refused": error}
        )
    return {"headline": {f"{row['what']}: {row['method']}": row["accuracy"] for row in rows}, "rows": rows}


def _sparsity(model: nn.Module) -> float:
    weights = weights_of(model)
    return 1 - sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)
