"""What a run is refused for when it starts, and what every callback leaves alone: by all that compress alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import callbacks
from lightning_compress.analysis.inspect import layer_table, weight_layers
from lightning_compress.callbacks import (
    SET,
    ChannelPruning,
    GradualPruning,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)

COMPRESSING = (
    *(GradualPruning, RigL, SET, ChannelPruning, LayerPruning),
    *(QuantizationAwareTraining, PostTrainingQuantization),
)
EMPTY = {"no_inputs", "no_outputs", "no_channels", "no_words"}


class Hollow(pl.LightningModule):
    """Has weights of no values, in layers that are called and in layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.block = nn.Linear(8, 8)
        self.no_outputs = nn.Linear(8, 0)
        self.no_inputs = nn.Linear(0, 8)
        self.no_channels = nn.Conv2d(0, 4, 3)
        self.no_words = nn.Embedding(0, 4)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.first(x).relu()).relu()
        return self.head(x + self.no_inputs(self.no_outputs(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def fit(folder: Path, module: pl.LightningModule, callback: pl.Callback) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "default_root_dir": folder, "enable_progress_bar": False}
    options |= {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    batches = DataLoader(TensorDataset(torch.randn(32, 4)), 8)
    pl.Trainer(max_epochs=5, callbacks=[callback], **options).fit(module, batches, batches)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", COMPRESSING)
def test_empty_weights_are_left_alone_and_named(kind: type[pl.Callback], tmp_path: Path) -> None:
    module = Hollow()
    callback: Any = kind(max_share=1.0) if kind is LayerPruning else kind()
    fit(tmp_path, module, callback)
    assert all(p.isfinite().all() for p in module.parameters())
    if kind is not LayerPruning:  # which works on blocks
        skipped = callback.quantization.skipped if hasattr(callback, "quantization") else callback.skipped
        assert {name for name, reason in skipped.items() if "its weight is empty" in reason} >= EMPTY
    assert not EMPTY & {layer.name for layer in weight_layers(module)}
    assert not EMPTY & {row["name"] for row in layer_table(module)}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", COMPRESSING)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(kind: type[pl.Callback], value: float, tmp_path: Path) -> None:
    module = Hollow()
    with torch.no_grad():
        module.block.weight[0, :3] = value
        module.head.bias[1] = value
    message = rf"{kind.__name__}: block has 3 weights, head.bias has 1 weights that are NaN or infinite .*finite\.$"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, kind())


def every_callback() -> list[type[pl.Callback]]:
    return [getattr(callbacks, name) for name in callbacks.__all__ if name != "Compressing"]


@pytest.mark.parametrize("kind", every_callback())
def test_a_trainer_of_pytorch_lightning_is_refused_by_the_first_hook(kind: type[pl.Callback]) -> None:
    """That package is not installed here: what tells its Trainer is the module of its class."""
    twin = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})
    with pytest.raises(TypeError, match=rf"{kind.__name__}: .*Replace `import pytorch_lightning as pl` by `import l"):
        kind().setup(twin(), Hollow(), "fit")


def test_a_frozen_infinity_of_the_users_own_is_no_weight(tmp_path: Path) -> None:
    module = Hollow()
    module.mask = nn.Parameter(torch.full((2, 2), -torch.inf), requires_grad=False)
    fit(tmp_path, module, GradualPruning())
