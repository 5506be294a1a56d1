"""Turns that a run can take beyond the matrix."""

from __future__ import annotations

import copy
import csv
import io
import logging
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy

from lightning_compress.analysis.inspect import sparsity
from lightning_compress.callbacks import CompressionReport, FineTuning, GradualPruning, QuantizationAwareTraining
from lightning_compress.phase import Phase
from lightning_compress.pruning import Constant, Random
from lightning_compress.quantization.model import quantization_of

from ..harness import (
    NUM_BATCHES,
    PHASES,
    SPARSITY,
    SaveAfter,
    callback_of,
    differences,
    make_module,
    make_trainer,
    snapshot,
)
from ..nightly import nightly
from ..zoo import BATCHES


def test_a_second_fit_keeps_what_was_dropped(tmp_path: Path) -> None:
    module, trainer = make_module("mlp"), make_trainer(tmp_path)
    trainer.fit(module)
    trainer.fit_loop.max_epochs += 2
    trainer.fit(module)
    layers = callback_of(trainer, GradualPruning).masks.layers
    assert sparsity(layers) >= SPARSITY
    again = make_trainer(tmp_path, callbacks=trainer.callbacks[:4])
    again.fit(module)
    assert sparsity(layers) >= SPARSITY


def test_callbacks_start_anew_with_another_model(tmp_path: Path) -> None:
    pruning = GradualPruning(0.5, phase=Phase(0.0, 0.5), every=1)
    for name in ("mlp", "conv+bn+residual"):
        module = make_module(name)
        make_trainer(tmp_path, callbacks=[pruning]).fit(module)
        assert 0.5 <= sparsity(pruning.masks.layers) < 0.51


def test_a_checkpoint_written_before_our_callbacks_act_resumes_identically(tmp_path: Path) -> None:
    """A callback may save at the end of a batch before the last mask update of that same batch."""
    saver = SaveAfter(tmp_path, (7, 11, 12, 17))
    module, trainer = make_module("mlp"), make_trainer(tmp_path)
    trainer.callbacks.insert(0, saver)
    trainer.fit(module)
    for batches in saver.batches:
        again, trainer_again = make_module("mlp"), make_trainer(tmp_path / "again")
        trainer_again.fit(again, ckpt_path=tmp_path / f"{batches}.ckpt")
        ours, theirs = snapshot(trainer, module), snapshot(trainer_again, again)
        assert not differences(ours["weights"], theirs["weights"]), batches
        assert not differences(ours["optimizers"], theirs["optimizers"]), batches


@nightly
def test_inductor(tmp_path: Path) -> None:
    """torch.compile with its default backend; the matrix compiles with a quicker one."""
    torch.compiler.reset()
    module = make_module("mlp")
    module.net = torch.compile(module.net)
    trainer = make_trainer(tmp_path, limit_val_batches=1)
    trainer.fit(module)
    assert sparsity(callback_of(trainer, GradualPruning).masks.layers) >= SPARSITY
    assert quantization_of(module).enabled


def test_one_shot_and_random(tmp_path: Path) -> None:
    pruning = GradualPruning(Constant(0.6), criterion=Random(), scope="layer", phase=Phase(0.5, 0.5))
    make_trainer(tmp_path, callbacks=[pruning]).fit(make_module("mlp"))
    assert all(sparsity([layer]) >= 0.6 for layer in pruning.masks.layers)


def test_a_phase_that_ends_with_the_run_reaches_its_target(tmp_path: Path) -> None:
    pruning = GradualPruning(0.7, phase=Phase(0.5, 1.0), every=5)
    module = make_module("mlp")
    make_trainer(tmp_path, [SaveAfter(tmp_path, (NUM_BATCHES,))], callbacks=[pruning]).fit(module)
    assert sparsity(pruning.masks.layers) >= 0.7


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_units_of_a_phase(unit: str, tmp_path: Path) -> None:
    scale = BATCHES if unit == "step" else 1
    pruning = GradualPruning(0.7, phase=Phase(1 * scale, 3 * scale, unit), every=1)
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(pruning.masks.sparsity)

    make_trainer(tmp_path, callbacks=[pruning, Watch()], max_epochs=-1, max_steps=16).fit(make_module("mlp"))
    assert not any(seen[:BATCHES])
    assert seen == sorted(seen)
    assert 0.5 < seen[3 * BATCHES - 2] < 0.7 <= seen[3 * BATCHES - 1]


class Rates(pl.Callback):
    """The rate that the optimizer really used at every step, and the scheduler's own."""

    def __init__(self) -> None:
        self.used: list[float] = []
        self.scheduled: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.scheduled.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("rate", ["rewind", "constant", 0.5])
def test_fine_tuning_rates(rate: Any, tmp_path: Path) -> None:
    """Rewinding replays the rates before compression; the scheduler itself goes on as if nothing had happened."""
    plain, tuned = Rates(), Rates()
    make_trainer(tmp_path, callbacks=[plain]).fit(make_module("mlp"))
    phases = [GradualPruning(phase=Phase(0.25, 0.5)), FineTuning(Phase(0.5, 0.75), rate), tuned]
    make_trainer(tmp_path, callbacks=phases).fit(make_module("mlp"))
    begin, end, quarter = NUM_BATCHES // 2, NUM_BATCHES * 3 // 4, NUM_BATCHES // 4
    assert tuned.scheduled == plain.scheduled == plain.used
    assert tuned.used[:begin] == plain.used[:begin]
    assert tuned.used[end:] == plain.used[end:]
    expected = {
        "rewind": plain.used[:quarter],
        "constant": [plain.used[begin]] * quarter,
        0.5: [0.5 * r for r in plain.used[begin:end]],
    }
    assert tuned.used[begin:end] == pytest.approx(expected[rate])


def test_fine_tuning_freezes_by_name_and_gives_free_again(tmp_path: Path) -> None:
    seen: list[tuple[bool, torch.Tensor, torch.Tensor]] = []
    tuning = FineTuning(Phase(0.25, 0.5), "constant", freeze=["net.0"])

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            stem = pl_module.net[0]
            seen.append((tuning.active, stem[0].weight.detach().clone(), stem[1].running_mean.clone()))

    make_trainer(tmp_path, callbacks=[tuning, Watch()]).fit(make_module("conv+bn+residual"))
    for (_, weight, mean), (active, next_weight, next_mean) in pairwise(seen):
        assert torch.equal(weight, next_weight) == active
        assert torch.equal(mean, next_mean) == active
    assert sum(active for active, _, _ in seen) == NUM_BATCHES // 4


def test_ranges_and_batch_norm_freeze_near_the_end(tmp_path: Path) -> None:
    states: list[tuple[Any, Any]] = []
    training: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            ranges = copy.deepcopy(quantization_of(pl_module).state_dict().get("ranges"))
            states.append((ranges, pl_module.net[1].bn1.running_mean.clone()))
            training.append(pl_module.net[1].bn1.training)

    qat = QuantizationAwareTraining(calibrate=Phase(0.25, 0.5), phase=Phase(0.5, 1.0), freeze=0.5)
    module = make_module("conv+bn+residual")
    make_trainer(tmp_path, callbacks=[qat, Watch()]).fit(module)
    frozen = NUM_BATCHES * 3 // 4
    assert differences(states[frozen - 2], states[frozen - 1])
    assert not differences(states[frozen], states[-1])
    assert training == [True] * frozen + [False] * (NUM_BATCHES - frozen)
    assert module.net[1].bn1.training  # another run trains it again


def test_validation_never_moves_a_range_and_measuring_never_moves_the_run(tmp_path: Path) -> None:
    """A run with report and validation ends bit for bit as one without."""

    def train(report: bool, **options: Any) -> dict[str, Any]:
        callbacks = make_trainer(tmp_path).callbacks[:5]
        kept = [c for c in callbacks if report or not isinstance(c, CompressionReport)]
        module, trainer = make_module("conv+bn+residual"), make_trainer(tmp_path, callbacks=kept, **options)
        trainer.fit(module)
        return {"weights": module.state_dict(), "quantization": quantization_of(module).state_dict()}

    assert not differences(train(True), train(False, limit_val_batches=0))


def test_best_checkpoint_by_lightning_resumes(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    module, trainer = make_module("mlp"), make_trainer(tmp_path, [checkpoint], enable_checkpointing=True)
    trainer.fit(module)
    for path in sorted(tmp_path.glob("*.ckpt")):
        again, trainer_again = make_module("mlp"), make_trainer(tmp_path / "again")
        trainer_again.fit(again, ckpt_path=path)
        assert not differences(module.state_dict(), again.state_dict())


def test_loggers_get_the_same_numbers_and_what_pictures_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = MLFlowLogger("compression", tracking_uri=f"file:{tmp_path / 'mlflow'}")
    loggers = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "tb", ""), mlflow]
    make_trainer(tmp_path, logger=loggers).fit(make_module("conv+bn+residual"))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("compress/sparsity", "compress/phase", "compress/bytes", "compress/final_sparsity"):
        in_csv = [float(row[name]) for row in rows if row[name]]
        in_board = [event.value for event in events.Scalars(name)]
        in_mlflow = [metric.value for metric in mlflow.experiment.get_metric_history(mlflow.run_id, name)]
        assert in_csv
        assert in_csv == pytest.approx(in_board), name
        assert in_csv == pytest.approx(in_mlflow), name
    pictures = {"metric", "sparsity", "bits", "weights"}
    assert set(events.Tags()["images"]) == {f"compress/{name}" for name in pictures}
    kept = {Path(file.path).name for file in mlflow.experiment.list_artifacts(mlflow.run_id, "compress")}
    tables = {"report.json", "latency.json", "layers.json", "over_time.json"}
    assert kept == {f"{name}.png" for name in pictures} | tables | {"phases.txt"}


def lines_of_phases(text: str) -> list[str]:
    return [line for line in text.splitlines() if " bits a weight" in line]


@pytest.mark.parametrize(
    "bar", [TQDMProgressBar(), RichProgressBar(console_kwargs={"width": 200})], ids=["tqdm", "rich"]
)
def test_bars_show_phase_sparsity_bits_and_the_time_left(
    tmp_path: Path, bar: pl.Callback, capsys: pytest.CaptureFixture
) -> None:
    shown: list[dict[str, Any]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            shown.append(dict(trainer.progress_bar_callback.get_metrics(trainer, pl_module)))

    make_trainer(tmp_path, [bar, Watch()], enable_progress_bar=True).fit(make_module("mlp"))
    names = list(dict.fromkeys(items["phase"] for items in shown))
    assert names[0] == "dense"
    assert {"prune", "quantize"} <= set(names)
    assert "bits" not in shown[0]
    assert shown[-1]["bits"] == "8"
    assert float(shown[-1]["sparsity"]) == pytest.approx(SPARSITY, abs=0.01)
    assert all(re.fullmatch(r"\d+:\d\d:\d\d", items["left"]) for items in shown[1:])
    assert shown[-1]["left"] == "0:00:00"
    above = lines_of_phases(capsys.readouterr().out)
    assert any("prune: steps " in line for line in above)


@pytest.mark.parametrize("width", [80, 160])
def test_richs_bar_stays_on_one_line(tmp_path: Path, width: int) -> None:
    screen = io.StringIO()
    bar = RichProgressBar(console_kwargs={"width": width, "force_terminal": True, "file": screen})
    make_trainer(tmp_path, [bar], enable_progress_bar=True).fit(make_module("mlp"))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    begins = ("Epoch", "Validation", "Sanity")
    of_phases = [i for i, line in enumerate(lines) if ": steps " in line]
    told = {i + more for i in of_phases for more in (0, 1)}  # a line above the bar may be a long one
    assert [line for i, line in enumerate(lines) if line and not line.startswith(begins) and i not in told] == []
    assert any("quantize: 0.800 8b" in line if width == 80 else "sparsity: 0.800 bits: 8" in line for line in lines)


def test_a_plain_log_has_a_line_a_phase(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    try:
        make_trainer(tmp_path).fit(make_module("mlp"))
    finally:
        logger.removeHandler(caplog.handler)
    lines = lines_of_phases("\n".join(record.getMessage() for record in caplog.records))
    assert [line.split(":")[0] for line in lines] == ["dense", *PHASES]
    assert "32 bits a weight" in lines[0]
    assert "8 bits a weight, validated" in lines[-1]


def test_the_line_of_a_phase_has_the_metric_of_its_own_last_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A phase may end in the step of a validation, or between two of them, or without one."""
    pruning = GradualPruning(0.5, phase=Phase(4, 7, "step"), every=1)
    tuning = FineTuning(phase=Phase(9, 10, "step"))
    seen: list[tuple[int, float]] = []

    class Watch(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                seen.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    options = {"limit_train_batches": 4, "val_check_interval": 2, "max_epochs": 3, "limit_val_batches": 1}
    callbacks = [Watch(), pruning, tuning, CompressionReport(monitor="val_loss", show=False)]
    try:
        make_trainer(tmp_path, callbacks=callbacks, **options).fit(make_module("mlp"))
    finally:
        logger.removeHandler(caplog.handler)
    lines = lines_of_phases("\n".join(record.getMessage() for record in caplog.records))
    values = dict(seen)
    assert set(values) == {2, 4, 6, 8, 10, 12}
    said = {line.split(":")[0]: line.rpartition(", ")[2] for line in lines}
    assert said["dense"] == f"validated {values[4]:.4f} at step 4"
    assert said["prune"] == f"validated {values[6]:.4f} at step 6"
    assert said["after prune"] == f"validated {values[8]:.4f} at step 8"
    assert said["fine-tune"] == f"validated {values[10]:.4f} at step 10"
    assert said["after fine-tune"] == f"validated {values[12]:.4f} at step 12"


def test_sharding_strategies_are_refused() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    strategy = FSDPStrategy()
    trainer.strategy.__class__ = type("Sharding", (type(trainer.strategy),), {"restore_checkpoint_after_setup": True})
    assert strategy.restore_checkpoint_after_setup
    with pytest.raises(ValueError, match="Accepted are single-device and DDP strategies"):
        GradualPruning().setup(trainer, make_module("mlp"), "fit")
