"""How the behaviour matrix trains, and what it compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_compress.callbacks import CompressionReport, FineTuning, GradualPruning, QuantizationAwareTraining

from lightning_compress.phase import Phase

from .zoo import BATCHES, MODULES

EPOCHS = 6
NUM_BATCHES = BATCHES * EPOCHS
SPARSITY = 0.8
PHASES = {
    "prune": Phase(0.2, 0.5),
    "fine-tune": Phase(0.5, 0.6),
    "calibrate": Phase(0.6, 0.7),
    "quantize": Phase(0.7, 1.0),
}
# batches after which a checkpoint is written: before, inside and after each phase
SAVED = (2, 7, 12, 13, 15, 16, 18, 20, 23)


def callbacks() -> list[pl.Callback]:
    """Every callback that acts during training."""
    return [
        CompressionReport(show=False),
        GradualPruning(SPARSITY, phase=PHASES["prune"], every=2),
        FineTuning(PHASES["fine-tune"], "rewind"),
        QuantizationAwareTraining(calibrate=PHASES["calibrate"], phase=PHASES["quantize"], freeze=0.6),
    ]


class SeedEachBatch(pl.Callback):
    """Dropout and noise that depend on the batch's number alone: Lightning does not save random states."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.current_epoch * BATCHES + batch_idx)


class SaveAfter(pl.Callback):
    """Writes a checkpoint after given numbers of batches."""

    def __init__(self, folder: Path, batches: tuple[int, ...]) -> None:
        self.folder, self.batches = folder, batches

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = trainer.current_epoch * BATCHES + batch_idx + 1
        if done in self.batches:
            trainer.save_checkpoint(self.folder / f"{done}.ckpt")


def make_trainer(folder: Path, extra: list[pl.Callback] | None = None, **options: Any) -> pl.Trainer:
    """A small Trainer with all callbacks."""
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 4,
        "default_root_dir": folder,
        "callbacks": [SeedEachBatch(), *callbacks(), *(extra or [])],
    }
    return pl.Trainer(**{**settings, **options})


def make_module(name: str) -> pl.LightningModule:
    """A module of the zoo, always with the same weights."""
    torch.manual_seed(0)
    return MODULES[name]()


def callback_of(trainer: pl.Trainer, kind: type) -> Any:
    """The Trainer's callback of a kind."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def snapshot(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """All that a run leaves behind: weights, optimizers, callbacks' states."""
    states = {key: c.state_dict() for c in trainer.callbacks if (key := c.state_key) and c.state_dict()}
    for state in states.values():
        state.pop("seconds", None)
        if "dense" in state:  # Lightning does not validate again after a resume at the end of an epoch
            state["history"].pop("metric")
    return {
        "weights": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "callbacks": states,
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(a) + [k for k in b if k not in a]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        return [] if same else [f"{path}: {a} != {b}"[:300]]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"[:300]]


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Integers that tell NaNs and signed zeros apart."""
    x = x.detach().contiguous()
    return x.view(torch.int32) if x.dtype == torch.float32 else x
