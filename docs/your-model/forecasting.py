"""PatchTST of Hugging Face: 80 % zeros, then int8, as an ONNX file."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import PatchTSTConfig, PatchTSTForPrediction

import lightning_compress


class Forecaster(pl.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"d_model": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        window = {"context_length": 96, "prediction_length": 24, "patch_length": 8, "patch_stride": 8}
        # yours: PatchTSTForPrediction.from_pretrained(...)
        self.net = PatchTSTForPrediction(PatchTSTConfig(num_input_channels=1, loss="mse", **window, **sizes))

    def forward(self, past):
        return self.net(past_values=past).prediction_outputs

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_mae", torch.nn.functional.l1_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


waves = torch.sin(torch.arange(120) / 5 + 6 * torch.rand(256, 1))[..., None]  # yours: (series, steps, channels)
data = DataLoader(TensorDataset(waves[:, :96], waves[:, 96:]), batch_size=32)

callbacks = lightning_compress.recipe("forecaster")
trainer = pl.Trainer(max_epochs=6, accelerator="cpu", logger=False, default_root_dir="runs/series", callbacks=callbacks)
trainer.fit(Forecaster(), data, data)
