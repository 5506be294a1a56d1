"""Accuracy of post-training quantization: plain, with cross-layer equalization, with bias correction, with both.

The dense models are those of ``prune_accuracy``, read where they are cached and trained otherwise. Each is calibrated
by ``trainer.validate`` on 16 batches of the training part in their plain order, then tested once on the whole test
part. Weights have one scale a tensor or one a channel, activations 8 bits. Mean and sample deviation over the seeds.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.jobs import load, trained
from experiments.tasks import TASKS, Classifier, Data, Task, data_folder
from experiments.training import accuracy, quiet
from lightning_compress.callbacks import PostTrainingQuantization
from lightning_compress.quantization import Affine, Scheme

SCHEMES = {
    "W8 tensor": Scheme(Affine(8, symmetric=True), weight_granularity="tensor"),
    "W4 tensor": Scheme(Affine(4, symmetric=True), weight_granularity="tensor"),
    "W4 channel": Scheme(Affine(4, symmetric=True)),
    "W3 channel": Scheme(Affine(3, symmetric=True)),
}
OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "equalize": {"equalize": True},
    "correct_bias": {"correct_bias": True},
    "both": {"equalize": True, "correct_bias": True},
}
BATCHES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to run, and where data and trained models lie."""
    parser.add_argument("--task", choices=list(TASKS), action="append", dest="tasks", help="all without it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder of mnist70k.npz and fsdd.npz")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the dense models")


def quantized(task: Task, model: nn.Module, data: Data, scheme: Scheme, options: dict[str, Any]) -> float:
    """Accuracy of a dense model once it is quantized."""
    module = Classifier(model, 0.1, 0.0)
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), task.batch_size)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[PostTrainingQuantization(scheme, **options)],
        limit_val_batches=BATCHES,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.validate(module, loader, verbose=False)
    with torch.no_grad():
        return accuracy(module, data)


def run(
    tasks: list[str] | None = None,
    seeds: int = 3,
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
) -> dict[str, Any]:
    """Headline: by task and scheme, the mean over the seeds without an option and with both; and the dense model's."""
    quiet()
    rows, headline = [], {}
    for task in tasks or list(TASKS):
        loaded = load(task, data_folder(data))
        models = {seed: trained(TASKS[task], seed, loaded, folder) for seed in range(seeds)}
        with torch.no_grad():
            dense = [accuracy(model, loaded) for model in models.values()]
        headline[f"{task}_dense"] = mean(dense)
        for label, scheme in SCHEMES.items():
            found = {
                name: [quantized(TASKS[task], deepcopy(model), loaded, scheme, options) for model in models.values()]
                for name, options in OPTIONS.items()
            }
            cells = {name: f"{mean(x):.2f} ({stdev(x) if seeds > 1 else 0:.2f})" for name, x in found.items()}
            rows.append({"task": task, "weights": label, "dense": f"{mean(dense):.2f}", **cells})
            key = f"{task}_{label.replace(' ', '_')}"
            headline |= {f"{key}_{name}": mean(found[name]) for name in ("plain", "both")}
    return {"headline": headline, "rows": rows}
