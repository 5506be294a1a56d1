"""Carries out one trial: train, write the file, run it, weigh it, time it.

``python -m experiments.trial`` does so for each line of JSON on its standard input, and answers with a line, so that a
method whose package cannot live with the others runs in an environment of its own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import experiments.foreign  # noqa: F401  # before anything that imports torchvision
from experiments.arena import TASKS
from experiments.methods import METHODS
from experiments.protocol import Trial
from experiments.reached import most_values, reached, what_is_missing
from experiments.shipping import open_file, weigh, write_onnx
from experiments.tasks import Data, Task
from experiments.training import Budget, kept, measured, quiet, train
from lightning_compress.deploy.timing import time_together

__all__ = ["carry_out", "dense_model"]


@cache
def _data(task: str, folder: Path, cut: int | None) -> Data:
    if cut is not None:
        return _data(task, folder, None).cut(cut)
    return TASKS[task].load(folder)


def dense_model(task: Task, seed: int, data: Data, sources: Path, folder: Path, cut: bool) -> nn.Module:
    """The model that every method of a seed starts from, from its file where there is one."""
    budget = Budget(task, data, seed, task.epochs, task.learning_rate)

    def make(model: nn.Module) -> nn.Module:
        if task.weights is not None:
            model.load_state_dict(task.weights(sources))
        return train(model, budget)

    torch.manual_seed(seed)
    return kept(folder / f"{task.name}-{seed}{'-cut' if cut else ''}.pt", task.build, make)


def _named(address: str) -> Callable[..., Any]:
    module, _, name = address.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _digest(model: nn.Module) -> str:
    """Tells dense models apart: pairs are of the same one."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _ship(model: nn.Module, start: nn.Module, trial: Trial, data: Data) -> dict[str, Any]:
    """What the file is worth, its milliseconds at batch 1 in turn with those of the dense model's."""
    task, example = TASKS[trial.task], data.x_test[:2].contiguous()
    write = _named(METHODS[trial.method, trial.kind].write)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(write(model, example, Path(folder)))
        (beside := Path(folder) / "dense").mkdir()
        shipped, dense = open_file(path), open_file(write_onnx(start, example, beside))
        one = example[:1]
        ms, ms_dense = (timed.ms for timed in time_together([lambda: shipped(one), lambda: dense(one)], 0.5))
        size, packed = weigh(path)
        metric = measured(shipped, task.metric, data)
        shipped_as = {"bytes": size, "zstd": packed, "ms": round(ms, 4), "ms_dense": round(ms_dense, 4)}
        # a small dense model has the bytes of so many bits, and float weights
        has_bits = trial.kind == "bits" and METHODS[trial.method, trial.kind].role != "control"
        values = most_values(path, example) if has_bits else None
    return {"deployed": metric, **shipped_as, "values": values, "file": path.suffix[1:]}


def carry_out(trial: Trial, data_folder: Path, folder: Path) -> dict[str, Any]:
    """Metrics of the trained model and of its file, and what was reached. What breaks is told, not raised."""
    task, method = TASKS[trial.task], METHODS[trial.method, trial.kind]
    outcome: dict[str, Any] = dict.fromkeys(("trained", "deployed", "zeros", "macs"))
    outcome["failure"] = ""
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        data = _data(trial.task, data_folder, trial.seed if trial.cut else None)
        start = dense_model(task, trial.seed, data, data_folder, folder, trial.cut)
        outcome["start"] = _digest(start)
        model = copy.deepcopy(start)
        # other batches than the dense training's
        budget = Budget(task, data, trial.seed + 1000, task.compress_epochs, task.compress_rate * trial.factor)
        begin, cpu = time.perf_counter(), time.process_time()
        model = _named(method.train)(model, budget, trial.amount).eval()
        outcome["trained"] = measured(model, task.metric, data)
        outcome |= reached(model, start, data.x_test[:1].contiguous())
        if not trial.cut:
            outcome |= _ship(model, start, trial, data)
        outcome["failure"] = what_is_missing(trial.point, outcome)
    except Exception as error:  # a method that breaks is a row of the table, not its end
        outcome["failure"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if outcome["trained"] is not None and not math.isfinite(outcome["trained"]):
        outcome |= {"failure": "the metric is not finite", "trained": None, "deployed": None}
    outcome["seconds"] = round(time.perf_counter() - begin, 1)
    outcome["cpu_seconds"] = round(time.process_time() - cpu, 1)
    outcome["version"] = metadata.version(method.package)
    return outcome


def main() -> None:
    """Answers until its input ends."""
    quiet()
    answers = sys.stdout
    sys.stdout = sys.stderr  # what tools print is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        outcome = carry_out(Trial(**asked["trial"]), Path(asked["data"]), Path(asked["folder"]))
        print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
    main()
