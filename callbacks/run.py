"""The Trainer's clock, and where on it the run is."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compress.phase import Clock, Phase
from lightning_compress.squeeze import Squeezed, squeeze

from .protocol import phases_of

__all__ = [
    "check_own_phase",
    "check_run",
    "current_phase",
    "is_launched",
    "on_rank_zero",
    "own_progress",
    "phase_names",
    "read_clock",
    "share_after_batch",
    "tell_left_alone",
    "trains",
]

T = TypeVar("T")

# Of the runs that are too short for their phases: how these are squeezed into them.
_SQUEEZED: WeakKeyDictionary[pl.Trainer, Squeezed] = WeakKeyDictionary()


def read_clock(trainer: pl.Trainer, num_batches: int) -> Clock:
    """The clock as the phases see it, after a number of batches of the current epoch."""
    clock = _read(trainer, num_batches)
    squeezed = _SQUEEZED.get(trainer)
    return clock if squeezed is None else squeezed.read(clock)


def _read(trainer: pl.Trainer, num_batches: int) -> Clock:
    per_epoch = trainer.num_training_batches
    # Lightning's words for no end.
    max_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    max_steps = math.inf if trainer.max_steps in (None, -1) else trainer.max_steps
    total_batches = per_epoch * max_epochs if per_epoch else 0
    epoch = trainer.current_epoch + _share_of_epoch(trainer, num_batches)
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


def _share_of_epoch(trainer: pl.Trainer, num_batches: int) -> float:
    """How much of the current epoch is over after a number of its batches."""
    per_epoch = trainer.num_training_batches
    done = num_batches > trainer.fit_loop.epoch_loop.batch_idx
    if num_batches and done and trainer.is_last_batch:
        return 1.0  # also where a dataloader has no length, or has fewer batches than it said
    return num_batches / per_epoch if math.isfinite(per_epoch) and per_epoch else 0.0


def share_after_batch(trainer: pl.Trainer) -> float:
    """Share of the run that is over once this batch is."""
    return read_clock(trainer, trainer.fit_loop.epoch_loop.batch_idx + 1).run


def trains(trainer: pl.Trainer) -> bool:
    """Whether a fit takes steps at all, by the Trainer's options."""
    return 0 not in (trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches)


def check_run(trainer: pl.Trainer) -> None:
    """Make room for phases that a run is too short for; to call in ``on_train_start``, by every callback with a phase.

    Phases in fractions of the run are squeezed into any run; phases in steps or epochs into one that the Trainer's
    options ``fast_dev_run``, ``overfit_batches`` or ``limit_train_batches`` make short.

    Raises:
        ValueError: Before the first step, if phases do not fit the run, or do not follow each other.
    """
    known = _SQUEEZED.pop(trainer, None)
    squeezed = squeeze_into_run(trainer, phases_of(trainer))
    if squeezed is None:
        return
    _SQUEEZED[trainer] = squeezed
    if known != squeezed:
        _say(squeezed)


def check_own_phase(trainer: pl.Trainer, name: str, phase: Phase) -> Squeezed | None:
    """The same for a phase that may overlap those of others; gives where it lies in a run that is too short for it."""
    squeezed = squeeze_into_run(trainer, [(name, phase)])
    if squeezed is not None:
        _say(squeezed)
    return squeezed


def own_progress(trainer: pl.Trainer, phase: Phase, squeezed: Squeezed | None, num_batches: int) -> float:
    """Progress of such a phase, after a number of batches of the current epoch."""
    clock = _read(trainer, num_batches)
    return phase.progress(clock if squeezed is None else squeezed.read(clock))


def squeeze_into_run(trainer: pl.Trainer, phases: Iterable[tuple[str, Phase]]) -> Squeezed | None:
    """Where phases lie in a run that is too short for them; None if it is long enough."""
    clock = _read(trainer, 0)
    num_steps = clock.total_steps
    if not trainer.lightning_module.automatic_optimization:
        num_steps = _num_batches(trainer)
    return squeeze(phases, clock, num_steps, lenient=_is_cut_short(trainer))


def _say(squeezed: Squeezed) -> None:
    rank_zero_info(f"The run of {squeezed.num_steps:g} steps is short: phases are squeezed into it, {squeezed.words}.")


def _num_batches(trainer: pl.Trainer) -> float:
    limits = [math.inf if limit in (None, -1) else limit for limit in (trainer.max_epochs, trainer.max_steps)]
    max_epochs, max_steps = limits
    return min(trainer.num_training_batches * max_epochs, max_steps)


def _is_cut_short(trainer: pl.Trainer) -> bool:
    """Whether the Trainer's options for trying things out make a run shorter than it would be."""
    limit = trainer.limit_train_batches
    # 1 is one batch, and 1.0 all of them
    limited = limit is not None and not (isinstance(limit, float) and limit == 1.0)
    return bool(trainer.fast_dev_run or trainer.overfit_batches or limited)  # type: ignore[attr-defined]


def current_phase(trainer: pl.Trainer, clock: Clock) -> tuple[int, str]:
    """Number and name of the phase the run is in: 0, "dense" before the first; the last one begun stays current."""
    index = 0
    name = "dense"
    for i, (label, phase) in enumerate(_in_order(trainer, clock), start=1):
        progress = phase.progress(clock)
        if 0 <= progress < 1:
            return i, label
        if progress >= 1:
            index = i
            name = f"after {label}"
    return index, name


def phase_names(trainer: pl.Trainer) -> list[str]:
    """The names of the phases in the order of their numbers, "dense" first."""
    return ["dense", *(name for name, _ in _in_order(trainer, read_clock(trainer, 0)))]


def _in_order(trainer: pl.Trainer, clock: Clock) -> list[tuple[str, Phase]]:
    return sorted(phases_of(trainer), key=lambda item: item[1].fractions(clock))


def is_launched(trainer: pl.Trainer) -> bool:
    """Whether this process was launched for the run, by ``ddp_spawn`` or the like: the user's Trainer is in another."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def on_rank_zero(trainer: pl.Trainer, call: Callable[[], T]) -> T:
    """What a call gives on rank zero, on every rank; what it raises there is raised everywhere."""
    result: T | Exception | None = None
    if trainer.is_global_zero:
        try:
            result = call()
        except Exception as error:
            if trainer.world_size == 1:
                raise
            result = _sendable(error)
    result = trainer.strategy.broadcast(result)
    if isinstance(result, Exception):
        raise result
    return cast("T", result)


def _sendable(error: Exception) -> Exception:
    """An error as other processes can take it; one that cannot be copied is told in words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever it holds
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def tell_left_alone(callback: pl.Callback, skipped: Mapping[str, str], warn: bool = False) -> None:
    """Print, or warn, which layers a callback leaves alone, with the reasons."""
    if skipped:
        left = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        tell = rank_zero_warn if warn else rank_zero_info
        tell(f"{type(callback).__name__} leaves alone {left}")
