"""python -m experiments.foreign.trainer: a plain Trainer script."""

import lightning.pytorch as pl

import lightning_compress
from lightning_compress.callbacks import CompressionReport, Export, GradualPruning, QuantizationAwareTraining
from lightning_compress.demo.data import MNIST5k
from lightning_compress.demo.models import ResNet

if __name__ == "__main__":
    callbacks = [GradualPruning(sparsity=0.9), QuantizationAwareTraining(), CompressionReport(), Export(["onnx"])]
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, default_root_dir="outputs/trainer", callbacks=callbacks
    )
    trainer.fit(ResNet(), MNIST5k())
    trainer.save_checkpoint("outputs/trainer/last.ckpt")
    model = lightning_compress.load_from_checkpoint(ResNet, "outputs/trainer/last.ckpt")
    trainer.validate(model, MNIST5k())
