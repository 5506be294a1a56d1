"""A module whose hooks write down all that they can see, each time that they are called."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from ..zoo import noise

BATCHES = 4

Row = dict[str, Any]
SEEN: list[Row] = []
"""What the hooks of all modules have seen, since a test has emptied it; a copy of a module writes here, too."""


class Sees(pl.LightningModule):
    """Logs in every way, asks for everything, keeps lists, and has a frozen backbone that stays in eval mode."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()).requires_grad_(False).eval()
        self.head = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 4))
        self.accuracy = MulticlassAccuracy(4)
        self.kept: list[Tensor] = []
        self.features: dict[str, Tensor] = {}
        self.calls = 0
        self.automatic_optimization = not manual
        num_seen = 0

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:  # sees the module from outside of it
            nonlocal num_seen
            num_seen += 1
            self.calls += 1
            self.features["hidden"] = output.detach()
            self.num_seen = num_seen

        self.head[0].register_forward_hook(hook)
        self.head[0].register_forward_pre_hook(self.count)

    def count(self, module: nn.Module, args: Any) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        self.look("forward", x=x)
        return self.head(self.backbone(x))

    def look(self, hook: str, **tensors: Tensor) -> None:
        """Write down what there is to be seen."""
        t = self.trainer
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        own = {id(p) for p in self.parameters()}
        state = [v.double().sum().item() for s in optimizer.state.values() for v in s.values()]
        row: Row = {
            "hook": hook,
            "clock": [self.global_step, self.current_epoch, t.global_step, t.current_epoch, t.max_epochs, t.max_steps],
            "counts": [
                t.num_training_batches,
                list(t.num_val_batches),
                t.estimated_stepping_batches,
                t.limit_val_batches,
            ],
            "state": [str(t.state.fn), str(t.state.stage), str(t.state.status), t.training, t.validating, t.evaluating],
            "sanity": t.sanity_checking,
            "logged": {k: float(v) for k, v in t.callback_metrics.items()},
            "progress bar": {k: float(v) for k, v in t.progress_bar_metrics.items() if k != "v_num"},
            "callbacks": [id(callback) for callback in t.callbacks],
            "loggers": [isinstance(x, CSVLogger | TensorBoardLogger) for x in t.loggers],
            "folders": [
                t.log_dir,
                t.default_root_dir,
                *(x.log_dir for x in t.loggers),
                *(x.version for x in t.loggers),
            ],
            "logger": None if self.logger is None else [self.logger.name, self.logger.save_dir],
            "ranks": [t.is_global_zero, t.world_size, t.local_rank, t.global_rank, self.global_rank, t.num_devices],
            "precision": [t.precision, type(t.precision_plugin).__name__, str(torch.get_default_dtype())],
            "autocast": [torch.is_autocast_enabled("cpu"), str(torch.get_autocast_dtype("cpu"))],
            "autograd": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
            "strategy": [type(t.strategy).__name__, str(t.strategy.root_device), type(t.accelerator).__name__],
            "device": [str(self.device), str(self.dtype), *{str(p.device) for p in self.parameters()}],
            "modes": [module.training for module in self.modules()],
            "it is the model": [t.lightning_module is self, t.model is self, t.strategy.model is self],
            "data": [type(t.datamodule).__name__, t.fit_loop.epoch_loop.batch_idx, t.fit_loop.epoch_loop.global_step],
            "optimizer": [
                type(optimizer).__name__,
                [g["lr"] for g in optimizer.param_groups],
                len(t.optimizers),
                state,
            ],
            "its parameters": all(id(p) in own for g in optimizer.param_groups for p in g["params"]),
            "scheduler": [type(scheduler).__name__, scheduler.last_epoch, scheduler.get_last_lr()],
            "weights": [v.double().sum().item() for v in self.state_dict().values()],
            "kept": [len(self.kept), sorted(self.features), self.calls, self.num_seen if self.calls else 0],
            "metric": [v.double().sum().item() for v in self.accuracy.metric_state.values()],
            "random": [torch.get_rng_state().sum().item(), np.random.get_state()[2], hash(random.getstate())],
            "tensors": {k: [str(x.dtype), str(x.device), x.double().sum().item()] for k, x in tensors.items()},
            "gathered": list(self.all_gather(torch.ones(2)).shape),
        }
        SEEN.append(row)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.look("on_train_batch_start", x=batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.look("training_step", x=batch[0])
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        self.untoggle_optimizer(optimizer)
        return None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.look("on_before_batch_transfer", x=batch[0])
        return batch[0] + 1, batch[1]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.look(f"transfer_batch_to_device {device}", x=batch[0])
        return move_data_to_device(batch, device)

    def on_validation_model_zero_grad(self) -> None:
        super().on_validation_model_zero_grad()
        self.look("on_validation_model_zero_grad")

    def on_validation_start(self) -> None:
        self.look("on_validation_start")

    def on_validation_epoch_start(self) -> None:
        self.kept.clear()
        self.look("on_validation_epoch_start")

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.look(f"on_validation_batch_start {batch_idx}", x=batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.look("validation_step", x=batch[0], logits=logits, hidden=self.features["hidden"])
        self.accuracy(logits.float(), batch[1])
        loss = F.cross_entropy(logits.float(), batch[1])
        self.log("val_loss", loss, on_step=True, on_epoch=True, logger=True, prog_bar=True, sync_dist=True)
        self.log_dict({"val_acc": self.accuracy}, on_step=False, on_epoch=True)
        self.log("val_hidden", loss, logger=False)
        self.kept.append(logits)
        return loss

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(f"on_validation_batch_end {batch_idx}", loss=outputs)

    def on_validation_epoch_end(self) -> None:
        self.look("on_validation_epoch_end", logits=torch.cat(self.kept))
        self.log("val_norm", torch.cat(self.kept).float().norm())
        step = self.global_step
        for logger in self.loggers:
            logger.log_metrics({"direct": 1.0}, step=step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_scalar("by_hand", 1.0, step)
                assert logger.experiment.get_logdir() == logger.log_dir
        if not self.automatic_optimization:  # of a copy's, it does no harm
            self.optimizers().param_groups[0]["lr"] *= 0.9

    def on_validation_end(self) -> None:
        self.look("on_validation_end")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.head.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Data(pl.LightningDataModule):
    """Its hooks see the Trainer, too."""

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(TensorDataset(noise(32, 16), torch.arange(32) % 4), 8, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(noise(16, 16, seed=2), torch.arange(16) % 4), 8)


class Passes(pl.Callback):
    """Makes passes of ours right before the user's own validation, and keeps what the hooks saw in each."""

    def __init__(self, passes: dict[str, Callable[[pl.Trainer, pl.LightningModule], Any]], batch: int = 1) -> None:
        self.passes, self.batch = passes, batch
        self.seen: dict[str, list[Row]] = {}
        self.given: dict[str, Any] = {}
        self.validated: dict[str, float] = {}  # by the user's own validation

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.current_epoch == 1:
            for name, run in self.passes.items():
                SEEN.clear()
                self.given[name] = run(trainer, pl_module)
                self.seen[name] = list(SEEN)
            SEEN.clear()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.seen and not self.validated:
            self.validated = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1 and self.seen and "user" not in self.seen:
            self.seen["user"] = list(SEEN)
