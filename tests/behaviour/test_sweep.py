"""StopUnderperforming: which run of a sweep is ended, when, and what it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_compress.callbacks import CompressionReport
from lightning_compress.callbacks.sweep import RunStopped, StopUnderperforming

from ..harness import make_trainer
from ..zoo import BATCHES, MLP


class Fixed(MLP):
    """Validates as told."""

    value = 0.9

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.value - 0.3 * (self.current_epoch >= 2) * (self.value < 0.8))
        self.log("val_loss", 1 - self.value)


def run(folder: Path, number: int, value: float, **options: Any) -> pl.Trainer:
    module = Fixed()
    module.value = value
    where = folder / str(number)
    callbacks = [CompressionReport(where, show=False), StopUnderperforming(where, margin=0.2, **options)]
    trainer = make_trainer(where, callbacks=callbacks, max_epochs=4)
    trainer.fit(module)
    return trainer


def test_it_ends_where_it_falls_behind_the_others_and_leaves_no_report(tmp_path: Path) -> None:
    for i in range(4):
        run(tmp_path, i, 0.9)
    with pytest.raises(RunStopped, match=rf"val_acc 0.45 at step {3 * BATCHES}, where 4 others had 0.9"):
        run(tmp_path, 4, 0.75)
    assert not (tmp_path / "4" / "report.json").exists()
    assert list(json.loads((tmp_path / "4" / "curve.json").read_text())["curve"]) == [
        str(BATCHES * i) for i in (1, 2, 3)
    ]
    assert (tmp_path / "3" / "report.json").exists()


def test_a_run_within_the_margin_goes_on_and_so_does_one_with_few_others(tmp_path: Path) -> None:
    for i in range(3):
        run(tmp_path, i, 0.9)
    assert run(tmp_path, 3, 0.1).current_epoch == 4  # three others are too few
    assert run(tmp_path, 4, 0.85).current_epoch == 4


def test_nan_and_a_loss_are_judged_too(tmp_path: Path) -> None:
    for i in range(4):
        run(tmp_path, i, 0.9, monitor="val_loss")
    with pytest.raises(RunStopped):
        run(tmp_path, 4, math.nan, monitor="val_loss")
    with pytest.raises(RunStopped, match=r"val_loss 0.4"):
        run(tmp_path, 5, 0.6, monitor="val_loss")


def test_a_run_that_was_ended_is_nobody_s_measure(tmp_path: Path) -> None:
    for i in range(4):
        run(tmp_path, i, 0.9)
    with pytest.raises(RunStopped):
        run(tmp_path, 4, 0.1)
    with pytest.raises(RunStopped, match="4 others"):
        run(tmp_path, 5, 0.1)


@pytest.mark.parametrize("margin", [0, -0.1, math.inf, "10%", True])
def test_a_margin_that_is_none_is_refused(margin: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"StopUnderperforming\.margin=.*accepted is a number above 0"):
        StopUnderperforming(tmp_path, margin)


def test_without_validation_it_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="judges by validation data"):
        make_trainer(tmp_path, callbacks=[StopUnderperforming(tmp_path)], limit_val_batches=0).fit(Fixed())
