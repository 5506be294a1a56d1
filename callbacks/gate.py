"""The best checkpoint is one of the compressed model."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from .clock import all_callbacks

__all__ = ["gate_checkpoints", "open_checkpoints"]


def gate_checkpoints(trainer: pl.Trainer, callback: Any) -> None:
    """Let every ModelCheckpoint that keeps the best by a monitor wait until ``callback.reached``.

    Several callbacks may gate the same run. Checkpoints without a monitor and ``save_top_k=-1`` are as they were;
    ``save_last`` saves whenever a best might have been saved.
    """
    for checkpoint in all_callbacks(trainer):
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor and checkpoint.save_top_k > 0:
            ask = checkpoint.check_monitor_top_k
            checkpoint.check_monitor_top_k = partial(_ask, callback, checkpoint, ask)  # type: ignore[method-assign]
            rank_zero_info(
                f"ModelCheckpoint(monitor={checkpoint.monitor!r}) saves the best from the moment on at which "
                f"{type(callback).__name__} has reached its target (gate_checkpoints=False turns this off)."
            )


def open_checkpoints(trainer: pl.Trainer) -> None:
    """Let them save as they please again."""
    for checkpoint in all_callbacks(trainer):
        checkpoint.__dict__.pop("check_monitor_top_k", None)


def _ask(callback: Any, checkpoint: Any, ask: Any, trainer: pl.Trainer, current: Any = None) -> bool:
    if callback.reached:
        return ask(trainer, current)
    if checkpoint.save_last:
        # at which Lightning then saves the last, too
        checkpoint._last_global_step_saved = trainer.global_step  # noqa: SLF001
    return False
