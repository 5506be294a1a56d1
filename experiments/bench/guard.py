"""How far AccuracyGuard prunes within a drop of one point, on three tasks, with and without a teacher.

The dense models are trained on five sixths of the training part; the guard, alone with its defaults, validates on the
last sixth, twice an epoch, and nothing else is chosen. At the end the test part says what the drop is there. Mean and
sample deviation over the seeds.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from rich.progress import track
from torch.utils.data import DataLoader, TensorDataset

from experiments.jobs import load, task_arguments, trained
from experiments.tasks import TASKS, Batches, Classifier, Data, Task, data_folder
from experiments.training import accuracy, quiet
from lightning_compress.analysis.inspect import sparsity, weight_layers
from lightning_compress.callbacks import AccuracyGuard, KnowledgeDistillation

MAX_DROP, TIMES = 0.01, 3  # as many epochs as three compressions take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to run, and where data and trained models lie."""
    task_arguments(parser)
    parser.add_argument("--margin", type=float, help="of the drop, kept for chance; the standard error without it")


class Validated(Classifier):
    """Logs its accuracy over the validation data."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Share of right answers."""
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


class Held(pl.LightningDataModule):
    """The training batches of a task, and what was held out of them, in order.

    Args:
        task: The task.
        data: Its data, whose test part is what was held out.
        seed: Seed of order and augmentation.
    """

    def __init__(self, task: Task, data: Data, seed: int) -> None:
        super().__init__()
        self.task, self.data, self.seed = task, data, seed

    def train_dataloader(self) -> Any:
        """Shuffled, augmented batches."""
        return Batches(self.data.x_train, self.data.y_train, self.task.batch_size, self.seed, self.task.augment)

    def val_dataloader(self) -> Any:
        """Batches of 500."""
        return DataLoader(TensorDataset(self.data.x_test, self.data.y_test), 500)


@dataclass(frozen=True)
class Job:
    """One guarded run."""

    task: str
    seed: int
    teacher: bool
    margin: float | None
    data: Path
    folder: Path


def do(job: Job) -> dict[str, Any]:
    """Train, and test."""
    task, data = TASKS[job.task], load(job.task, job.data)
    cut = data.cut(job.seed)
    model = trained(task, job.seed, cut, job.folder, cut=True)
    dense = accuracy(model, data)
    torch.manual_seed(job.seed + 1000)
    guard = AccuracyGuard(MAX_DROP, monitor="val_acc", margin=job.margin)
    trainer = pl.Trainer(
        max_epochs=TIMES * task.compress_epochs,
        val_check_interval=0.5,
        accelerator="cpu",
        callbacks=[guard, *([KnowledgeDistillation(temperature=4.0)] if job.teacher else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Validated(model.train(), task.compress_rate, task.weight_decay)
    trainer.fit(module, Held(task, cut, job.seed + 1000))
    with torch.no_grad():
        tested, held = accuracy(module.model, data), accuracy(module.model, cut)
    return {
        "task": job.task,
        "seed": job.seed,
        "teacher": job.teacher,
        "sparsity": sparsity(weight_layers(module)),
        "dense": dense,
        "test": tested,
        "validation_drop": 100 * (guard.reference or 0.0) - held,
        "rollbacks": sum("rolled back" in entry["outcome"] for entry in guard.history),
        "history": guard.history,
    }


def run(
    tasks: list[str] | None = None,
    seeds: int = 3,
    workers: int = 2,
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
    margin: float | None = None,
) -> dict[str, Any]:
    """Headline: by task, sparsity reached and drop on the test part, alone and taught."""
    names, where = tasks or list(TASKS), data_folder(data)
    for name in names:
        load(name, where)  # what is missing is said before anything is trained
    cells = [(name, teacher) for name in names for teacher in (False, True)]
    jobs = [Job(name, seed, teacher, margin, where, folder) for name, teacher in cells for seed in range(seeds)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), quiet) as pool:
        runs = list(track(pool.map(do, jobs), "guarded runs", len(jobs)))
    rows, headline = [], dict[str, float]()
    for name, teacher in cells:
        own = [run for run in runs if run["task"] == name and run["teacher"] == teacher]
        values = {key: [run[key] for run in own] for key in ("sparsity", "dense", "test", "validation_drop")}
        drops = [a - b for a, b in zip(values["dense"], values["test"], strict=True)]
        spread = [stdev(v) if seeds > 1 else math.nan for v in (values["sparsity"], drops)]
        rows.append(
            {
                "task": name,
                "teacher": "yes" if teacher else "no",
                "sparsity": f"{mean(values['sparsity']):.4f} +- {spread[0]:.4f}",
                "dense": f"{mean(values['dense']):.2f}",
                "test": f"{mean(values['test']):.2f}",
                "test drop": f"{mean(drops):.2f} +- {spread[1]:.2f}",
                "most": max(drops),
                "validation drop": mean(values["validation_drop"]),
                "rolled back": mean(run["rollbacks"] for run in own),
            }
        )
        key = f"{name}{'_taught' if teacher else ''}"
        headline |= {f"{key}_sparsity": mean(values["sparsity"]), f"{key}_drop": mean(drops)}
    return {"headline": headline, "rows": rows, "runs": runs}
