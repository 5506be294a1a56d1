"""Llama with adapters: the frozen base in groups of 4 bits, embeddings in 8, adapters in float, as an ONNX file."""

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_compress


class Llama(pl.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        # yours: LlamaForCausalLM.from_pretrained(...)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=100, use_cache=False, **sizes))
        self.net = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))

    def forward(self, input_ids):
        return self.net(input_ids=input_ids).logits

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-3)


data = DataLoader(TensorDataset(torch.randint(100, (256, 32))), batch_size=32)  # yours: tokens

callbacks = lightning_compress.recipe("llama", "quantize.scheme.include=['*.base_layer', '*.embed_tokens']")
trainer = pl.Trainer(max_epochs=5, accelerator="cpu", logger=False, default_root_dir="runs/llama", callbacks=callbacks)
trainer.fit(Llama(), data, data)
