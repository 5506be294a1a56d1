"""The shape of a model that lives in a Trainer: changed in the middle of a run, or by a checkpoint of another shape."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lightning_compress.checkpoint import add_records, check_structure, follow_structure, read_checkpoint
from lightning_compress.checks import first_line
from lightning_compress.quantization.model import quantization_of
from lightning_compress.structure.record import Record, apply_record

from .protocol import Compressing, Following, all_callbacks, averages

__all__ = ["CutError", "check_package", "check_strategy", "check_structure_on_load", "is_model_parallel", "tell"]

_KEYS = ("state_dict", "pytorch-lightning_version")


def is_model_parallel(trainer: pl.Trainer) -> bool:
    """Whether the weights are DTensors (FSDP2, tensor parallelism)."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_package(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Raise for a Trainer of pytorch_lightning, a twin of lightning.pytorch whose classes are others.

    It takes any callback and calls its hooks, so that half of a run would work.

    Raises:
        TypeError: If the Trainer is one.
    """
    packages = {kind.__module__.partition(".")[0] for kind in type(trainer).__mro__}
    if "pytorch_lightning" in packages:
        raise TypeError(
            f"{type(callback).__name__}: the Trainer is one of pytorch_lightning. Accepted is one of "
            "lightning.pytorch, another package with the same names. Replace `import pytorch_lightning as pl` by "
            "`import lightning.pytorch as pl`, where the LightningModule is defined, too."
        )


def check_strategy(trainer: pl.Trainer, callback: pl.Callback, model_parallel: bool = False) -> None:
    """Raise for strategies that shard the model: each process then holds but a part of it; or for another package.

    Args:
        trainer: The Trainer of the run.
        callback: Which callback asks.
        model_parallel: Whether it works under ModelParallelStrategy.

    Raises:
        ValueError: If the strategy is one of them.
    """
    check_package(trainer, callback)
    sharding = trainer.strategy.restore_checkpoint_after_setup
    if sharding and not (model_parallel and is_model_parallel(trainer)):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__}: {type(callback).__name__} does not know sharded models. "
            "Accepted are single-device and DDP strategies, and ModelParallelStrategy by GradualPruning, RigL, SET and "
            "FineTuning; never FSDPStrategy and DeepSpeedStrategy. Train with Trainer(strategy='ddp')."
        )


def check_structure_on_load(pl_module: pl.LightningModule) -> None:
    """Let the module take a checkpoint's structure and compare itself with it before it loads; once.

    The module's own hook is the only one that runs before its weights are loaded, and the only one that runs when
    weights alone are saved: it adds what a loader needs to know. A file that cannot be read does not get that far: it
    is refused where the strategy reads it.
    """
    strategy = pl_module.trainer.strategy
    if "load_checkpoint" not in strategy.__dict__:
        strategy.__dict__["load_checkpoint"] = partial(_read_checked, strategy)
    if "on_load_checkpoint" not in pl_module.__dict__:
        pl_module.__dict__["on_load_checkpoint"] = partial(_load_checked, pl_module)
        pl_module.__dict__["on_save_checkpoint"] = partial(_save_records, pl_module)


def _read_checked(strategy: Strategy, checkpoint_path: str | Path, **options: Any) -> dict[str, Any]:
    def load() -> dict[str, Any]:
        return type(strategy).load_checkpoint(strategy, checkpoint_path, **options)

    sharded = strategy.restore_checkpoint_after_setup  # it loads the weights by itself
    return read_checkpoint("ckpt_path", checkpoint_path, load, () if sharded else _KEYS)


def _load_checked(pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    type(pl_module).on_load_checkpoint(pl_module, checkpoint)
    trainer = pl_module._trainer  # noqa: SLF001  # the property raises where there is none
    for model in (pl_module, *(averages(trainer) if trainer is not None else ())):
        follow_structure(model, checkpoint)
    if "state_dict" in checkpoint:  # a ModelParallelStrategy has loaded the weights by itself by now
        check_structure(pl_module, checkpoint["state_dict"], strict=pl_module.strict_loading)


def _save_records(pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    type(pl_module).on_save_checkpoint(pl_module, checkpoint)
    trainer = pl_module._trainer  # noqa: SLF001  # the property raises where there is none
    if trainer is not None and "callbacks" not in checkpoint:  # only weights are saved
        callbacks = [callback for callback in all_callbacks(trainer) if isinstance(callback, Compressing)]
        add_records(checkpoint, {callback.state_key: callback.state_dict() for callback in callbacks})


class CutError(RuntimeError):
    """The shape of a model could not be changed, and is what it was."""


def tell(trainer: pl.Trainer, record: Record) -> None:
    """Change the shape of the model in the middle of its run, and tell all that hold on to it.

    The optimizers' state, averaged copies and quantizers are cut alike, every callback that follows is told, compiled
    code is dropped, and DDP is wrapped around the model anew.

    Raises:
        CutError: If the model or what trains it could not be cut; all is then as it was.
    """
    pl_module = trainer.lightning_module
    with _unwrapped(trainer):
        try:
            apply_record(pl_module, record, trainer.optimizers, averages(trainer))
        except Exception as error:
            raise CutError(first_line(error)) from error
        quantization = quantization_of(pl_module)
        if quantization is not None:
            quantization.follow(pl_module, record)
        followers = [callback for callback in all_callbacks(trainer) if isinstance(callback, Following)]
        # Those that compress come first: they may change weights, which the others look at.
        for callback in sorted(followers, key=lambda callback: not isinstance(callback, Compressing)):
            callback.follow(pl_module, record)
        if any(isinstance(module, torch._dynamo.OptimizedModule) for module in pl_module.modules()):
            torch.compiler.reset()  # compiled code holds on to shapes and to modules that are gone


@contextmanager
def _unwrapped(trainer: pl.Trainer) -> Iterator[None]:
    """Without DDP's wrapper, whose buckets have the shapes of the parameters; a new one is made at the end."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or strategy.model is trainer.lightning_module:
        yield
        return
    strategy.model = trainer.lightning_module
    gc.collect()  # the wrapper's hooks on the parameters go with it
    try:
        yield
    finally:
        gc.collect()
        strategy.configure_ddp()
