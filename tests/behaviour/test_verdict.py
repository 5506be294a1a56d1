"""How a run ends: every target is reached, or reported as missed where a user looks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from lightning_compress.callbacks import (
    SET,
    ChannelPruning,
    CompressionReport,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.callbacks.verdict import TargetMissed, targets_of
from lightning_compress.phase import Phase
from lightning_compress.pruning import Block

from ..harness import make_module, make_trainer

LATE = Phase(0.5, 0.9)
# One of each that has a target, late in the run, with what it counts.
METHODS: dict[str, tuple[Any, str]] = {
    "GradualPruning": (lambda **kw: GradualPruning(0.5, phase=LATE, every=2, **kw), "sparsity"),
    "RigL": (lambda **kw: RigL(0.5, phase=LATE, every=2, **kw), "sparsity"),
    "SET": (lambda **kw: SET(0.5, phase=LATE, every=2, **kw), "exchanged weights"),
    "ChannelPruning": (lambda **kw: ChannelPruning(0.5, phase=LATE, **kw), "channels"),
    "LayerPruning": (lambda **kw: LayerPruning(1, max_share=1.0, phase=LATE, **kw), "layers"),
    "QuantizationAwareTraining": (lambda **kw: QuantizationAwareTraining("int8", LATE, Phase(0.9, 1.0), **kw), "bits"),
    "PostTrainingQuantization": (lambda **kw: PostTrainingQuantization("int8", LATE, **kw), "bits"),
    "KnowledgeDistillation": (lambda **kw: KnowledgeDistillation(phase=LATE, **kw), "taught steps"),
}


class Stop(pl.Callback):
    """Ends a run as a user's own code may."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch >= self.epoch


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_ends_early_says_what_is_missing(name: str, tmp_path: Path) -> None:
    make, target = METHODS[name]
    logger = CSVLogger(tmp_path)
    report = CompressionReport(tmp_path, show=False)
    trainer = make_trainer(tmp_path, callbacks=[make(), Stop(0), report], logger=logger)
    with pytest.warns(UserWarning, match=f"{name}: target not reached: asked {target} .* trainer.should_stop ended"):
        trainer.fit(make_module("conv+bn+residual"))
    rows = json.loads((tmp_path / "report.json").read_text())["targets"]
    assert {row["callback"] for row in rows} == {name}
    assert all(row["missed"] and row["because"] for row in rows)
    logged = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    assert [float(row["compress/targets_missed"]) for row in logged if row["compress/targets_missed"]] == [len(rows)]
    assert name in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_goes_on_reaches_it(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    make, target = METHODS[name]
    trainer = make_trainer(tmp_path, callbacks=[make(strict=True)])
    trainer.fit(make_module("conv+bn+residual"))
    (row,) = [row for row in targets_of(trainer) if row["target"] == target]
    assert not row["missed"]
    assert not [w for w in recwarn if "target not reached" in str(w.message)]


@pytest.mark.parametrize("name", METHODS)
def test_strict_is_an_error_after_all_is_saved(name: str, tmp_path: Path) -> None:
    make, target = METHODS[name]
    report = CompressionReport(tmp_path, show=False)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "last")
    callbacks = [make(strict=True), Stop(0), report, saving]
    trainer = make_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(TargetMissed, match=f"{name}: target not reached: asked {target}"):
        trainer.fit(make_module("conv+bn+residual"))
    assert (tmp_path / "report.json").exists()
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["GradualPruning", "ChannelPruning", "QuantizationAwareTraining"])
@pytest.mark.parametrize("waits", [True, False])
def test_early_stopping_waits_for_the_targets(name: str, waits: bool, tmp_path: Path) -> None:
    make, target = METHODS[name]
    stopping = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    callback = make(gate_stopping=waits)
    trainer = make_trainer(tmp_path, callbacks=[callback, stopping])
    trainer.fit(make_module("conv+bn+residual"))
    (row,) = [row for row in targets_of(trainer) if row["target"] == target]
    assert row["missed"] is not waits
    assert ("EarlyStopping ended the run" in row["because"]) is not waits
    assert "_run_early_stopping_check" not in vars(stopping)


def test_early_stopping_still_ends_a_run_that_is_lost(tmp_path: Path) -> None:
    class Lost(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                trainer.callback_metrics["val_loss"] = torch.tensor(float("nan"))

    stopping = EarlyStopping("val_loss", check_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path, callbacks=[GradualPruning(0.5, phase=LATE), Lost(), stopping])
    trainer.fit(make_module("conv+bn+residual"))
    assert trainer.current_epoch <= 2
    assert all("EarlyStopping ended the run" in row["because"] for row in targets_of(trainer))


def test_text_goes_where_a_logger_takes_it(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    texts = []
    logger.experiment.add_text = lambda name, text, **_: texts.append((name, text))
    make_trainer(tmp_path, callbacks=[METHODS["GradualPruning"][0](), Stop(0)], logger=logger).fit(make_module("mlp"))
    ((name, text),) = texts
    assert name == "compress/targets"
    assert text.startswith("GradualPruning: target not reached: asked sparsity 0.5")


def test_a_user_who_interrupts_is_told(tmp_path: Path) -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, callbacks=[GradualPruning(0.5, phase=LATE), Interrupt()])
    with pytest.warns(UserWarning, match="because the run was interrupted at step 3"), pytest.raises(SystemExit):
        trainer.fit(make_module("mlp"))


class Doubled(nn.Module):
    """A weight from a parameter of another shape, which nothing is known of."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.stack([weight / 2, weight / 2]).detach()


@pytest.mark.parametrize("name", ["GradualPruning", "RigL", "ChannelPruning", "QuantizationAwareTraining"])
def test_nothing_to_compress_is_a_miss(name: str, tmp_path: Path) -> None:
    # channels go through whatever computes a weight: of a single layer they are the outputs
    module = make_module("boring" if name == "ChannelPruning" else "mlp")
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.utils.parametrize.register_parametrization(child, "weight", Doubled(), unsafe=True)
    trainer = make_trainer(tmp_path, callbacks=[METHODS[name][0]()])
    with pytest.warns(UserWarning, match=f"{name}: target not reached: .* (nothing to|no more can)"):
        trainer.fit(module)


def test_channels_out_of_reach_are_a_miss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[ChannelPruning(0.9, phase=LATE, floor=0.6)])
    with pytest.warns(UserWarning, match=r"ChannelPruning: target not reached: asked channels 0.9, reached 0\.[0-5]"):
        trainer.fit(make_module("conv+bn+residual"))


def test_a_layer_without_a_gradient_stops_no_exchange(tmp_path: Path) -> None:
    class WithUnusedHead(type(make_module("mlp"))):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(8, 8)

    callback = RigL(0.5, phase=Phase(0.0, 1.0), every=2)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.fit(WithUnusedHead())
    (row,) = [row for row in targets_of(trainer) if row["target"] == "exchanged weights"]
    assert row["reached"] > 0
    assert not row["missed"]


def test_a_pattern_that_fits_no_layer_is_a_miss(tmp_path: Path) -> None:
    pruning = GradualPruning(pattern=Block(64, 64), phase=LATE)
    with pytest.warns(UserWarning, match="GradualPruning: target not reached: .* nothing to prune"):
        make_trainer(tmp_path, callbacks=[pruning]).fit(make_module("mlp"))


class NeverFinite(nn.Module):
    """A teacher of the mlp whose answers are NaN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), 4), torch.nan)


def test_a_teacher_that_is_never_finite_is_a_miss(tmp_path: Path) -> None:
    teaching = KnowledgeDistillation(NeverFinite(), phase=LATE)
    with pytest.warns(UserWarning, match=r"target not reached: asked taught steps \d+, reached 0, because .* NaN"):
        make_trainer(tmp_path, callbacks=[teaching]).fit(make_module("mlp"))


@pytest.mark.parametrize("others", [True, False])
def test_a_callback_of_a_users_own_is_judged(others: bool, tmp_path: Path) -> None:
    """Wherever one of ours is in the run."""

    class Asks(pl.Callback):
        compresses, gate_checkpoints, reached = True, True, False

        def phases(self) -> list[Any]:
            return [("asks", LATE)]

        def asked(self) -> dict[str, float]:
            return {"zeros": 3}

        stands = asked

        def follow(self, pl_module: Any, record: Any) -> None: ...

        def keep(self) -> None: ...

        def go_back(self, pl_module: Any, kept: Any) -> None: ...

    callbacks = [Asks(), CompressionReport(tmp_path, show=False)] if others else [Asks()]
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(make_module("mlp"))
    assert [row["missed"] for row in targets_of(trainer)] == [True] * others
