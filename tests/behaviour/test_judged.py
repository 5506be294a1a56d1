"""By which metric a run is judged: what is refused before the first step, what is said, and what a guard gives back."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_compress.callbacks.report as report_module
from lightning_compress.analysis.inspect import sparsity, weight_layers
from lightning_compress.callbacks import AccuracyGuard, CompressionReport, GradualPruning
from lightning_compress.callbacks.sweep import StopUnderperforming
from lightning_compress.phase import Phase

from ..harness import differences, make_trainer
from ..zoo import BATCHES, MLP


class Logs(MLP):
    """Logs what it is told in validation, and in training; the values may depend on the sparsity."""

    def __init__(self, values: Any = None, trained: dict[str, float] | None = None) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.values = values if callable(values) else lambda found: values or {"val_acc": 0.9}
        self.trained = trained or {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_dict(self.trained)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict(self.values(sparsity(weight_layers(self))))


class StopAfter(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step >= self.step


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is said in lines."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Keep()
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings = {"max_epochs": 2, "num_sanity_val_steps": 1, **options}
    trainer = make_trainer(folder, callbacks=list(callbacks), **settings)
    trainer.fit(module)
    return trainer


def judging(kind: str, folder: Path, monitor: str | None, mode: Any = None) -> pl.Callback:
    if kind == "guard":
        return AccuracyGuard(0.01, monitor, mode)
    if kind == "report":
        return CompressionReport(folder, monitor, False, mode)
    return StopUnderperforming(folder / "run", 0.1, monitor, mode)


@pytest.mark.parametrize("kind", ["guard", "report", "stop"])
def test_a_metric_that_the_sanity_check_does_not_log_is_refused_before_the_first_step(
    kind: str, tmp_path: Path
) -> None:
    module = Logs()
    with pytest.raises(ValueError, match=r"\.monitor='val_f1': validation does not log it\. Accepted are: val_acc"):
        fit(tmp_path, module, judging(kind, tmp_path, "val_f1"))
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("kind", ["guard", "stop"])
def test_where_a_decision_hangs_on_it_an_unknown_name_asks_for_the_mode(kind: str, sanity: int, tmp_path: Path) -> None:
    module = Logs({"val/height": 0.5})
    with pytest.raises(ValueError, match=r"\.mode=None: the name of 'val/height'.*Accepted are 'max'.*'min'"):
        fit(tmp_path, module, judging(kind, tmp_path, "val/height"), num_sanity_val_steps=sanity)
    assert module.trainer.global_step == 0
    fit(tmp_path, Logs({"val/height": 0.5}), judging(kind, tmp_path, "val/height", "min"), num_sanity_val_steps=sanity)


@pytest.mark.parametrize("kind", ["guard", "report", "stop"])
def test_a_mode_that_is_none_is_refused_where_it_is_given(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.mode='higher': accepted are 'max', 'min' and None"):
        judging(kind, tmp_path, "val_acc", "higher")


def test_the_mode_that_is_given_goes_before_the_name(tmp_path: Path) -> None:
    def cost(pruned: float) -> dict[str, float]:
        return {"val_gain": 0.1 + 10 * max(0.0, pruned - 0.8), "val_acc": 0.9}

    module = Logs(cost)
    fit(tmp_path, module, AccuracyGuard(0.01, "val_gain", "min"), max_epochs=10, val_check_interval=0.5)
    assert 0.7 < sparsity(weight_layers(module)) <= 0.801


def test_a_guess_is_said_in_a_line_and_what_is_given_is_not(tmp_path: Path, lines: list[str]) -> None:
    fit(tmp_path, Logs({"val_loss": 0.1, "train_acc": 0.9}), AccuracyGuard(0.01))
    said = "AccuracyGuard: lower is better for 'val_loss', by its name; mode='max' says otherwise."
    assert lines.count(said) == 1
    lines.clear()
    fit(tmp_path, Logs({"val_loss": 0.1}), AccuracyGuard(0.01, mode="min"))
    assert not any("is better for" in line for line in lines)


@pytest.mark.parametrize(
    ("metric", "mode", "more"),
    [("val_loss", None, False), ("val_loss", "max", True), ("val/height", None, True), ("val/height", "min", False)],
)
def test_the_summary_of_wandb_holds_the_best_by_the_mode(
    metric: str, mode: Any, more: bool, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    defined: list[Any] = []
    monkeypatch.setattr(report_module, "WandbLogger", CSVLogger)
    monkeypatch.setattr(report_module, "define_metric", lambda run, *found: defined.append(found))
    report = CompressionReport(tmp_path, show=False, mode=mode)
    fit(tmp_path, Logs({metric: 0.5}), report, logger=CSVLogger(tmp_path), max_epochs=1)
    assert defined == [(metric, more)]
    assert any(f"is better for {metric!r}" in line for line in lines) == (mode is None)


def test_a_report_shows_what_validation_logs_before_what_training_logs(tmp_path: Path) -> None:
    report = CompressionReport(tmp_path, show=False)
    fit(tmp_path, Logs({"loss": 0.4}, {"acc": 0.7, "train_acc": 0.8}), report, GradualPruning(0.5))
    assert report.report is not None
    assert report.report["metric"] == "loss"
    assert [value for _, value in report._history.metric] == pytest.approx([0.4, 0.4])


def test_without_a_sanity_check_a_report_warns_at_the_first_validation_and_goes_on(tmp_path: Path) -> None:
    report = CompressionReport(tmp_path, "val_f1", show=False)
    with pytest.warns(UserWarning, match=r"CompressionReport\.monitor='val_f1' is not logged by this validation"):
        trainer = fit(tmp_path, Logs(), report, num_sanity_val_steps=0)
    assert trainer.global_step == 2 * BATCHES
    assert report.report is not None
    assert any("'val_f1' was not logged" in text for text in report.report["warnings"])


def test_without_a_sanity_check_nothing_is_stopped_by_what_is_not_logged(tmp_path: Path) -> None:
    stop = StopUnderperforming(tmp_path / "run", monitor="val_f1")
    with pytest.warns(UserWarning, match=r"StopUnderperforming judges nothing: .*monitor='val_f1'.*Accepted are"):
        assert fit(tmp_path, Logs(), stop, num_sanity_val_steps=0).global_step == 2 * BATCHES


def test_a_guard_without_anything_to_judge_is_an_error_at_the_first_validation(tmp_path: Path) -> None:
    module = Logs()
    late = GradualPruning(0.5, phase=Phase(0.8, 1.0))
    with pytest.raises(ValueError, match=r"AccuracyGuard\.monitor='val_f1'.*Accepted are: .*val_acc"):
        fit(tmp_path, module, AccuracyGuard(0.01, "val_f1"), late, num_sanity_val_steps=0)
    assert module.trainer.global_step == BATCHES


def test_a_metric_of_training_may_come_later(tmp_path: Path) -> None:
    stop = StopUnderperforming(tmp_path / "run", monitor="train_acc")
    fit(tmp_path, Logs(trained={"train_acc": 0.7}), stop)
    assert list(stop.curve.values()) == pytest.approx([0.7, 0.7])
    with pytest.raises(ValueError, match=r"monitor='train_acc'.*cannot be measured. Give AccuracyGuard.reference"):
        fit(tmp_path, Logs(trained={"train_acc": 0.7}), AccuracyGuard(0.01, "train_acc"))
    module = Logs(trained={"train_acc": 0.7})
    fit(tmp_path, module, AccuracyGuard(0.01, "train_acc", reference=0.7), max_epochs=4)
    assert sparsity(weight_layers(module)) > 0.4


def test_a_validation_that_does_not_log_the_metric_judges_nothing(tmp_path: Path) -> None:
    class Seldom(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch != 1 or self.trainer.sanity_checking:
                self.log("val_acc", 0.9)

    guard = AccuracyGuard(0.01)
    fit(tmp_path, Seldom(), guard, max_epochs=3)
    assert {entry["step"] for entry in guard.history} >= {BATCHES, 3 * BATCHES}


@pytest.mark.parametrize(
    ("mode", "value"), [("max", math.nan), ("min", math.nan), ("max", math.inf), ("min", -math.inf)]
)
def test_what_is_no_number_never_holds(mode: Any, value: float, tmp_path: Path) -> None:
    module, guard = Logs(lambda pruned: {"m": value if pruned > 0.6 else 0.9}), AccuracyGuard(0.01, "m", mode)
    fit(tmp_path, module, guard, max_epochs=4, val_check_interval=0.5)
    assert 0.4 < sparsity(weight_layers(module)) <= 0.6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dense_model_whose_metric_is_no_number_is_refused(value: float, tmp_path: Path) -> None:
    module = Logs({"val_acc": value})
    with pytest.raises(ValueError, match=r"AccuracyGuard\.monitor='val_acc': it is (nan|inf) for the dense model"):
        fit(tmp_path, module, AccuracyGuard(0.01))
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize(("reference", "value"), [(97, 0.97), (0.97, 97.0), (-0.1, 0.9), (97, 1.0)])
def test_a_reference_of_another_scale_is_refused(reference: float, value: float, sanity: int, tmp_path: Path) -> None:
    module = Logs({"val_acc": value})
    with pytest.raises(ValueError, match=r"AccuracyGuard\.reference=.*val_acc is.*accepted is a number in \d+\.\.\d+"):
        fit(tmp_path, module, AccuracyGuard(0.01, reference=reference), num_sanity_val_steps=sanity)
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(
    ("reference", "values"),
    [(97, {"val_acc": 97.0}), (0.97, {"val_acc": 0.97}), (97, {"val_psnr": 0.97}), (97, {"val_acc": 0.0})],
)
def test_a_reference_that_may_be_meant_is_taken(reference: float, values: dict[str, float], tmp_path: Path) -> None:
    fit(tmp_path, Logs(values), AccuracyGuard(0.01, reference=reference))


def test_a_drop_that_nothing_can_miss_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"max_drop=1: val_acc is never below 0 .* nothing can miss"):
        fit(tmp_path, Logs(), AccuracyGuard(1))


RARELY = {"check_val_every_n_epoch": 5}


@pytest.mark.parametrize(
    "options",
    [RARELY, {"max_epochs": 1, "max_steps": 3}, {"fast_dev_run": True}, {**RARELY, "stop": 5}],
    ids=["never validated", "few steps", "fast_dev_run", "stopped"],
)
def test_what_no_validation_has_judged_is_judged_at_the_end(options: dict[str, Any], tmp_path: Path) -> None:
    options = dict(options)
    others = [StopAfter(options.pop("stop"))] if "stop" in options else []
    guard, module = AccuracyGuard(0.01), Logs()
    before = copy.deepcopy(dict(module.state_dict()))
    fit(tmp_path, module, guard, *others, **options)
    assert differences(dict(module.state_dict()), before)  # it is not the model of step 0
    assert sparsity(weight_layers(module)) == pytest.approx(0.5, abs=0.01)
    assert [entry["outcome"] for entry in guard.history] == ["holds"]


def test_a_level_that_was_never_judged_is_judged_when_its_phase_ends(tmp_path: Path) -> None:
    guard, module = AccuracyGuard(0.01), Logs()
    prune = GradualPruning(0.6, phase=Phase(0.0, 0.5))
    fit(tmp_path, module, guard, prune, max_epochs=4, check_val_every_n_epoch=4)
    assert [entry["step"] for entry in guard.history] == [2 * BATCHES, 4 * BATCHES]
    assert sparsity(weight_layers(module)) == pytest.approx(0.5, abs=0.01)


def test_what_misses_at_the_end_is_the_dense_model_and_it_is_said(tmp_path: Path) -> None:
    guard, module = AccuracyGuard(0.01), Logs(lambda pruned: {"val_acc": 0.9 - pruned})
    prune = GradualPruning(0.9, phase=Phase(0.5, 1.0))
    saved: dict[str, Any] = {}

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == BATCHES:
                saved.update(copy.deepcopy(dict(pl_module.state_dict())))

    with pytest.warns(UserWarning, match=rf"no sparsity was within 0.01 of 0.9000.*dense model of step {BATCHES}\."):
        fit(tmp_path, module, guard, prune, Save(), **RARELY)
    assert not differences(dict(module.state_dict()), saved)  # as far as it was trained while it was dense


def test_a_dense_model_short_of_its_reference_trains_on_and_is_pruned_once_it_holds(tmp_path: Path) -> None:
    class Learns(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.5 if self.trainer.global_step < 3 * BATCHES else 0.97)

    guard, module = AccuracyGuard(0.01, reference=0.97), Learns()
    with pytest.warns(UserWarning, match=r"val_acc of the dense model is 0.5000.*Nothing is pruned until it holds"):
        fit(tmp_path, module, guard, max_epochs=8)
    assert [(entry["sparsity"], entry["outcome"]) for entry in guard.history[:4]] == [
        *[(0.0, "misses")] * 2,
        (0.0, "holds"),
        (0.5, "holds"),
    ]


def test_a_reference_that_is_never_held_leaves_the_trained_model(tmp_path: Path) -> None:
    guard, module = AccuracyGuard(0.01, reference=0.97), Logs()
    before = copy.deepcopy(dict(module.state_dict()))
    with pytest.warns(UserWarning, match=r"no state was within 0.01 of 0.9700\. The run ends as it is"):
        fit(tmp_path, module, guard, max_epochs=6)
    assert differences(dict(module.state_dict()), before)
    assert sparsity(weight_layers(module)) == 0
    assert guard.level == {}


def test_a_run_that_ends_before_anything_is_compressed_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing was judged, because the run ended before"):
        fit(tmp_path, Logs(), AccuracyGuard(0.01), GradualPruning(0.5, phase=Phase(0.5, 1.0)), StopAfter(2))


def test_a_reference_of_an_untrained_model_is_named(tmp_path: Path) -> None:
    class Learns(Logs):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.1 if self.trainer.global_step == 0 else 0.9)

    with pytest.warns(UserWarning, match=r"val_acc 0.9000 is far better than the reference 0.1000"):
        fit(tmp_path, Learns(), AccuracyGuard(0.01))
