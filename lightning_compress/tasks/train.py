"""Train, report, return the objective."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_compress.checks import check_flag, check_one_of
from lightning_compress.metrics import MODES
from lightning_compress.tasks.compose import build_all, check, start
from lightning_compress.tasks.objective import check_objective, value_of
from lightning_compress.tracking import finish_run

__all__ = ["train"]


def train(cfg: DictConfig) -> Any:
    """Train as configured.

    Args:
        cfg: The composed configuration; conf/config.yaml names its fields.

    Returns:
        The objective: the value of the report, or without a report of the logged metrics, that ``cfg.objective`` names;
        a list of values for a list of names; nan of a run that ``cfg.hopeless`` ended.

    Raises:
        ValueError: If the compression group was not found, the objective names nothing, or a checkpoint does not fit
            the model.
        FileNotFoundError: If a checkpoint does not exist.
    """
    from lightning_compress.callbacks import CompressionReport, Export
    from lightning_compress.callbacks.sweep import RunStopped, StopUnderperforming

    check(cfg)
    callbacks = build_all(cfg.compression) + build_all(cfg.callbacks)
    _tell(cfg, callbacks)
    reports = [callback for callback in callbacks if isinstance(callback, CompressionReport)]
    names = list(cfg.objective) if OmegaConf.is_list(cfg.objective) else [cfg.objective]
    for name in names if reports else ():
        check_objective(name)
    for callback in callbacks:  # the folder of the run, and not that of the logger in it
        if isinstance(callback, CompressionReport | Export) and callback.dirpath is None:
            callback.dirpath = Path(cfg.dir, "deploy" if isinstance(callback, Export) else "")
    if cfg.control:
        control = _train_control(cfg)
        for callback in reports:
            callback.control = control
    if cfg.hopeless is not None:
        callbacks.append(StopUnderperforming(cfg.dir, cfg.hopeless, cfg.monitor, cfg.mode))
    loggers = build_all(cfg.logger)
    trainer, model, data = start(cfg, callbacks, loggers)
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    try:
        trainer.fit(model, data, ckpt_path=cfg.ckpt_path, weights_only=cfg.weights_only)
    except RunStopped:
        return [math.nan for _ in cfg.objective] if OmegaConf.is_list(cfg.objective) else math.nan
    finally:
        if "wandb" in sys.modules:  # else the next job of a sweep goes on in this job's run
            finish_run()
    report = reports[0].report if reports else None
    values = [value_of(report, trainer.callback_metrics, name) for name in names]
    return values if OmegaConf.is_list(cfg.objective) else values[0]


def _tell(cfg: DictConfig, callbacks: list[Any]) -> None:
    """Let callbacks take what is said of the whole run: the metric, if they name none; whether targets are strict."""
    from lightning_compress.callbacks import AccuracyGuard, CompressionReport, Export
    from lightning_compress.callbacks.protocol import Targeted

    check_one_of("mode", cfg.mode, MODES, "Take 'max' if higher is better.")
    check_flag("strict", cfg.strict)
    for callback in callbacks:
        if cfg.strict and isinstance(callback, Targeted):
            callback.strict = True  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, AccuracyGuard | CompressionReport | Export) and callback.monitor is None:
            callback.monitor = cfg.monitor
            callback.mode = callback.mode or cfg.mode


def _train_control(cfg: DictConfig) -> dict[str, Any]:
    """The dense control: the same start, data, batch order and number of steps, without compression."""
    from lightning.pytorch.utilities import rank_zero_info

    from lightning_compress.callbacks import Export
    from lightning_compress.callbacks.measure import measure

    rank_zero_info("Training the dense control first: the same run without compression.")
    trainer, model, data = start(cfg, [], False)
    for callback in trainer.checkpoint_callbacks:
        trainer.callbacks.remove(callback)
    trainer.fit(model, data)
    formats = [f for callback in build_all(cfg.compression) if isinstance(callback, Export) for f in callback.formats]
    return measure(trainer, model, formats)
