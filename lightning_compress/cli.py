"""The command ``lightning-compress``: compose a run with Hydra, train, report, return the objective."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    pass

__all__ = ["CompareRuns", "main", "train"]


def build(node: Any, **options: Any) -> Any:
    """The object that a configuration node names by ``_target_``; the only place that instantiates."""
    return hydra.utils.instantiate(node, _convert_="all", **options)


def train(cfg: DictConfig) -> float | None:
    """Train as configured.

    Args:
        cfg: The composed configuration; conf/config.yaml names its fields.

    Returns:
        The objective: the value of the report, or without a report of the logged metrics, that ``cfg.objective`` names.

    Raises:
        ValueError: If the compression group was not found, or a checkpoint does not fit the model.
        FileNotFoundError: If a checkpoint does not exist.
    """
    from lightning_compress.callbacks import CompressionReport

    check(cfg)
    control = _train_control(cfg) if cfg.control else None
    callbacks = _build_all(cfg.compression) + _build_all(cfg.callbacks)
    reports = [callback for callback in callbacks if isinstance(callback, CompressionReport)]
    for report in reports:
        report.control = control
    loggers = _build_all(cfg.logger)
    trainer, model, data = _trainer_model_data(cfg, callbacks, loggers)
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    try:
        trainer.fit(model, data, ckpt_path=cfg.ckpt_path)
    finally:
        if "wandb" in sys.modules:  # else the next job of a sweep goes on in this job's run
            sys.modules["wandb"].finish()
    found: Any = reports[0].report if reports else {name: float(v) for name, v in trainer.callback_metrics.items()}
    for key in str(cfg.objective).split("."):
        found = (found[int(key)] if isinstance(found, list) else found.get(key)) if found else None
    return found


def check(cfg: DictConfig) -> None:
    """Refuse a configuration that would train something else than asked for.

    Raises:
        ValueError: If compression is not a group of callbacks, or model or data name no class.
        FileNotFoundError: If a checkpoint does not exist.
    """
    if cfg.compression is not None and not isinstance(cfg.compression, DictConfig):
        raise ValueError(
            f"compression={cfg.compression!r} is a plain value: its configuration group was not found, and the run "
            "would train uncompressed. Add hydra.searchpath=[pkg://lightning_compress.conf], or name a recipe: "
            "magnitude, int8, prune_int8, finetune."
        )
    for field in ("model", "data"):
        if cfg[field] is None or OmegaConf.is_missing(cfg[field], "_target_"):
            raise ValueError(
                f"{field} names no class. Give {field}._target_=your.module.Class, or an experiment such as "
                "experiment=mnist_prune_int8."
            )
    for field in ("init_from", "ckpt_path"):
        if cfg[field] is not None and not Path(cfg[field]).is_file():
            raise FileNotFoundError(
                f"{field}={cfg[field]!r}: there is no such checkpoint. Give the path of a .ckpt file."
            )


def _build_all(group: DictConfig | None) -> list[Any]:
    return [build(node) for node in (group or {}).values() if node]


def _trainer_model_data(cfg: DictConfig, callbacks: list[Any], loggers: Any) -> tuple[Any, Any, Any]:
    """A Trainer, and the model as it starts: from scratch by the seed, or from the weights of a checkpoint."""
    import lightning.pytorch as pl
    import torch

    from lightning_compress.checkpoint import check_structure

    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    model, data = build(cfg.model), build(cfg.data)
    if cfg.init_from is not None:
        weights = torch.load(cfg.init_from, map_location="cpu", weights_only=True)["state_dict"]
        check_structure(model, weights)
        model.load_state_dict(weights)
    trainer = build(cfg.trainer, _partial_=True)(callbacks=callbacks, logger=loggers)
    return trainer, model, data


def _train_control(cfg: DictConfig) -> dict[str, Any]:
    """The dense control: the same start, data, batch order and number of steps, without compression."""
    from lightning.pytorch.utilities import rank_zero_info

    from lightning_compress.callbacks import Export
    from lightning_compress.callbacks.measure import measure

    rank_zero_info("Training the dense control first: the same run without compression.")
    trainer, model, data = _trainer_model_data(cfg, [], False)
    for callback in trainer.checkpoint_callbacks:
        trainer.callbacks.remove(callback)
    trainer.fit(model, data)
    formats = [f for callback in _build_all(cfg.compression) if isinstance(callback, Export) for f in callback.formats]
    return measure(trainer, model, formats)


class CompareRuns(Callback):
    """At the end of a sweep prints one table of its runs, read back from their offline W&B files."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, if any run was logged offline."""
        from rich.console import Console

        from lightning_compress.analysis.compare import comparison_table, offline_runs

        runs = offline_runs(config.hydra.sweep.dir)
        if runs:
            Console().print(comparison_table(runs))


@hydra.main(version_base="1.3", config_path="pkg://lightning_compress.conf", config_name="config")
def _main(cfg: DictConfig) -> float | None:
    return train(cfg)


def main() -> None:
    """Run the command; modules of the current folder can be named in ``_target_``."""
    sys.path.insert(0, os.getcwd())
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # Lightning's own, of torch 2.13
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "Tip:" not in record.getMessage())
    _main()


if __name__ == "__main__":
    main()
