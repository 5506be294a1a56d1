"""A file that would answer otherwise on a CPU without VNNI: the warning, on any CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.bench.portable import bright
from experiments.nets import Bright
from lightning_compress import Scheme, int8
from lightning_compress.callbacks import CompressionReport, Export, QuantizationAwareTraining


class Smooth(pl.LightningModule):
    """Positive filters on bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Bright()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 3e-3)


def fit(folder: Path, scheme: Scheme, formats: list[str], **options: Any) -> tuple[Export, dict[str, Any]]:
    pl.seed_everything(0, verbose=False)
    export = Export(formats, dirpath=folder / "deploy", **options)
    trainer = pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[QuantizationAwareTraining(scheme), CompressionReport(dirpath=folder), export],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loaders = [DataLoader(TensorDataset(*bright(num, seed)), 32) for num, seed in ((256, 0), (64, 1))]
    trainer.fit(Smooth(), *loaders)
    return export, json.loads((folder / "report.json").read_text())


def test_the_full_range_is_a_warning_wherever_the_file_was_made(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"model\.onnx in onnxruntime is exact only on CPUs .* \(net\.net\.0, net\.net\.3"
    ):
        export, report = fit(tmp_path, int8(exact_kernels=True), ["onnx"])
    (artifact,) = report["artifacts"]
    assert artifact["overflowing"] == export.artifacts[0].overflowing
    assert set(artifact["overflowing"]) >= {"net.net.3", "net.net.6"}
    assert torch.backends.cpu.get_cpu_capability() in artifact["cpu"]
    (text,) = [text for text in report["warnings"] if "exact only on CPUs" in text]
    assert "To ship to any x86 CPU train without exact_kernels=True" in text
    page = (tmp_path / "report.html").read_text()
    assert "is exact only on CPUs that add products in 32 bits" in page
    assert artifact["cpu"] in page


def test_ours_answers_like_the_model_and_is_not_doubted(tmp_path: Path) -> None:
    """On a CPU without VNNI the old range gave the model's answer on a fifth of the images."""
    export, report = fit(tmp_path, int8(), ["onnx"])
    (artifact,) = export.artifacts
    assert artifact.overflowing == []
    assert artifact.agreement is not None
    assert artifact.agreement >= 0.995
    assert artifact.max_rel_diff is not None
    assert artifact.max_rel_diff <= 0.02
    assert [text for text in report["warnings"] if "exact only" in text or "answer" in text] == []


def test_thresholds_are_the_users(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Export: target not reached: asked difference 0, reached .* of its output's"):
        export, report = fit(tmp_path, int8(), ["onnx"], max_difference=0.0)
    assert "0.00% is allowed" in export.artifacts[0].warnings[0]
    (row,) = [row for row in report["targets"] if row["target"] == "difference"]
    assert row["missed"]
    assert (
        row["reached"] == report["artifacts"][0]["judged"]["difference"]["reached"] == export.artifacts[0].max_rel_diff
    )


@pytest.mark.parametrize("fields", [{"min_agreement": 1.5}, {"max_difference": -0.1}, {"min_agreement": True}])
def test_a_threshold_that_is_no_share_is_refused(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"Export.{name}={value!r}: accepted is a number from 0 to 1"):
        Export(["onnx"], **fields)


@pytest.mark.runtimes
@pytest.mark.parametrize(
    ("key", "doubted"),
    [("onnx", True), ("openvino", True), ("torch", True), ("executorch", False), ("litert", False)],
)
def test_only_runtimes_that_add_in_16_bits_are_warned_of(key: str, doubted: bool, tmp_path: Path) -> None:
    export, _ = fit(tmp_path, int8(exact_kernels=True), [key])
    (artifact,) = export.artifacts
    assert bool(artifact.overflowing) is doubted
    assert any("exact only on CPUs" in text for text in artifact.warnings) is doubted
