"""A record applied in the middle of a run: to the module and to all around it that holds on to it."""

from __future__ import annotations

import gc

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_compress.pruning.surgery import Record, apply_record
from lightning_compress.quantization.prepare import prepared

from .clock import all_callbacks
from .pruning import GradualPruning
from .structure import averages

__all__ = ["reshape"]


def reshape(trainer: pl.Trainer, pl_module: pl.LightningModule, record: Record) -> None:
    """Shrink module, optimizers, averages, masks and quantizers; DDP is wrapped around the smaller module anew."""
    strategy = trainer.strategy
    wrapped = isinstance(strategy, DDPStrategy) and strategy.model is not pl_module
    if wrapped:
        strategy.model = pl_module
        gc.collect()
    pruning = [c for c in all_callbacks(trainer) if isinstance(c, GradualPruning)]
    masks = [c.masks for c in pruning if c.masks is not None]
    apply_record(pl_module, record, trainer.optimizers, masks, averages(trainer))
    names = {id(p): name for name, p in pl_module.named_parameters()}
    for callback in pruning:
        _follow(callback, record, names)
    quantization = prepared(pl_module)
    if quantization is not None:
        quantization.layers = [layer for layer in quantization.layers if id(layer.weight) in names]
        quantization.keep({key: record["kept"].get(name, {}) for key, name in names.items()})
    if any(isinstance(module, torch._dynamo.OptimizedModule) for module in pl_module.modules()):
        torch.compiler.reset()  # compiled code holds on to shapes and to modules that are gone
    if wrapped:
        gc.collect()
        strategy.configure_ddp()  # type: ignore[attr-defined]


def _follow(callback: GradualPruning, record: Record, names: dict[int, str]) -> None:
    """Let a gradual pruning forget what it observed of other shapes, and cut the weights it rewinds to."""
    observation = callback._observation
    if observation is not None:
        observation.layers = {key: layer for key, layer in observation.layers.items() if id(layer.weight) in names}
        observation.seen.clear()
        observation._weights.clear()
        observation._batch.clear()
    if callback._rewound is not None:
        for name, axes in record["kept"].items():
            for axis, keep in axes.items():
                value = callback._rewound[name]
                callback._rewound[name] = value.index_select(axis, keep.to(value.device))
        gone = tuple(f"{name}." for name in record["removed"])
        callback._rewound = {k: v for k, v in callback._rewound.items() if not (gone and k.startswith(gone))}
