"""The few lines that make a LightningModule of a net, as a user would write them, and batches for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

__all__ = ["NUM_SAMPLES", "Made", "Supervised", "Wrapped", "loader", "pairs"]

NUM_SAMPLES = 32
BATCH_SIZE = 8


class Made(NamedTuple):
    """A LightningModule with random weights, its data, and what its class is called with when it is loaded again."""

    module: pl.LightningModule
    train: Any
    val: Any
    again: dict[str, Any]


class Wrapped(pl.LightningModule):
    """A net that is called by keywords and returns its own loss, or outputs whose power is taken for one.

    Args:
        net: The net.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Tensor) -> Any:
        """The net's own outputs."""
        return self.net(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The net's own loss."""
        return self._loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log it."""
        self.log("val_loss", self._loss(batch), batch_size=BATCH_SIZE)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as is usual."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        outputs = self(**batch)
        loss = getattr(outputs, "loss", None)
        if loss is None:
            first = outputs if isinstance(outputs, Tensor) else outputs[0]
            loss = first.square().mean()
        return loss


class Supervised(pl.LightningModule):
    """A net that is called with one input, and a loss of its output and the target.

    Args:
        net: The net.
        loss: Called with output and target.
    """

    def __init__(self, net: nn.Module, loss: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, x: Any) -> Any:
        """The net's own outputs."""
        return self.net(x)

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Log it."""
        self.log("val_loss", self.loss(self(batch[0]), batch[1]), batch_size=BATCH_SIZE)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as is usual."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


def loader(samples: Sequence[Any], collate: Callable[[list[Any]], Any] | None = None) -> DataLoader[Any]:
    """Batches of samples, always in the same order."""
    return DataLoader(samples, BATCH_SIZE, collate_fn=collate)  # type: ignore[arg-type]


def by_keywords(net: nn.Module, batch: dict[str, Any]) -> Made:
    """A net with samples cut out of one large batch of keywords."""
    samples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return Made(Wrapped(net), loader(samples), loader(samples[: 2 * BATCH_SIZE]), {"net": net})


def pairs(net: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Any, Tensor], Tensor] | None = None) -> Made:
    """A net with inputs and targets, one sample per row of both."""
    extra = {} if loss is None else {"loss": loss}
    samples = list(zip(x, y, strict=True))
    module = Supervised(net, **extra)
    return Made(module, loader(samples), loader(samples[: 2 * BATCH_SIZE]), {"net": net, **extra})
