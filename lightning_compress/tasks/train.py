"""Train, report, return the objective."""

from __future__ import annotations

import math
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_compress.tasks.compose import build_all, check, start

__all__ = ["train"]


def train(cfg: DictConfig) -> Any:
    """Train as configured.

    Args:
        cfg: The composed configuration; conf/config.yaml names its fields.

    Returns:
        The objective: the value of the report, or without a report of the logged metrics, that ``cfg.objective`` names;
        a list of values for a list of names; nan of a run that ``cfg.hopeless`` ended.

    Raises:
        ValueError: If the compression group was not found, or a checkpoint does not fit the model.
        FileNotFoundError: If a checkpoint does not exist.
    """
    from lightning_compress.callbacks import CompressionReport
    from lightning_compress.callbacks.sweep import RunStopped, StopUnderperforming

    check(cfg)
    control = _train_control(cfg) if cfg.control else None
    callbacks = build_all(cfg.compression) + build_all(cfg.callbacks)
    reports = [callback for callback in callbacks if isinstance(callback, CompressionReport)]
    for report in reports:
        report.control = control
    if cfg.hopeless is not None:
        callbacks.append(StopUnderperforming(cfg.dir, cfg.hopeless))
    loggers = build_all(cfg.logger)
    trainer, model, data = start(cfg, callbacks, loggers)
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    try:
        trainer.fit(model, data, ckpt_path=cfg.ckpt_path)
    except RunStopped:
        return [math.nan for _ in cfg.objective] if OmegaConf.is_list(cfg.objective) else math.nan
    finally:
        if "wandb" in sys.modules:  # else the next job of a sweep goes on in this job's run
            sys.modules["wandb"].finish()
    found: Any = reports[0].report if reports else {name: float(v) for name, v in trainer.callback_metrics.items()}
    if OmegaConf.is_list(cfg.objective):
        return [_value(found, name) for name in cfg.objective]
    return _value(found, cfg.objective)


def _value(found: Any, name: str) -> Any:
    """A value of the report, or of the logged metrics."""
    if isinstance(found, dict) and name in found:
        return found[name]
    for key in str(name).split("."):
        found = (found[int(key)] if isinstance(found, list) else found.get(key)) if found else None
    return found


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
