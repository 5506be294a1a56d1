"""What pruning costs on a speaker that nobody trained on, with and without a teacher: spoken digits, leave one out.

For each of the six speakers a dense model is trained on the other five, without their first five takes of each digit,
which are the known test part; all clips of the speaker left out are the strange one. Every method starts from that
model and takes the same steps on the same batches at the same rate. Mean over the speakers left out; the error is that
of the mean difference from plain magnitude, speaker by speaker.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from experiments.peers.plain import global_magnitude
from experiments.tasks import TASKS, Data, data_folder, mfcc, read
from experiments.training import Budget, accuracy, fit, kept, quiet, train
from lightning_compress import Phase
from lightning_compress.callbacks import GradualPruning, KnowledgeDistillation
from lightning_compress.pruning import LAMP, Criterion, Magnitude

TASK = TASKS["fsdd"]
PLAIN = "global magnitude by hand"

Method = Callable[[nn.Module, Budget, float], nn.Module]


def _pruned(criterion: Criterion, *teacher: KnowledgeDistillation) -> Method:
    """Our pruning, with a teacher if there is one."""

    def method(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
        prune = GradualPruning(sparsity, criterion, phase=Phase(0.0, 0.5), every=10)
        return fit(model, budget, [prune, *copy.deepcopy(teacher)])

    return method


METHODS: dict[str, Method] = {
    PLAIN: global_magnitude,
    "magnitude": _pruned(Magnitude()),
    "half LAMP": _pruned(LAMP(power=0.5)),
    "magnitude, teacher": _pruned(Magnitude(), KnowledgeDistillation(temperature=4.0)),
    "quarter LAMP, teacher": _pruned(LAMP(power=0.25), KnowledgeDistillation(temperature=4.0)),
    "half LAMP, teacher": _pruned(LAMP(power=0.5), KnowledgeDistillation(temperature=4.0)),
    **{
        f"half LAMP, teacher of alpha {alpha:g}, temperature {temperature:g}": _pruned(
            LAMP(power=0.5), KnowledgeDistillation(alpha=alpha, temperature=temperature)
        )
        for alpha in (0.5, 0.9)
        for temperature in (1.0, 2.0, 4.0)
        if (alpha, temperature) != (0.9, 4.0)
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --folder, --method, --sparsity, --factor, --seeds."""
    parser.add_argument("--data", type=Path, help="folder of fsdd.npz")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the dense models")
    parser.add_argument("--method", choices=list(METHODS), action="append", dest="methods", help="all without it")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--factor", type=float, default=2.0, help="learning rate of every method, in the task's own")
    parser.add_argument("--seeds", type=int, default=1)


def without(folder: Path) -> dict[str, Data]:
    """By speaker left out: the others' clips to train and test on, and that one's as the strange part."""
    file = read(folder, "fsdd.npz", "the Free Spoken Digit Dataset as an npz of x, y digit, s speaker, i take")
    clips, y = mfcc(torch.from_numpy(file["x"])), torch.from_numpy(file["y"]).long()
    late = torch.from_numpy(file["i"] >= 5)
    found = {}
    for name in sorted(set(file["s"].tolist())):
        strange = torch.from_numpy(file["s"] == name)
        train, test = late & ~strange, ~late & ~strange
        x = ((clips - clips[train].mean((0, 1))) / clips[train].std((0, 1))).unsqueeze(1)
        found[name] = Data(x[train], y[train], x[test], y[test], x[strange], y[strange])
    return found


def measure(model: nn.Module, data: Data) -> tuple[float, float]:
    """Per cent of the known speakers' test clips, and of the strange speaker's."""
    assert data.x_strange is not None
    assert data.y_strange is not None
    return accuracy(model, data), accuracy(model, replace(data, x_test=data.x_strange, y_test=data.y_strange))


def row(name: str, found: Sequence[tuple[float, float]], beside: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Means, and by how much the strange part is better than plain magnitude's."""
    gains = [one[1] - other[1] for one, other in zip(found, beside, strict=True)]
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return {
        "method": name,
        "known": mean(known for known, _ in found),
        "strange": mean(strange for _, strange in found),
        "beside plain": mean(gains),
        "error": error,
        "each": " ".join(f"{strange:.1f}" for _, strange in found),
    }


def run(
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
    methods: list[str] | None = None,
    sparsity: float = 0.9,
    factor: float = 2.0,
    seeds: int = 1,
) -> dict[str, Any]:
    """Headline: accuracy on strange speakers by method."""
    quiet()
    parts = without(data_folder(data))
    names = [PLAIN, *(name for name in methods or METHODS if name != PLAIN)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("dense", *names)}
    for seed in range(seeds):
        for speaker, part in parts.items():
            torch.manual_seed(seed)
            make = partial(train, budget=Budget(TASK, part, seed, TASK.epochs, TASK.learning_rate))
            dense = partial(kept, folder / f"fsdd-without-{speaker}-{seed}.pt", TASK.build, make)
            found["dense"].append(measure(dense(), part))
            budget = Budget(TASK, part, seed + 1000, TASK.compress_epochs, TASK.compress_rate * factor)
            for name in names:
                found[name].append(measure(METHODS[name](dense(), budget, sparsity), part))
            last = ", ".join(f"{k} {v[-1][0]:.1f} {v[-1][1]:.1f}" for k, v in found.items())
            print(f"without {speaker}: {last}", flush=True)
    rows = [row(name, runs, found[PLAIN]) for name, runs in found.items()]
    return {"headline": {one["method"]: one["strange"] for one in rows}, "rows": rows}
