"""Spoken words in plain torch: int8, taught by itself, as an ONNX file."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress


def conv(inputs, outputs, kernel, **more):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, bias=False, **more), nn.BatchNorm2d(outputs), nn.ReLU())


class Keyword(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(conv(1, 32, (10, 4), stride=2), conv(32, 32, 3, groups=32), conv(32, 32, 1))
        self.head = nn.Linear(32, 12)

    def forward(self, x):
        return self.head(self.net(x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


words = torch.arange(256) % 12
sounds = torch.randn(12, 1, 49, 10)[words] + 0.5 * torch.randn(256, 1, 49, 10)  # yours: 49 frames of 10 coefficients
data = DataLoader(TensorDataset(sounds, words), batch_size=32)
callbacks = lightning_compress.recipe("keyword")  # for boards: recipe("keyword", "export.formats=[tflm]")
trainer = pl.Trainer(max_epochs=5, accelerator="cpu", logger=False, default_root_dir="runs/words", callbacks=callbacks)
trainer.fit(Keyword(), data, data)
