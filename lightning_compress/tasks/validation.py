"""The user's own validation, as a function of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lightning_compress.tasks.compose import start

if TYPE_CHECKING:
    from lightning_compress.callbacks.judgement import Judge

__all__ = ["judge_before_training", "validator"]


def judge_before_training(cfg: DictConfig, section: str) -> Judge:
    """The metric that decides in a task, seen in a validation of the model as it starts.

    Args:
        cfg: The composed configuration.
        section: The task's section of it, with ``monitor`` and ``mode``.

    Raises:
        ValueError: If validation does not log it, or its name does not tell which way is better.
    """
    from lightning_compress.callbacks.judgement import Judge

    judge = Judge(section, cfg[section].monitor, cfg[section].mode)
    _, model, data = start(cfg, [], False)
    judge.see(list(validator(cfg, data)(model)))
    return judge


def validator(cfg: DictConfig, data: Any) -> Callable[[Any], dict[str, float]]:
    """Gives the metrics that a model logs over the validation data, always in the same order."""
    import lightning.pytorch as pl

    from lightning_compress.callbacks.evaluate import quiet
    from lightning_compress.environment import without_variable

    limit = cfg.trainer.get("limit_val_batches", 1.0)
    options: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    loaders: list[Any] = []

    def validate(model: Any) -> dict[str, float]:
        with quiet(), without_variable():
            runner = pl.Trainer(accelerator="cpu", devices=1, limit_val_batches=limit, **options)
            if not loaders:
                runner.validate(model, datamodule=data, verbose=False)  # which sets the data up
                loaders.append(data.val_dataloader())
            found = runner.validate(model, loaders[0], verbose=False)
        return {name: value for metrics in found for name, value in metrics.items()}

    return validate
