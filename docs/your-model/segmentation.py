"""MONAI's UNet: half of the channels, then int8, as an ONNX file."""

import lightning.pytorch as pl
import torch
from monai.networks.nets import UNet
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress


class Segmentation(pl.LightningModule):
    def __init__(self):
        super().__init__()
        # yours: UNet(3, 1, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2)) with your weights
        self.net = UNet(2, 1, 2, channels=(16, 32), strides=(2,), num_res_units=1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        found = self(batch[0]).argmax(1)
        self.log("val_dice", 2 * (found * batch[1]).sum() / (found.sum() + batch[1].sum()).clamp(min=1))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


images = torch.randn(128, 1, 32, 32)  # yours: images and their masks
data = DataLoader(TensorDataset(images, (images[:, 0] > 1).long()), batch_size=16)

callbacks = lightning_compress.recipe("unet")
trainer = pl.Trainer(max_epochs=5, accelerator="cpu", logger=False, default_root_dir="runs/masks", callbacks=callbacks)
trainer.fit(Segmentation(), data, data)
