"""A small residual network, and the classifier that it is."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["Block", "Classifier", "ResNet"]


class Classifier(pl.LightningModule):
    """Cross-entropy, accuracy, SGD with Nesterov momentum and a cosine to zero over the steps of the run.

    Args:
        learning_rate: Rate at the start.
        weight_decay: L2 penalty.
        num_classes: Classes that the accuracy counts.
    """

    def __init__(self, learning_rate: float = 0.1, weight_decay: float = 5e-4, num_classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of (inputs, classes)."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and accuracy of a batch of (inputs, classes)."""
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", self.accuracy, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy of a batch of (inputs, classes)."""
        x, y = batch
        self.accuracy(self(x), y)
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self) -> Any:
        """SGD with a cosine a step."""
        optimizer = torch.optim.SGD(
            self.parameters(), self.learning_rate, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them (He 2015, arXiv:1512.03385)."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Half the height and width where the stride is 2."""
        y = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x_BCHW))


class ResNet(Classifier):
    """A residual network for small grey images.

    Args:
        widths: Channels of the stages; each stage after the first halves the image.
        depth: Residual blocks a stage.
        learning_rate: Rate at the start.
        weight_decay: L2 penalty.
        num_classes: Number of outputs.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 32, 64),
        depth: int = 1,
        learning_rate: float = 0.1,
        weight_decay: float = 5e-4,
        num_classes: int = 10,
    ) -> None:
        super().__init__(learning_rate, weight_decay, num_classes)
        self.save_hyperparameters()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        pairs = [(widths[max(i - 1, 0)], width, 1 if i == 0 else 2) for i, width in enumerate(widths)]
        self.blocks = nn.Sequential(
            *(
                Block(num_in if j == 0 else width, width, stride if j == 0 else 1)
                for num_in, width, stride in pairs
                for j in range(depth)
            )
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits, batch by classes."""
        return self.head(self.blocks(self.stem(x_BCHW)).mean((2, 3)))
