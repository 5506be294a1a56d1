"""What waits until the model is the compressed one: the best checkpoint, and the end of a run by EarlyStopping."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from .protocol import Compressing, all_callbacks, compressing

__all__ = ["hold_back", "let_go"]


def hold_back(trainer: pl.Trainer) -> None:
    """Let every ModelCheckpoint that keeps the best, and every EarlyStopping, wait for the compressing callbacks.

    The best before a target is reached would be a dense model, and what compresses costs a metric for a while.
    Checkpoints without a monitor and ``save_top_k=-1`` are as they were; ``save_last`` saves whenever a best might have
    been saved. EarlyStopping still ends a run whose metric is not finite or crosses its ``divergence_threshold``.
    """
    for callback in all_callbacks(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.save_top_k > 0:
            waits_for = _gating(trainer, "gate_checkpoints")
            if waits_for:
                callback.__dict__["check_monitor_top_k"] = partial(_save, callback)
                rank_zero_info(
                    f"ModelCheckpoint(monitor={callback.monitor!r}) saves the best from the moment on at which "
                    f"{_names(waits_for)} reached the target (gate_checkpoints=False turns this off)."
                )
        elif isinstance(callback, EarlyStopping):
            waits_for = _gating(trainer, "gate_stopping")
            if waits_for:
                callback.__dict__["_run_early_stopping_check"] = partial(_stop, callback)
                rank_zero_info(
                    f"EarlyStopping(monitor={callback.monitor!r}) waits until {_names(waits_for)} reached the target "
                    "(gate_stopping=False turns this off)."
                )


def let_go(trainer: pl.Trainer) -> None:
    """Let them do as they please again."""
    for callback in all_callbacks(trainer):
        callback.__dict__.pop("check_monitor_top_k", None)
        callback.__dict__.pop("_run_early_stopping_check", None)


def _gating(trainer: pl.Trainer, gate: str) -> list[Compressing]:
    return [callback for callback in compressing(trainer) if getattr(callback, gate, True)]


def _names(callbacks: list[Compressing]) -> str:
    names = " and ".join(type(callback).__name__ for callback in callbacks)
    return f"{names} {'have' if len(callbacks) > 1 else 'has'}"


def _save(checkpoint: ModelCheckpoint, trainer: pl.Trainer, current: Any = None) -> bool:
    if all(callback.reached for callback in _gating(trainer, "gate_checkpoints")):
        return type(checkpoint).check_monitor_top_k(checkpoint, trainer, current)
    if checkpoint.save_last:
        # at which Lightning then saves the last, too
        checkpoint._last_global_step_saved = trainer.global_step  # noqa: SLF001
    return False


def _stop(stopping: EarlyStopping, trainer: pl.Trainer) -> None:
    reached = all(callback.reached for callback in _gating(trainer, "gate_stopping"))
    if reached or _has_diverged(stopping, trainer):
        # Lightning has no public name for the check
        type(stopping)._run_early_stopping_check(stopping, trainer)  # noqa: SLF001


def _has_diverged(stopping: EarlyStopping, trainer: pl.Trainer) -> bool:
    """Whether going on is of no use, compressed or not."""
    value = float(trainer.callback_metrics.get(stopping.monitor, 0.0))
    if not math.isfinite(value):
        return stopping.check_finite
    threshold = stopping.divergence_threshold
    if threshold is None:
        return False
    return value > threshold if stopping.mode == "min" else value < threshold
