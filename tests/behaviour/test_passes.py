"""Our passes are the user's own as far as hooks can tell, and leave no trace: they are made on copies."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_compress.callbacks import (
    AccuracyGuard,
    CompressionReport,
    GradualPruning,
    KnowledgeDistillation,
)
from lightning_compress.callbacks.evaluate import copied, evaluate, run_training_step
from lightning_compress.callbacks.examples import example_calls
from lightning_compress.callbacks.judgement import Judge
from lightning_compress.callbacks.measure import measure
from lightning_compress.callbacks.teacher import _validation_call
from lightning_compress.phase import Phase
from lightning_compress.tracking import read_offline_run

from ..harness import differences
from .observing import SEEN, Data, Passes, Row, Sees

WHOLE = {
    "evaluate": lambda trainer, module: evaluate(trainer, copied(module)),
    "judge": lambda trainer, module: Judge("test", "val_acc", "max").measure(trainer, module),
}
TO_THE_FIRST_CALL = {
    "examples": lambda trainer, module: example_calls(trainer, module, "test"),
    "teacher": lambda trainer, module: _validation_call(trainer, module, "head"),
}
BOTH = {"measure": lambda trainer, module: measure(trainer, module)}


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "val_check_interval": 0.5,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    SEEN.clear()
    trainer = pl.Trainer(**{**settings, **options})
    trainer.fit(module, datamodule=Data())
    return trainer


VALIDATIONS = 1 + 3 * 2  # in the sanity check, and twice an epoch


def differing(a: list[Row], b: list[Row]) -> list[str]:
    """What two lists of what hooks saw differ in, up to the end of the shorter one."""
    return [
        f"{x['hook']}: {key}: {x[key]} != {y[key]}" for x, y in zip(a, b, strict=False) for key in x if x[key] != y[key]
    ]


@pytest.mark.parametrize(
    ("manual", "precision"), [(False, "32-true"), (False, "bf16-mixed"), (True, "bf16-true"), (True, "64-true")]
)
def test_hooks_see_in_each_pass_what_they_see_in_the_users_own_validation(
    manual: bool, precision: Any, tmp_path: Path
) -> None:
    passes = Passes({**WHOLE, **TO_THE_FIRST_CALL, **BOTH})
    fit(tmp_path, Sees(manual), passes, precision=precision)
    user = passes.seen["user"]
    user = user[: 1 + [row["hook"] for row in user].index("on_validation_end")]
    assert len(user) == 17
    lengths = {"evaluate": 17, "judge": 17, "teacher": 7, "measure": 17 + 6}
    for name, length in lengths.items():
        # its forward alone, for the MACs, is no pass
        seen = [row for i, row in enumerate(passes.seen[name]) if i < length or row["hook"] != "forward"]
        assert len(seen) == length, name
        assert not differing(seen[:17], user), name
        assert not differing(seen[17:], user), name
    assert passes.given["measure"]["macs"] > 0
    assert passes.given["evaluate"] == passes.given["measure"]["metrics"] == passes.validated


class Steps(pl.Callback):
    """Makes a training step of a copy before the user's own."""

    seen: tuple[list[Row], list[Row]] = ([], [])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 6:
            SEEN.clear()
            run_training_step(trainer, copied(pl_module))
            self.seen = (list(SEEN), [])
            SEEN.clear()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 7:
            self.seen = (self.seen[0], list(SEEN))


@pytest.mark.parametrize("manual", [False, True])
def test_hooks_see_in_a_training_step_of_a_copy_what_they_see_in_the_users_own(manual: bool, tmp_path: Path) -> None:
    fit(tmp_path, Sees(manual), steps := Steps())
    # the user's own batch was fetched before
    ours, users = ([x for x in rows if "transfer" not in x["hook"]] for rows in steps.seen)
    assert [row["hook"] for row in ours] == ["on_train_batch_start", "training_step", "forward"]
    for row in ours + users:  # loaders that shuffle give another batch
        row.pop("tensors")
    assert not differing(ours, users)


def everything(module: Sees, trainer: pl.Trainer) -> dict[str, Any]:
    """What a run leaves behind."""
    return {
        "weights": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metric": dict(module.accuracy.metric_state),
        "kept": module.kept,
        "calls": [module.calls, module.num_seen, module.features],
        "random": [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()],
        "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "modes": [x.training for x in module.modules()],
        "progress": [trainer.fit_loop.state_dict(), trainer.global_step, trainer.current_epoch],
        "same": [x is module for x in (trainer.lightning_module, trainer.model, module.trainer.lightning_module)],
    }


@pytest.mark.parametrize("manual", [False, True])
def test_a_run_with_our_passes_is_bit_for_bit_the_run_without_them(manual: bool, tmp_path: Path) -> None:
    step = {"step": lambda trainer, module: run_training_step(trainer, copied(module))}
    left = []
    for name, callbacks in {"plain": [], "passes": [Passes({**WHOLE, **TO_THE_FIRST_CALL, **BOTH, **step})]}.items():
        pl.seed_everything(3)
        logger = CSVLogger(tmp_path, name, "")
        trainer = fit(tmp_path, module := Sees(manual), *callbacks, logger=logger)
        left.append(everything(module, trainer) | {"file": (tmp_path / name / "metrics.csv").read_text()})
    assert not differences(*left)


def test_each_value_reaches_the_loggers_once(tmp_path: Path) -> None:
    module = Sees()
    pruning = GradualPruning(0.5, phase=Phase(0.3, 0.6))
    others: list[pl.Callback] = [CompressionReport(show=False), AccuracyGuard(1.0, "val_acc"), KnowledgeDistillation()]
    loggers = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "events", "")]
    fit(tmp_path, module, *others, pruning, logger=loggers)
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open()))
    written = [(key, row["step"]) for row in rows for key, value in row.items() if value]
    events = EventAccumulator(str(tmp_path / "events"), {"scalars": 0}).Reload()
    for name, times in {"direct": VALIDATIONS, "val_loss_epoch": VALIDATIONS - 1, "val_acc": VALIDATIONS - 1}.items():
        assert [key for key, _ in written].count(name) == times
        assert len(events.Scalars(name)) == times
    assert len(events.Scalars("by_hand")) == VALIDATIONS


class Plain(Sees):
    """Has a forward that looks at nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


class WritesToWandb(Plain):
    """Writes to W&B past the logger, too, and keeps the run that it writes to."""

    def on_train_start(self) -> None:
        self.run = self.logger.experiment

    def on_validation_epoch_end(self) -> None:
        wandb.log({"module": 1.0})
        self.logger.experiment.log({"logger": 1.0})
        if not self.trainer.sanity_checking:
            self.run.log({"kept": 1.0})
        assert self.logger.experiment.id == wandb.run.id == self.run.id if self.global_step else True
        assert wandb.run.dir


def test_what_a_step_writes_to_wandb_is_written_once(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    report = CompressionReport(tmp_path, "val_acc", show=False)
    fit(tmp_path, WritesToWandb(), report, GradualPruning(0.5, phase=Phase(0.3, 0.6)), logger=logger)
    wandb.finish()
    wandb.teardown()
    assert report.report is not None
    assert report.report["dense"]["metric"] is not None
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    history = read_offline_run(folder).history
    for name, times in {"module": VALIDATIONS, "logger": VALIDATIONS, "kept": VALIDATIONS - 1}.items():
        assert sum(name in row for row in history) == times, name
