"""The Trainer's clock, and where on it the run is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compress.phase import Clock, check_phases

from .protocol import phases_of

__all__ = ["check_run", "current_phase", "on_rank_zero", "read_clock", "tell_left_alone"]

T = TypeVar("T")


def read_clock(trainer: pl.Trainer, num_batches: int) -> Clock:
    """The clock, after a number of batches of the current epoch."""
    per_epoch = trainer.num_training_batches
    # Lightning's words for no end.
    max_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    max_steps = math.inf if trainer.max_steps in (None, -1) else trainer.max_steps
    total_batches = per_epoch * max_epochs if per_epoch else 0
    epoch = trainer.current_epoch + (num_batches / per_epoch if math.isfinite(per_epoch) and per_epoch else 0)
    shares = []
    if math.isfinite(total_batches) and total_batches:
        shares.append(epoch * per_epoch / total_batches)
    if math.isfinite(max_steps) and max_steps:
        shares.append(trainer.global_step / max_steps)
    total_steps = max_steps
    if trainer.lightning_module.automatic_optimization and math.isfinite(total_batches):
        total_steps = min(max_steps, math.ceil(per_epoch / trainer.accumulate_grad_batches) * max_epochs)
    return Clock(
        step=trainer.global_step,
        epoch=epoch,
        run=max(shares, default=math.nan),
        total_steps=total_steps,
        total_epochs=max_epochs,
    )


def check_run(trainer: pl.Trainer) -> None:
    """Raise before the first step unless all phases fit the run and follow each other."""
    check_phases(phases_of(trainer), read_clock(trainer, 0))


def current_phase(trainer: pl.Trainer, clock: Clock) -> tuple[int, str]:
    """Number and name of the phase the run is in: 0, "dense" before the first; the last one begun stays current."""
    index = 0
    name = "dense"
    phases = sorted(phases_of(trainer), key=lambda item: item[1].fractions(clock))
    for i, (label, phase) in enumerate(phases, start=1):
        progress = phase.progress(clock)
        if 0 <= progress < 1:
            return i, label
        if progress >= 1:
            index = i
            name = f"after {label}"
    return index, name


def on_rank_zero(trainer: pl.Trainer, call: Callable[[], T]) -> T:
    """What a call gives on rank zero, on every rank; what it raises there is raised everywhere."""
    result: T | Exception | None = None
    if trainer.is_global_zero:
        try:
            result = call()
        except Exception as error:
            if trainer.world_size == 1:
                raise
            result = error
    result = trainer.strategy.broadcast(result)
    if isinstance(result, Exception):
        raise result
    return cast("T", result)


def tell_left_alone(callback: pl.Callback, skipped: Mapping[str, str], warn: bool = False) -> None:
    """Print, or warn, which layers a callback leaves alone, with the reasons."""
    if skipped:
        left = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        tell = rank_zero_warn if warn else rank_zero_info
        tell(f"{type(callback).__name__} leaves alone {left}")
