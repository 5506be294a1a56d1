"""What becomes of a pruned run in the loop around it: ours beside Lightning's ModelPruning and torch's pruning.

Every method prunes the same MLP on the same data to 80 % over 6 epochs of one Trainer.fit, and is then resumed, loaded,
copied and averaged.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.callbacks import GradualPruning
from lightning_compress.phase import Phase

TARGET, EPOCHS = 0.8, 6


class MLP(pl.LightningModule):
    """Three linear layers on random data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader:
        """16 batches of 32."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(512, 64, generator=generator)
        return DataLoader(TensorDataset(x, torch.arange(512) % 10), 32)


class TorchPruning(pl.Callback):
    """torch.nn.utils.prune called at the end of each epoch, as its tutorial does."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune to the linear schedule's value of the remaining weights."""
        layers = [(m, "weight") for m in pl_module.modules() if isinstance(m, nn.Linear)]
        before, now = (TARGET * min(1, e / (EPOCHS - 1)) for e in (trainer.current_epoch, trainer.current_epoch + 1))
        amount = 1 - (1 - min(now, TARGET)) / (1 - before)
        prune.global_unstructured(layers, prune.L1Unstructured, amount=amount)


METHODS: dict[str, Callable[[], pl.Callback]] = {
    "GradualPruning (ours)": lambda: GradualPruning(TARGET, phase=Phase(0.0, 0.8), every=4),
    "ModelPruning(amount=0.8)": lambda: ModelPruning("l1_unstructured", amount=TARGET, use_global_unstructured=True),
    "ModelPruning(gradual)": lambda: ModelPruning(
        "l1_unstructured",
        amount=lambda epoch: TARGET * min(1.0, (epoch + 1) / (EPOCHS - 1)),
        use_global_unstructured=True,
    ),
    "torch.nn.utils.prune": TorchPruning,
}


def sparsity(module: nn.Module) -> float:
    """Share of zeros in the weights that the linear layers compute with."""
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def fit(callbacks: list[pl.Callback], ckpt_path: Path | None = None) -> tuple[pl.Trainer, MLP]:
    """One run from the same weights."""
    pl.seed_everything(0, verbose=False)
    module = MLP()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", enable_model_summary=False, callbacks=callbacks, **options
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return trainer, module


def attempt(call: Callable[[], Any]) -> Any:
    """The result, or the name of what was raised."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}"


class StopAfter(pl.Callback):
    """Writes a checkpoint at the end of an epoch."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write."""
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def measure(method: Callable[[], pl.Callback], folder: Path) -> dict[str, Any]:
    """All that is asked of one method."""
    path = folder / "half.ckpt"
    _, module = fit([method(), StopAfter(path, EPOCHS - 2)])
    end = module.state_dict()
    saved = torch.load(path, weights_only=False)["state_dict"]

    def resumed() -> tuple[float, bool]:
        _, again = fit([method()], ckpt_path=path)
        theirs = again.state_dict()
        same = theirs.keys() == end.keys() and all(torch.equal(end[k], theirs[k]) for k in end)
        return sparsity(again), same

    def loads() -> str:
        MLP().load_state_dict(saved)
        return "yes"

    found = attempt(resumed)
    return {
        "asked": TARGET,
        "reached": sparsity(module),
        "after resume": found if isinstance(found, str) else found[0],
        "resume identical": found if isinstance(found, str) else ("yes" if found[1] else "no"),
        "plain load inside": attempt(loads),
        "deepcopy inside": attempt(lambda: fit([method(), _Copy()]) and "yes"),
        "with EMA": attempt(lambda: sparsity(fit([method(), EMAWeightAveraging(decay=0.9)])[1])),
    }


class _Copy(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As a callback that keeps a copy of the model does."""
        copy.deepcopy(pl_module)


def run() -> dict[str, Any]:
    """Headline: how far each method ends from the sparsity it was asked for, after a resume."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = []
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        for name, method in METHODS.items():
            rows.append({"method": name, **measure(method, Path(folder))})
    headline = {row["method"]: row["after resume"] - TARGET for row in rows if not isinstance(row["after resume"], str)}
    return {"headline": headline, "rows": rows}
