"""A checkpoint of another shape is followed; what cannot be loaded is refused in words, before Lightning loads it."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_compress.checkpoint import check_structure, follow_structure

from .protocol import averages

__all__ = ["check_strategy", "check_structure_on_load", "is_model_parallel"]


def is_model_parallel(trainer: pl.Trainer) -> bool:
    """Whether the weights are DTensors (FSDP2, tensor parallelism)."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_strategy(trainer: pl.Trainer, callback: pl.Callback, model_parallel: bool = False) -> None:
    """Raise for strategies that shard the model: each process then holds but a part of it.

    Args:
        trainer: The Trainer of the run.
        callback: Which callback asks.
        model_parallel: Whether it works under ModelParallelStrategy.

    Raises:
        ValueError: If the strategy is one of them.
    """
    sharding = trainer.strategy.restore_checkpoint_after_setup
    if sharding and not (model_parallel and is_model_parallel(trainer)):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__}: {type(callback).__name__} does not know sharded models. "
            "Accepted are single-device and DDP strategies, and ModelParallelStrategy by GradualPruning, RigL and SET; "
            "never FSDPStrategy and DeepSpeedStrategy. Train with Trainer(strategy='ddp')."
        )


def check_structure_on_load(pl_module: pl.LightningModule) -> None:
    """Let the module take a checkpoint's structure and compare itself with it before it loads; once.

    The module's own hook is the only one that runs before its weights are loaded.
    """
    if "on_load_checkpoint" not in pl_module.__dict__:
        pl_module.__dict__["on_load_checkpoint"] = partial(_load_checked, pl_module)


def _load_checked(pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    type(pl_module).on_load_checkpoint(pl_module, checkpoint)
    trainer = pl_module._trainer  # noqa: SLF001  # the property raises where there is none
    for model in (pl_module, *(averages(trainer) if trainer is not None else ())):
        follow_structure(model, checkpoint)
    if "state_dict" in checkpoint:  # a ModelParallelStrategy has loaded the weights by itself by now
        check_structure(pl_module, checkpoint["state_dict"], strict=pl_module.strict_loading)
