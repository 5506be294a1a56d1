"""One small net that every callback has something to do with, and short runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_compress.analysis.inspect import sparsity, weight_layers
from lightning_compress.quantization.model import quantization_of

from ..harness import SaveAfter
from ..zoo import Classifier, classes, noise

EPOCHS = 10
BATCHES = 4  # per epoch


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


class Small(Classifier):
    """Channels, blocks, a norm to fold; by its validation loss the best model is the first one that may be saved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.log("val_loss", float(self.current_epoch))

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(8, 16), classes()


def make() -> Small:
    torch.manual_seed(0)
    return Small()


def fit(folder: Path, module: Small, *callbacks: Any, saved: tuple[int, ...] = (), **options: Any) -> pl.Trainer:
    """Train for 40 steps, or from a checkpoint (``ckpt_path``) to there."""
    ckpt_path = options.pop("ckpt_path", None)
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
        "callbacks": [*callbacks, SaveAfter(folder, saved)],
    }
    trainer = pl.Trainer(**{**settings, **options})
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def facts(module: Small) -> dict[str, Any]:
    """What a model is, whatever the callbacks say."""
    quantization = quantization_of(module)
    layers = [layer for layer in weight_layers(module) if not layer.name.startswith("average.")]
    params = {name: p for name, p in module.named_parameters() if not name.startswith("average.")}
    return {
        "sparsity": sparsity(layers),
        "blocks": sum(isinstance(block, Block) for block in module.blocks),
        "parameters": sum(p.numel() for p in params.values()),
        "quantized": quantization is not None and quantization.enabled,
    }
