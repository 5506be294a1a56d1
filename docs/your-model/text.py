"""A text classifier of Hugging Face: int8, taught by itself, as an ONNX file."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import lightning_compress


class Text(pl.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        # yours: BertForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=4)
        self.net = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=4, **sizes))

    def forward(self, input_ids, attention_mask):
        return self.net(input_ids=input_ids, attention_mask=attention_mask).logits

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0], batch[1]), batch[2])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0], batch[1]).argmax(-1) == batch[2]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


ids = torch.randint(3, 100, (256, 16))  # yours: what the tokenizer returns
data = DataLoader(TensorDataset(ids, torch.ones_like(ids), ids[:, 0] % 4), batch_size=32)

callbacks = lightning_compress.recipe("bert")
trainer = pl.Trainer(max_epochs=5, accelerator="cpu", logger=False, default_root_dir="runs/text", callbacks=callbacks)
trainer.fit(Text(), data, data)
