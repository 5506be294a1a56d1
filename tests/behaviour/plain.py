"""A module that many processes train as one does: without dropout and batch norm, and with data in a fixed order."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

GLOBAL_BATCH = 8
NUM_TRAIN, NUM_VAL = 44, 24  # five batches and a half for an epoch, on 1, 2 and 4 processes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Plain(pl.LightningModule):
    """Residual blocks of linear layers, without dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), Block(), Block(), Block(), nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def _loader(self, num: int) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(num, 16, generator=generator)
        data = TensorDataset(x, x[:, :4].argmax(1))
        # Lightning's own would shuffle.
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, GLOBAL_BATCH // self.trainer.world_size, sampler=sampler)

    def train_dataloader(self) -> DataLoader:
        return self._loader(NUM_TRAIN)

    def val_dataloader(self) -> DataLoader:
        return self._loader(NUM_VAL)


class Sharded(Plain):
    """The same, for FSDP2."""

    def configure_model(self) -> None:
        for module in (*(module for module in self.net if list(module.parameters())), self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])
