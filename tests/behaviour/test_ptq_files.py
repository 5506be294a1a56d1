"""Post-training quantization that ends in a file: by validation, and by a fit that takes no step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.callbacks import CompressionReport, Export, PostTrainingQuantization

from ..nightly import some


class Plain(pl.LightningModule):
    """Which of the first three features is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def data() -> Any:
    x = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(-1)), 32)


def trainer_with(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{"logger": False, "enable_checkpointing": False, "max_epochs": 4, **options},
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    pl.seed_everything(0, verbose=False)
    trainer_with(tmp_path_factory.mktemp("trained")).fit(model := Plain(), data())
    return model


def check_quantized(export: Export, before: dict[str, Tensor], model: Plain) -> None:
    (artifact,) = export.artifacts
    assert artifact.integers == "uint8"
    assert (artifact.integer_kernels, artifact.num_kernels, artifact.float_kernels) == (2, 2, [])
    assert artifact.judged["agreement"]["ok"]
    assert artifact.judged["difference"]["ok"]
    assert artifact.metric == export.metrics["onnx"]["val_acc"]
    assert artifact.deployed_minus_trained == artifact.metric - export.trained["val_acc"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("order", some([1, -1], 1))
def test_a_validation_writes_a_quantized_file_once(order: int, trained: Plain, tmp_path: Path) -> None:
    model = copy.deepcopy(trained)
    export = Export(["onnx"], max_metric_drop=0.05, strict=True)
    trainer = trainer_with(tmp_path, *[PostTrainingQuantization(), export][::order])
    trainer.validate(model, data(), verbose=False)
    check_quantized(export, trained.state_dict(), model)
    trainer.validate(model, data(), verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["deploy"]


class Recurrent(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.memory(x.unsqueeze(1))[0][:, 0])


def test_a_layer_that_the_runtime_computes_in_float_is_named(tmp_path: Path) -> None:
    export = Export(["onnx"], min_agreement=None)
    with pytest.warns(UserWarning, match=r"In float: memory \(onnxruntime has no integer kernel of GRU\)\."):
        trainer_with(tmp_path, PostTrainingQuantization(), export).validate(Recurrent(), data(), verbose=False)
    (artifact,) = export.artifacts
    assert artifact.float_kernels == ["memory (onnxruntime has no integer kernel of GRU)"]


@pytest.mark.parametrize(
    "options", some([{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}], {"max_epochs": 0})
)
@pytest.mark.parametrize("order", some([1, -1], -1))
def test_a_fit_without_a_step_writes_a_quantized_file(
    options: dict[str, int], order: int, trained: Plain, tmp_path: Path
) -> None:
    model = copy.deepcopy(trained)
    export = Export(["onnx"])
    report = CompressionReport(show=False)
    trainer = trainer_with(tmp_path, *[PostTrainingQuantization(), export][::order], report, **options)
    trainer.fit(model, data(), data())
    check_quantized(export, trained.state_dict(), model)
    assert report.report is not None
    assert [row["target"] for row in report.report["targets"] if row["missed"]] == []
    assert {row["callback"] for row in report.report["targets"]} == {"PostTrainingQuantization", "Export"}


def test_a_fit_without_a_step_and_without_validation_misses_its_bits(trained: Plain, tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, PostTrainingQuantization(), max_epochs=0)
    with pytest.warns(UserWarning, match="PostTrainingQuantization: target not reached: asked bits 8, reached 32"):
        trainer.fit(copy.deepcopy(trained), data())


def test_checkpoints_of_weights_alone_are_warned_of(trained: Plain, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True, save_weights_only=True)
    trainer = trainer_with(tmp_path, PostTrainingQuantization(), keep, enable_checkpointing=True, max_epochs=1)
    with pytest.warns(UserWarning, match=r"beside ModelCheckpoint\(save_weights_only=True\): its files hold the float"):
        trainer.fit(copy.deepcopy(trained), data())
