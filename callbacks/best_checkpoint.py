"""The best checkpoint is one of the compressed model."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from .protocol import Compressing, all_callbacks, compressing

__all__ = ["gate_checkpoints", "open_checkpoints"]


def gate_checkpoints(trainer: pl.Trainer) -> None:
    """Let every ModelCheckpoint that keeps the best by a monitor wait for all compressing callbacks that ask for it.

    Called by each of them. Checkpoints without a monitor and ``save_top_k=-1`` are as they were; ``save_last`` saves
    whenever a best might have been saved.
    """
    names = " and ".join(type(callback).__name__ for callback in _gating(trainer))
    for checkpoint in all_callbacks(trainer):
        if not isinstance(checkpoint, ModelCheckpoint) or "check_monitor_top_k" in checkpoint.__dict__:
            continue
        if names and checkpoint.monitor and checkpoint.save_top_k > 0:
            checkpoint.__dict__["check_monitor_top_k"] = partial(_ask, checkpoint)
            rank_zero_info(
                f"ModelCheckpoint(monitor={checkpoint.monitor!r}) saves the best from the moment on at which {names} "
                "have reached their targets (gate_checkpoints=False turns this off)."
            )


def open_checkpoints(trainer: pl.Trainer) -> None:
    """Let them save as they please again."""
    for checkpoint in all_callbacks(trainer):
        checkpoint.__dict__.pop("check_monitor_top_k", None)


def _gating(trainer: pl.Trainer) -> list[Compressing]:
    return [callback for callback in compressing(trainer) if callback.gate_checkpoints]


def _ask(checkpoint: ModelCheckpoint, trainer: pl.Trainer, current: Any = None) -> bool:
    if all(callback.reached for callback in _gating(trainer)):
        return type(checkpoint).check_monitor_top_k(checkpoint, trainer, current)
    if checkpoint.save_last:
        # at which Lightning then saves the last, too
        checkpoint._last_global_step_saved = trainer.global_step  # noqa: SLF001
    return False
