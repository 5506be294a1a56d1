"""An image classifier of timm: fewer channels and heads, then int8, as an ONNX file."""

import lightning.pytorch as pl
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress


class Vision(pl.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 32, "patch_size": 8}
        # yours: timm.create_model("vit_small_patch16_224", pretrained=True, num_classes=10)
        self.net = timm.models.VisionTransformer(num_classes=10, **sizes)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


classes = torch.arange(256) % 10
images = torch.randn(10, 3, 32, 32)[classes] + torch.randn(256, 3, 32, 32)  # yours
data = DataLoader(TensorDataset(images, classes), batch_size=32)

callbacks = lightning_compress.recipe("vit")
trainer = pl.Trainer(max_epochs=5, accelerator="cpu", logger=False, default_root_dir="runs/vision", callbacks=callbacks)
trainer.fit(Vision(), data, data)
