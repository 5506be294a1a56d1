"""A user's own validation or training step, run on a copy of the model while the Trainer is busy."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from .standing_in import copied, quiet, rewound, standing_in, twins

__all__ = [
    "copied",
    "evaluate",
    "has_validation",
    "num_validated",
    "quiet",
    "run_training_step",
    "training_data",
    "validated",
    "validation_data",
    "validation_follows",
    "why_not_validated",
]


def why_not_validated(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    """Why a run has no validation, and the line that gives it one; None where it has one."""
    if not is_overridden("validation_step", pl_module):
        return f"{type(pl_module).__name__} has no validation_step. Define one that logs: self.log('val_loss', loss)."
    if not validation_data(trainer).is_defined():
        return "there is no val_dataloader. Give one: trainer.fit(model, train_loader, val_loader)."
    if not trainer.limit_val_batches:
        return "limit_val_batches=0. Leave it out of the Trainer."
    return None


def has_validation(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether the run has a validation step and data for it."""
    return why_not_validated(trainer, pl_module) is None


def training_data(trainer: pl.Trainer) -> Any:
    """Where the training data of a run come from."""
    # Lightning has no public name for the loader's source
    return trainer.fit_loop._data_source  # noqa: SLF001


def validation_data(trainer: pl.Trainer) -> Any:
    """Where the validation data of a run come from."""
    # Lightning has no public name for the loader's source
    return validation_loop(trainer)._data_source  # noqa: SLF001


def validation_loop(trainer: pl.Trainer) -> Any:
    """The loop that validates: that of a fit, or of ``trainer.validate``."""
    is_alone = trainer.state.fn == TrainerFn.VALIDATING
    return trainer.validate_loop if is_alone else trainer.fit_loop.epoch_loop.val_loop


def evaluate(trainer: pl.Trainer, model: pl.LightningModule, *watching: pl.Callback) -> dict[str, float]:
    """The metrics that a model logs over the validation data, none without any; the run goes on as if it had not been.

    Args:
        trainer: The Trainer of the run.
        model: A copy of the model, which may be spoiled.
        watching: Callbacks that are told of that validation, and no others.
    """
    if not has_validation(trainer, model):
        return {}
    run = validation_loop(trainer)
    # a rank that runs alone sees all data and not its share
    known = run if trainer.world_size == 1 else None
    with standing_in(trainer, model, *watching):
        loop = _loop_like(run, model, known)
        if trainer.state.fn == TrainerFn.VALIDATING:
            trainer.validate_loop = loop
        else:
            trainer.fit_loop.epoch_loop.val_loop = loop
        trainer.validating = True
        loop.setup_data()
        try:
            with rewound(loop._combined_loader):  # noqa: SLF001
                call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")  # noqa: SLF001
                loop.run()
        finally:
            loop.teardown()
        return {name: float(trainer.callback_metrics[name]) for name in validated(trainer)}


def _loop_like(run: Any, model: pl.LightningModule, known: Any) -> Any:
    """A validation loop as the run's, over the loaders that one knows, or over its data asked for anew."""
    loop = type(run)(run.trainer, run._trainer_fn, run._stage, verbose=False, inference_mode=run.inference_mode)  # noqa: SLF001
    loop._data_source = _source(run._data_source, model)  # noqa: SLF001
    if known is not None and known._combined_loader is not None:  # noqa: SLF001
        loop._combined_loader = twins(known._combined_loader)  # noqa: SLF001
        loop._max_batches = known._max_batches  # noqa: SLF001
        loop._last_val_dl_reload_epoch = known._last_val_dl_reload_epoch  # noqa: SLF001
    return loop


def _source(run: Any, model: pl.LightningModule) -> Any:
    """Where the run's data come from: of the model's own loaders, the copy's."""
    return type(run)(model if isinstance(run.instance, pl.LightningModule) else run.instance, run.name)


def num_validated(trainer: pl.Trainer) -> int | None:
    """The samples of one validation; None where its data do not tell, or come from several loaders."""
    # Lightning has no public name for the loaders of a loop
    loop = validation_loop(trainer)
    loaders = loop._combined_loader.flattened if loop._combined_loader is not None else []  # noqa: SLF001
    try:
        (loader,) = loaders
        (num_batches,) = loop.max_batches
        if num_batches >= len(loader):
            return len(loader.dataset)
        return min(len(loader.dataset), int(num_batches) * loader.batch_size)
    except (TypeError, ValueError, AttributeError):  # none, several, without a length, or no DataLoader of torch
        return None


def validated(trainer: pl.Trainer) -> list[str]:
    """The names of what the last validation of a fit has logged, without what only training logs."""
    # Lightning has no public name for what one loop has logged
    logged = validation_loop(trainer)._results.values()  # noqa: SLF001
    names = {name for item in logged for name in (item.meta.name, item.meta.forked_name(on_step=False))}
    return [name for name in trainer.callback_metrics if name.split("/dataloader_idx_")[0] in names]


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates once this batch of a fit is over; to ask in ``on_train_batch_end``."""
    # Lightning has no public name for when it is due, nor for what it asks
    fetcher = trainer.fit_loop._data_fetcher  # noqa: SLF001
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)  # noqa: SLF001


def run_training_step(trainer: pl.Trainer, model: pl.LightningModule) -> Any:
    """What one training step returns, of automatic or manual optimization; the run goes on as if it had not been.

    Args:
        trainer: The Trainer of the run.
        model: A copy of the model, which is spoiled.
    """
    due = _hooks_to_come(trainer)
    source = _source(training_data(trainer), model)
    with standing_in(trainer, model), torch.enable_grad():
        trainer.training = True
        loaders = source.dataloader()
        if not isinstance(loaders, CombinedLoader):
            loaders = CombinedLoader(loaders, "max_size_cycle")
        loaders = twins(loaders)
        with rewound(loaders):
            batch, *_ = next(iter(loaders))
            loaders.reset()
        for hook in due:
            call._call_lightning_module_hook(trainer, hook)  # noqa: SLF001
        batch = trainer.precision_plugin.convert_input(batch)
        batch = model._on_before_batch_transfer(batch)  # noqa: SLF001
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch)  # noqa: SLF001
        trainer._logger_connector.on_batch_start(batch)  # noqa: SLF001
        call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, 0)  # noqa: SLF001
        numbered = is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2)
        return call._call_strategy_hook(trainer, "training_step", batch, *([0] if numbered else []))  # noqa: SLF001


def _hooks_to_come(trainer: pl.Trainer) -> list[str]:
    """The hooks that the model is still to be called with before its first step."""
    fit_loop = trainer.fit_loop
    if fit_loop._combined_loader is None:  # noqa: SLF001  # callbacks are told first that a fit starts
        return ["on_fit_start", "on_train_start", "on_train_epoch_start"]
    progress = fit_loop.epoch_loop.batch_progress.current
    return ["on_train_start", "on_train_epoch_start"] if progress.ready == progress.completed else []
