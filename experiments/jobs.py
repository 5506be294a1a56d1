"""Trainings as rows of a benchmark: what is trained, in which processes, and at which learning rate."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.progress import track
from torch import nn

from experiments.peers.lightning_pruning import model_pruning
from experiments.peers.plain import global_magnitude, naive_ternary, random_pruning, uniform_magnitude
from experiments.peers.torch_prune import one_shot
from experiments.peers.torch_pruning import global_group_norm, group_norm
from experiments.recipes import DISTILLED, OURS, QUANTIZED, STRUCTURED_OURS
from experiments.tasks import TASKS, Data, Task
from experiments.training import Budget, accuracy, dense, kept, num_macs, quiet, train, weights_of
from lightning_compress.quantization.fake_quant import activations, weights

__all__ = [
    "DENSE",
    "FACTORS",
    "METHODS",
    "MORE",
    "PEERS",
    "QUANTIZED_PEERS",
    "SMALL",
    "STRUCTURED_PEERS",
    "Job",
    "Run",
    "best_factors",
    "do",
    "load",
    "plain",
    "pool",
    "task_arguments",
    "trained",
]

FACTORS = (1.0, 2.0, 4.0)
DENSE, MORE, SMALL = "dense", "dense + C", "small dense"
FAILED = 20.0  # per cent: a network that has collapsed

PEERS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {
    "global magnitude": global_magnitude,
    "uniform magnitude": uniform_magnitude,
    "one-shot (torch.nn.utils.prune)": one_shot,
    "Lightning ModelPruning": model_pruning,
    "random": random_pruning,
}
STRUCTURED_PEERS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {
    "torch-pruning GroupMagnitude": group_norm,
    "torch-pruning GroupMagnitude, global": global_group_norm,
}
QUANTIZED_PEERS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {"naive_ternary": naive_ternary}

METHODS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {
    **OURS,
    **PEERS,
    MORE: dense,
    **STRUCTURED_OURS,
    **STRUCTURED_PEERS,
    **QUANTIZED,
    **QUANTIZED_PEERS,
    **DISTILLED,
}


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        task: Name of the task.
        method: Name of the method. ``"dense"`` trains the model that the others start from; ``"small dense"`` a narrow
            one, no larger than what pruning leaves, for as many epochs as dense and compressed training together.
        target: Share of weights dropped below 1; how many times fewer multiplications above.
        factor: Learning rate in units of the task's.
        seed: Seed of initial weights and batches.
        cut: Train on five sixths of the training part and measure on the last.
        data: Folder of the data.
        folder: Where the dense models are kept.
    """

    task: str
    method: str
    target: float
    factor: float
    seed: int
    cut: bool
    data: Path
    folder: Path


@dataclass(frozen=True)
class Run:
    """What became of a job: accuracy in per cent, what was reached of the target, what went wrong, learned scales."""

    job: Job
    accuracy: float
    reached: float
    seconds: float
    failure: str = ""
    smallest_scale: float = math.nan


@cache
def load(task: str, folder: Path) -> Data:
    """A task's data, read once."""
    return TASKS[task].load(folder)


def trained(task: Task, seed: int, data: Data, folder: Path, cut: bool = False) -> nn.Module:
    """The dense model of a task and seed, from its file where there is one."""
    torch.manual_seed(seed)
    budget = Budget(task, data, seed, task.epochs, task.learning_rate)
    path = folder / f"{task.name}-{seed}{'-cut' if cut else ''}.pt"
    return kept(path, task.build, lambda model: train(model, budget))


def _small(task: Task, target: float, example: torch.Tensor) -> nn.Module:
    """The widest model that is no larger than what the target leaves: in weights, or in multiplications above 1."""
    whole, allowed = task.build(), 1 - target if target < 1 else 1 / target

    def size(model: nn.Module) -> int:
        return num_macs(model, example) if target > 1 else sum(w.numel() for w in weights_of(model))

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if size(task.build(middle)) <= allowed * size(whole) else (low, middle)
    return task.build(low)


def do(job: Job) -> Run:
    """Train and measure."""
    task, begin = TASKS[job.task], time.perf_counter()
    data = load(job.task, job.data)
    data, example = data.cut(job.seed) if job.cut else data, data.x_train[:1]
    try:
        if job.method == DENSE:
            model = trained(task, job.seed, data, job.folder, job.cut)
        elif job.method == SMALL:
            torch.manual_seed(job.seed)
            model = _small(task, job.target, example)
            epochs = task.epochs + task.compress_epochs
            train(model, Budget(task, data, job.seed, epochs, task.learning_rate * job.factor))
        else:
            seed = job.seed + 1000  # other batches than the dense training's
            budget = Budget(task, data, seed, task.compress_epochs, task.compress_rate * job.factor)
            dense_model = trained(task, job.seed, data, job.folder, job.cut)
            model = METHODS[job.method](dense_model, budget, job.target)
        result = accuracy(model, data)
        reached = _reached(model, task, job.target, example)
    except Exception as error:  # a method that breaks is a row of the table, not the end of it
        return Run(job, math.nan, math.nan, time.perf_counter() - begin, f"{type(error).__name__}: {error}")
    broken = "" if result >= FAILED else "collapsed"
    return Run(job, result, reached, time.perf_counter() - begin, broken, smallest_scale(model))


def smallest_scale(model: nn.Module) -> float:
    """The smallest of the scales that a quantized model learned; nan if it learned none."""
    quantizers = [q for m in model.modules() for q in (*weights(m).values(), *activations(m))]
    logs = [q.logarithms["scale"].detach().min() for q in quantizers if "scale" in q.logarithms]
    return float(torch.stack(logs).min().exp()) if logs else math.nan


def _reached(model: nn.Module, task: Task, target: float, example: torch.Tensor) -> float:
    """Share of the dense model's weights that are zero or gone; or how many times fewer multiplications."""
    whole = task.build()
    if target > 1:
        return num_macs(whole, example) / num_macs(model, example)
    left = sum(int(torch.count_nonzero(w)) for w in weights_of(model))
    return 1 - left / sum(w.numel() for w in weights_of(whole))


def task_arguments(parser: argparse.ArgumentParser) -> None:
    """What benchmarks of the tasks are asked: which tasks, how many seeds and processes, and where things lie."""
    parser.add_argument("--task", choices=list(TASKS), action="append", dest="tasks", help="all without it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--data", type=Path, help="folder of mnist70k.npz and fsdd.npz")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the dense models")


Mapper = Callable[[str, Iterable[Job]], list[Run]]


@contextmanager
def pool(workers: int) -> Iterator[Mapper]:
    """Runs jobs in processes."""
    if workers == 1:
        quiet()
        yield lambda name, jobs: [do(job) for job in track(list(jobs), name)]
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet) as pool:

        def run_all(name: str, jobs: Iterable[Job]) -> list[Run]:
            todo = list(jobs)
            return list(track(pool.map(do, todo), name, total=len(todo)))

        yield run_all


def best_factors(runs: Iterable[Run]) -> dict[tuple[str, str, float], float]:
    """By task, method and target: the factor with the highest mean accuracy on the cut."""
    found: dict[tuple[str, str, float], dict[float, list[float]]] = {}
    for run in runs:
        value = 0.0 if math.isnan(run.accuracy) else run.accuracy
        key = (run.job.task, run.job.method, run.job.target)
        found.setdefault(key, {}).setdefault(run.job.factor, []).append(value)
    return {key: max(values, key=lambda factor: mean(values[factor])) for key, values in found.items()}


def plain(run: Run) -> dict[str, Any]:
    """A run as plain values."""
    job = {key: value for key, value in vars(run.job).items() if key not in ("data", "folder")}
    return {
        **job,
        "accuracy": run.accuracy,
        "reached": run.reached,
        "failure": run.failure,
        "smallest_scale": run.smallest_scale,
    }
