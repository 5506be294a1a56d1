"""Activations of 16 bits by the callbacks: trained or calibrated, written, judged, and refused where no file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Scheme, load_from_checkpoint, w8a16
from lightning_compress.callbacks import CompressionReport, Export, PostTrainingQuantization, QuantizationAwareTraining
from lightning_compress.quantization import Affine, quantization_of


class Waves(pl.LightningModule):
    """Convolutions over a signal, whose sum is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 6, 5), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 5), nn.Flatten())
        self.head = nn.Linear(4 * 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 3e-3)


def data() -> Any:
    x = torch.randn(128, 1, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.mean(2)), 32)


def trainer_with(folder: Path, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def check(export: Export) -> None:
    (artifact,) = export.artifacts
    assert artifact.integers == "int16"
    assert (artifact.integer_kernels, artifact.num_kernels) == (0, 3)
    said = "model.onnx in onnxruntime runs 3 of 3 operations with stored weights in float kernels."
    assert any(text.startswith(said) for text in artifact.warnings)
    assert artifact.judged["agreement"]["ok"]
    assert artifact.max_rel_diff is not None
    assert artifact.max_rel_diff < 1e-4  # 8 bits: a hundred times as much
    assert artifact.overflowing == []


def test_training_ends_in_a_file_that_answers_like_the_model_and_a_checkpoint_holds_it(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    export = Export(["onnx"], strict=True)
    trainer = trainer_with(tmp_path, QuantizationAwareTraining("w8a16"), CompressionReport(dirpath=tmp_path), export)
    trainer.fit(model := Waves(), data(), data())
    check(export)
    assert json.loads((tmp_path / "report.json").read_text())["artifacts"][0]["integers"] == "int16"
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Waves, tmp_path / "last.ckpt")
    found = quantization_of(loaded)
    assert found is not None
    assert found.scheme == w8a16()
    x = 3 * next(iter(data()))[0]
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_calibration_ends_in_such_a_file_too(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    export = Export(["onnx"], strict=True)
    trainer_with(tmp_path, PostTrainingQuantization("w8a16"), export).validate(Waves(), data(), verbose=False)
    check(export)


@pytest.mark.runtimes
@pytest.mark.parametrize(
    ("scheme", "name", "fix"),
    [
        (w8a16(), "executorch", r"Take int8\(\)"),
        (w8a16(), "openvino", r"Take int8\(\)"),
        (Scheme(inputs=Affine(16)), "litert", r"Take w8a16\(\)"),
    ],
)
def test_a_runtime_without_such_kernels_refuses_before_the_first_step(
    scheme: Scheme, name: str, fix: str, tmp_path: Path
) -> None:
    trainer = trainer_with(tmp_path, QuantizationAwareTraining(scheme), Export([name]))
    said = rf"Export\.formats='{name}' cannot take Waves: ValueError: Scheme\.inputs at net\.0=.* in {name}\. {fix}"
    with pytest.raises(ValueError, match=said):
        trainer.fit(Waves(), data(), data())
    assert trainer.global_step == 0
