"""Every module of the zoo with a teacher; those that optimize by hand ask it by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.callbacks import GradualPruning, KnowledgeDistillation
from lightning_compress.phase import Phase

from ..harness import SaveAfter, SeedEachBatch, callback_of
from ..zoo import BATCHES, GAN, MODULES, ManualBoring

EPOCHS = 2
NUM_BATCHES = EPOCHS * BATCHES
BEGIN = 3  # batches before compression begins
PRUNE = Phase(BEGIN / NUM_BATCHES, 0.75)
SAVED = (1, BEGIN, 5, 7)


class Asking:
    """Mix-in: asks the callback for the loss."""

    trainer: Any

    def extended(self, loss: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
        return callback_of(self.trainer, KnowledgeDistillation).loss(loss, outputs, inputs)


class ManualBoringByHand(Asking, ManualBoring):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        outputs = self(batch[0])
        loss = self.extended(self.loss(outputs), outputs, batch[0])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class GANByHand(Asking, GAN):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        real, z = batch
        fake = self(z)
        target = torch.ones(len(real), 1)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(real), target)
        loss = loss + F.binary_cross_entropy_with_logits(self.discriminator(fake.detach()), 1 - target)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        loss = F.binary_cross_entropy_with_logits(self.discriminator(fake), target)
        loss = self.extended(loss, fake, z)
        second.zero_grad()
        self.manual_backward(loss)
        second.step()


BY_HAND: dict[str, type[pl.LightningModule]] = {"manual-boring": ManualBoringByHand, "gan": GANByHand}
TAUGHT = {**MODULES, **BY_HAND}
FEATURES = {"conv+bn+residual": {"net.1": 0.5}, "lstm": {"net": 1.0}, "reused": {"shared": 2.0}, "tied": {"net": 0.1}}


def make_module(name: str) -> pl.LightningModule:
    torch.manual_seed(0)
    return TAUGHT[name]()


def teacher_of(name: str, **options: Any) -> KnowledgeDistillation:
    kind = "mse" if name == "gan" else "kl"
    return KnowledgeDistillation(loss=kind, features=FEATURES.get(name, ()), by_hand=name in BY_HAND, **options)


def make_trainer(folder: Path, *callbacks: pl.Callback, prune: bool = True, **options: Any) -> pl.Trainer:
    """A short run that prunes; the callbacks stand behind the pruning."""
    pruning = [GradualPruning(0.8, phase=PRUNE, every=1)] if prune else []
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "default_root_dir": folder,
        "callbacks": [SeedEachBatch(), *pruning, *callbacks],
    }
    return pl.Trainer(**{**settings, **options})


def save(folder: Path) -> SaveAfter:
    return SaveAfter(folder, (*SAVED, NUM_BATCHES))


def main_output(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, dict) else outputs
