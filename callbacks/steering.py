"""What AccuracyGuard steers: found by the protocol, and refused before training where it cannot be steered."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.guard_steps import next_bits, next_sparsity
from lightning_compress.phase import Clock, Phase
from lightning_compress.pruning import LAMP

from .evaluate import why_not_validated
from .live_shape import check_strategy
from .protocol import Steerable, all_callbacks, compressing, steerable
from .pruning import GradualPruning

__all__ = ["check_guarded", "next_level", "progress_of", "prune_if_alone", "release", "steered"]

_LEVERS = ("sparsity", "bits")


def steered(trainer: pl.Trainer, lever: str) -> Steerable | None:
    """The callback that is steered by a lever, ``"sparsity"`` or ``"bits"``."""
    return next(iter(steerable(trainer, lever)), None)


def progress_of(callback: Steerable, clock: Clock) -> float:
    """Progress of the phase in which a callback is steered, its last."""
    return callback.phases()[-1][1].progress(clock)


def next_level(trainer: pl.Trainer, lever: str | None, level: float, step: float, bits: Sequence[int]) -> float | None:
    """The level to try after one that held; None where nothing is left to try.

    Args:
        trainer: The Trainer of the run.
        lever: What is steered.
        level: What held.
        step: Fraction of the remaining weights that the next step prunes.
        bits: Bits to try, in falling order.
    """
    if lever == "bits":
        return next_bits(int(level), bits)
    pruner = steered(trainer, "sparsity")
    if pruner is None or pruner.reached:
        return None
    return next_sparsity(level, step, float(pruner.asked()["sparsity"]))


def release(trainer: pl.Trainer) -> None:
    """Steer no longer; what is reached stays."""
    for lever in _LEVERS:
        for callback in steerable(trainer, lever):
            callback.steer(None)


def prune_if_alone(trainer: pl.Trainer, guard: pl.Callback) -> None:
    """Add a GradualPruning to a run without a callback to steer."""
    if any(steered(trainer, lever) is not None for lever in _LEVERS):
        return
    callbacks = all_callbacks(trainer)
    added = GradualPruning(0.99, LAMP(power=0.5), phase=Phase(0.0, 1.0))
    callbacks.insert(callbacks.index(guard) + 1, added)  # next in turn for setup, and before any checkpoint
    rank_zero_info(f"{type(guard).__name__} prunes by LAMP scores throughout: no callback beside it compresses.")


def check_guarded(trainer: pl.Trainer, pl_module: pl.LightningModule, guard: pl.Callback, bits: Sequence[int]) -> None:
    """Refuse a run that cannot be guarded.

    Args:
        trainer: The Trainer of the run.
        pl_module: Its model.
        guard: The guard.
        bits: Bits that it will lower weights to.

    Raises:
        ValueError: If the run is not validated, a callback cannot go back or cannot be steered as far, or two callbacks
            answer to one lever.
    """
    name = type(guard).__name__
    check_strategy(trainer, guard)
    why = why_not_validated(trainer, pl_module)
    if why is not None:
        raise ValueError(f"{name} judges by validation data, but {why}")
    for callback in compressing(trainer):
        if callback.keep() is None:
            raise ValueError(
                f"{name} beside {type(callback).__name__}: it cannot take back what that does. Accepted are "
                "GradualPruning and QuantizationAwareTraining."
            )
    for lever in _LEVERS:
        found = steerable(trainer, lever)
        if len(found) > 1:
            raise ValueError(f"{name} beside {len(found)} {type(found[0]).__name__}: accepted is one, which it steers.")
    quantizer = steered(trainer, "bits")
    if quantizer is None:
        return
    try:
        for level in bits:
            quantizer.check_level(level)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}.bits={tuple(bits)!r}: {error}. Accepted are bits that {type(quantizer).__name__} can lower its "
            "weights to, or () to lower none."
        ) from error
