"""What is trained: one small net, data that can be taken up in the middle, and callbacks in many combinations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_compress.analysis.inspect import sparsity, weight_layers
from lightning_compress.callbacks import (
    SET,
    AccuracyGuard,
    ChannelPruning,
    CompressionReport,
    Export,
    FineTuning,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.phase import Phase
from lightning_compress.pruning import Criterion, MeanActivation, Taylor

__all__ = ["COMBINATIONS", "Combination", "Loader", "Net", "make_trainer"]

BATCHES = 8  # per epoch
EPOCHS = 3
NUM_STEPS = BATCHES * EPOCHS


class Block(nn.Module):
    """A residual block, which may be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 16)
        self.b = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        """A sum."""
        return x + self.b(self.a(x).relu())


class Net(pl.LightningModule):
    """Channels, blocks and a norm to fold; its metric falls with sparsity, so that a guard has something to take back.

    Args:
        plain: Whether its data are those of a DataLoader, which start again where a run is taken up within an epoch.
    """

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(12, 4)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        """Four classes."""
        return self.head(self.blocks(self.stem(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """What is validated, and what sparsity costs."""
        cost = 10 * max(0.0, sparsity(weight_layers(self)) - 0.6)
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]) + cost)
        self.log("val_acc", 0.9 - cost)

    def configure_optimizers(self) -> Any:
        """Adam, whose state has to come back, and a rate that falls."""
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    def train_dataloader(self) -> Any:
        """Batches that all differ."""
        return Again(BATCHES) if self.plain else Loader(BATCHES)

    def val_dataloader(self) -> Any:
        """Two batches."""
        return Again(2)


def batch_of(seed: int) -> list[Tensor]:
    """One batch, always the same: inputs, classes, and its number."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 16, generator=generator), torch.arange(8) % 4, torch.tensor(seed)]


class Again:
    """What a DataLoader without a state is: whoever iterates begins anew."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[list[Tensor]]:
        return (batch_of(i) for i in range(self.num))


class Loader(Again):
    """A loader that shuffles each epoch anew and whose place is in the checkpoint, such as torchdata's stateful one."""

    def __init__(self, num: int) -> None:
        super().__init__(num)
        self.epoch = 0
        self.given = 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        if self.given >= self.num:
            self.epoch += 1
            self.given = 0
        order = torch.randperm(self.num, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for i in order[self.given :]:
            self.given += 1
            yield batch_of(i)

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go there."""
        self.epoch = state_dict["epoch"]
        self.given = state_dict["given"]


@dataclass(frozen=True)
class Combination:
    """Callbacks that are trained together.

    Args:
        callbacks: Makes them, given the folder of the run.
        options: Of the Trainer.
        every: Steps between two checkpoints.
        only: The places where it is killed; all without any.
        plain: Whether the data start again where a run is taken up.
    """

    callbacks: Callable[[Path], list[pl.Callback]]
    options: dict[str, Any] = field(default_factory=dict)
    every: int = 3
    only: tuple[str, ...] = ()
    plain: bool = False


def make_trainer(
    combination: Combination, folder: Path, front: pl.Callback, behind: pl.Callback, ours: bool = True
) -> pl.Trainer:
    """A Trainer as a user writes it, who keeps the last checkpoint of every few steps.

    Args:
        combination: What is trained.
        folder: Of the run.
        front: A callback in front of all others.
        behind: One behind ours.
        ours: Whether ours are there; a control has none.
    """
    saver = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=combination.every, save_last=True)
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "val_check_interval": 0.5,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 2,
        "default_root_dir": folder,
    }
    callbacks = combination.callbacks(folder) if ours else []
    return pl.Trainer(callbacks=[front, *callbacks, behind, saver], **{**settings, **combination.options})


PRUNE = Phase(0.1, 0.5)
WHOLE = Phase(0.1, 0.9)


def prune(phase: Phase = PRUNE, criterion: Criterion | None = None, sparsity: float = 0.8) -> GradualPruning:
    """Masks that grow every second step."""
    return GradualPruning(sparsity, criterion=criterion, phase=phase, every=2)


def quantize(begin: float = 0.2, middle: float = 0.5, scheme: Any = "int8") -> QuantizationAwareTraining:
    """Ranges that are calibrated, then trained, then frozen."""
    return QuantizationAwareTraining(scheme, Phase(begin, middle), Phase(middle, 1.0), freeze=0.6)


def together(folder: Path) -> list[pl.Callback]:
    """All that one run can do, but export."""
    return [
        CompressionReport(folder, show=False),
        ChannelPruning(0.3, phase=Phase(0.05, 0.15)),
        prune(Phase(0.2, 0.6), sparsity=0.7),
        quantize(0.6, 0.7),
        KnowledgeDistillation(alpha=0.5),
        EMAWeightAveraging(decay=0.5),
    ]


def exported(folder: Path) -> list[pl.Callback]:
    """All of it."""
    return [*together(folder), Export(["onnx"], folder / "deploy", rehearse=False)]


def guarded(folder: Path) -> list[pl.Callback]:
    """A guard that steers both, and says at the end what became of it."""
    guard = AccuracyGuard(0.01, monitor="val_acc", mode="max", bits=(4, 3))
    return [CompressionReport(folder, show=False), prune(Phase(0.1, 0.6), sparsity=0.95), quantize(0.6, 0.7), guard]


COMBINATIONS: dict[str, Combination] = {
    "GradualPruning": Combination(lambda folder: [prune()]),
    "GradualPruning, each checkpoint on a validation": Combination(lambda folder: [prune()], every=4),
    "GradualPruning, a plain DataLoader": Combination(lambda folder: [prune()], plain=True),
    "MeanActivation": Combination(lambda folder: [prune(criterion=MeanActivation())]),
    "Taylor, 2 batches a step": Combination(
        lambda folder: [prune(WHOLE, Taylor())], {"accumulate_grad_batches": 2, "val_check_interval": 3}
    ),
    "RigL": Combination(lambda folder: [RigL(0.6, phase=WHOLE, every=2)]),
    "SET": Combination(lambda folder: [SET(0.6, phase=WHOLE, every=2)]),
    "ChannelPruning": Combination(lambda folder: [ChannelPruning(0.5, phase=WHOLE, steps=3)]),
    "LayerPruning": Combination(lambda folder: [LayerPruning(1, max_share=1.0, phase=PRUNE)]),
    "QAT, affine": Combination(lambda folder: [quantize()]),
    "QAT, learned steps": Combination(lambda folder: [quantize(scheme="lsq")]),
    "QAT, levels": Combination(lambda folder: [quantize(scheme="log4")]),
    "PostTrainingQuantization": Combination(lambda folder: [PostTrainingQuantization("int8", Phase(0.5, 1.0))]),
    "KnowledgeDistillation": Combination(lambda folder: [prune(), KnowledgeDistillation(alpha=0.5)]),
    "AccuracyGuard": Combination(lambda folder: [AccuracyGuard(0.01, monitor="val_acc")]),
    "AccuracyGuard, each checkpoint on a validation": Combination(guarded, every=4),
    "FineTuning": Combination(
        lambda folder: [prune(), FineTuning(Phase(0.5, 0.8), "rewind", freeze=["stem"]), quantize(0.8, 0.9)]
    ),
    "WeightAveraging": Combination(
        lambda folder: [prune(), ChannelPruning(0.3, phase=Phase(0.6, 0.8)), EMAWeightAveraging(decay=0.5)]
    ),
    "prune + QAT, 2 batches a step": Combination(
        lambda folder: [prune(), quantize(0.5, 0.7)],
        {"accumulate_grad_batches": 2, "val_check_interval": 3},
        every=2,
    ),
    "all but Export": Combination(together),
    # which takes longest
    "all": Combination(exported, only=("export", "packed file", "report", "a file's renaming", "on_fit_end, before")),
}
