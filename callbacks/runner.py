"""A Trainer of its own for a copy of the model: for loops that the run's own, which is busy, cannot go into."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_compress.environment import without_variable
from lightning_compress.structure.held import may_swap
from lightning_compress.structure.optimizers import copy_optimizer

from .standing_in import alone, quiet, rewound, same_random

__all__ = ["lend_optimizers", "open_runner"]


@contextmanager
def open_runner(
    trainer: pl.Trainer, model: pl.LightningModule, source: Any, **limits: Any
) -> Iterator[tuple[pl.Trainer, dict[str, Any]]]:
    """A Trainer for a copy of the model, and the data to give to it; the user's steps and hooks find what they ask for.

    It is for a few batches: no workers are started for them, and data that can be read but once are refused.

    Args:
        trainer: The Trainer of the run.
        model: The copy.
        source: Where the run's data come from.
        limits: Of the runner.
    """
    # callbacks of the model's own compress the model, not its copy
    model.__dict__["configure_callbacks"] = list
    # of those that only cast around the model, float32 is the more exact
    precision = trainer.precision_plugin
    of_weights = [precision] if isinstance(precision, HalfPrecision | DoublePrecision) else []
    with same_random(), quiet(), alone(), without_variable():
        # made anew, so that a rank that runs alone sees all data and not its share
        loaders = _without_workers(source.dataloader())
        with rewound(loaders):
            runner = pl.Trainer(
                strategy=SingleDeviceStrategy(trainer.strategy.root_device),
                plugins=[LightningEnvironment(), *of_weights],
                logger=[DummyLogger() for _ in trainer.loggers],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **limits,
            )
            yield runner, _data(source, loaders)


def _data(source: Any, loaders: Any) -> dict[str, Any]:
    """Data as a Trainer takes them: a DataModule, for its hooks, as a copy that is set up, or loaders."""
    if not isinstance(source.instance, pl.LightningDataModule):
        return {"dataloaders" if source.name == "val_dataloader" else "train_dataloaders": loaders}
    data = copy.copy(source.instance)
    data.__dict__ |= dict.fromkeys(("prepare_data", "setup", "teardown"), lambda *_, **__: None)
    data.__dict__[source.name] = lambda: loaders
    return {"datamodule": data}


def _without_workers(loaders: Any) -> Any:
    """Loaders of the same data that read them in this process."""
    if isinstance(loaders, CombinedLoader):
        combined = copy.copy(loaders)
        combined.flattened = [_without_workers(loader) for loader in loaders.flattened]
        return combined
    if isinstance(loaders, list | tuple | dict):
        return tree_map(_without_workers, loaders)
    if isinstance(loaders, Iterator) or isinstance(getattr(loaders, "dataset", None), Iterator):
        raise ValueError("the data are an iterator, of which a batch that is looked at is lost")
    if not isinstance(loaders, DataLoader):
        return loaders
    alike = copy.copy(loaders)
    alike.num_workers = 0
    alike.timeout = 0
    return alike


def lend_optimizers(runner: pl.Trainer, trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Give a runner the run's optimizers and schedulers as if they were those of its copy.

    Hooks may ask for them: they have the values of the run's, and steps of theirs change the copy. They are without
    their state, which is large, but where hooks may put it into the weights.
    """
    pairs = zip(trainer.lightning_module.parameters(), model.parameters(), strict=False)
    instead: dict[int, Any] = {id(trainer.lightning_module): model, **{id(p): of_copy for p, of_copy in pairs}}
    for optimizer in trainer.optimizers:
        instead |= {} if may_swap(optimizer) else {id(optimizer.state): {}}
    try:
        optimizers = [copy_optimizer(optimizer, instead) for optimizer in trainer.optimizers]
        schedulers = copy.deepcopy(trainer.lr_scheduler_configs, instead)
    except Exception:  # one that cannot be copied: few hooks ask for it
        return
    runner.strategy.optimizers, runner.strategy.lr_scheduler_configs = optimizers, schedulers
