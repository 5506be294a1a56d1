"""Train the transformer of Lightning's demos on tokens: a checkpoint to resume."""

import sys

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos import Transformer
from torch.utils.data import DataLoader, TensorDataset


class Language(pl.LightningModule):
    """As in Lightning's examples."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=500, ninp=64, nhid=64)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Negative log likelihood of the next tokens."""
        inputs, target = batch
        return torch.nn.functional.nll_loss(self.model(inputs, target), target.view(-1))

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """The same."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


pl.seed_everything(0)
tokens = torch.randint(0, 500, (128, 33))
data = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=16)
trainer = pl.Trainer(max_epochs=6, accelerator="cpu")
trainer.fit(Language(), data, data, ckpt_path=sys.argv[1] if len(sys.argv) > 1 else None)
