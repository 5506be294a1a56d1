"""A user's own validation step, run on a copy of the model while the Trainer is busy."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_compress.forward import Inputs, record_inputs

__all__ = [
    "check_validation_data",
    "choose_metric",
    "copied",
    "evaluate",
    "example_inputs",
    "has_validation",
    "more_is_better",
    "pick_metric",
    "quiet",
]

_LESS_IS_BETTER = ("loss", "err", "mse", "mae", "perplexity")


def check_validation_data(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raise unless the run has a validation step and data for it."""
    if not has_validation(trainer, pl_module):
        raise ValueError(
            "CompressionReport measures on validation data, but there is no validation_step, no val_dataloader, or "
            "limit_val_batches=0. "
            "Add both to the LightningModule (or the dataloader to the DataModule), or drop CompressionReport."
        )


def has_validation(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether the run has a validation step and data for it."""
    # Lightning has no public name for the loader's source
    source = trainer.fit_loop.epoch_loop.val_loop._data_source  # noqa: SLF001
    return bool(is_overridden("validation_step", pl_module) and source.is_defined() and trainer.limit_val_batches)


def copied(model: pl.LightningModule) -> pl.LightningModule:
    """A copy that can be evaluated while the Trainer holds on to the original."""
    copy_ = copy.deepcopy(model)
    copy_._metric_attributes = None  # noqa: SLF001  # a cache of the original's metrics by identity
    return copy_


def evaluate(trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, float]:
    """The metrics that a model logs over the validation data; the global random state stays as it is.

    Args:
        trainer: The Trainer of the run, for its validation data.
        model: A copy of the model, which may be spoiled.
    """
    with isolate_rng(), quiet(), _alone():
        # made anew, so that a rank that evaluates alone sees all data and not its share
        # Lightning has no public name for the loader's source
        loaders = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()  # noqa: SLF001
        runner = pl.Trainer(
            strategy=SingleDeviceStrategy(trainer.strategy.root_device),
            plugins=[LightningEnvironment()],
            limit_val_batches=trainer.limit_val_batches,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        found = runner.validate(model, dataloaders=loaders, verbose=False)
    return {name: value for metrics in found for name, value in metrics.items()}


def example_inputs(trainer: pl.Trainer, model: pl.LightningModule) -> Inputs | None:
    """The arguments with which validation calls the model; its example_input_array where there is no such call."""
    watched = copied(model)
    recorded = None
    if has_validation(trainer, model):
        recorded = record_inputs(watched, lambda: evaluate(trainer, watched))
    if recorded is None and model.example_input_array is not None:
        array = model.example_input_array
        if isinstance(array, dict):
            return Inputs((), array)
        return Inputs(array if isinstance(array, tuple) else (array,), {})
    return recorded


def pick_metric(names: list[str]) -> str | None:
    """The metric to report when none is named: an accuracy or the like before a loss, validation before training."""
    names = [name for name in names if not name.startswith("compress/")]
    good = ("acc", "f1", "auroc", "auc", "iou", "bleu", "psnr", "r2")
    ranked = sorted(
        names, key=lambda n: (not any(g in n.lower() for g in good), "val" not in n.lower(), names.index(n))
    )
    return ranked[0] if ranked else None


def choose_metric(field: str, asked: str | None, logged: Sequence[str]) -> str:
    """The metric that is asked for, or the one to report when none is.

    Args:
        field: Where it is asked for, for the message.
        asked: Its name.
        logged: The names of what validation logs.

    Raises:
        ValueError: If validation does not log it.
    """
    found = asked or pick_metric(list(logged))
    if found is None or found not in logged:
        raise ValueError(
            f"{field}={asked!r}: validation does not log it. Accepted are: "
            f"{', '.join(logged) or 'none, for nothing is logged'}. Log it in validation_step with self.log."
        )
    return found


def more_is_better(metric: str) -> bool:
    """Whether a higher value is better, by the metric's name."""
    return not any(part in metric.lower() for part in _LESS_IS_BETTER)


@contextmanager
def _alone() -> Iterator[None]:
    """Without the other ranks: what runs here waits for none of them."""
    with patch.object(torch.distributed, "is_initialized", return_value=False):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says and warns of."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
