"""Measure and report what compression does to a model."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from lightning_compress.analysis.history import History, figures, histogram
from lightning_compress.analysis.inspect import (
    estimate_bytes,
    mean_bits,
    sparsity,
    weight_bits,
    weight_layers,
)
from lightning_compress.analysis.report import Report
from lightning_compress.analysis.terminal import terminal_report
from lightning_compress.checks import check_flag, check_one_of, check_path, check_text
from lightning_compress.metrics import MODES, Mode, is_of_training, pick_metric
from lightning_compress.phase import Clock
from lightning_compress.structure.record import Record
from lightning_compress.tracking import define_metric

from .control import Reporting, read_control
from .evaluate import validated, why_not_validated
from .final_report import Measured, formats_of, make_report
from .judgement import choose_metric, settle_mode
from .live_shape import check_strategy
from .measure import measure
from .outputs import new_folder, output_folder
from .protocol import compression_progress
from .report_sinks import say, send, show_in_progress_bar, write_report
from .run import current_phase, read_clock
from .verdict import end_with_verdict

__all__ = ["CompressionReport"]


class CompressionReport(pl.Callback):
    """Logs ``compress/*`` during training, and at the end writes report.json and report.html and prints a table.

    Just before compression begins the dense model is measured on the validation data, on a copy; without such data all
    is measured but the metric. The dense model has not seen the rest of the run by then: what compression costs is told
    by a ``control``, the same run without it. A packed checkpoint,
    ``packed.safetensors``, lies beside the report. Tables, pictures and files go to every logger that takes them.

    Args:
        dirpath: Folder of the report, tried before training; without one the logger's folder of the run, or where there
            is none the Trainer's default_root_dir. A report of an earlier run stays: the new one then stands in
            ``version_1`` beside it. A run that is resumed writes where it would have written.
        monitor: The validation metric to report; without one an accuracy or the like, else the validation loss.
        show: Print the table at the end.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is: of which value W&B's summary holds the best. Told by
            the metric's name without one.
        control: The same run without compression, a row of its own: the CompressionReport of a plain run that is over,
            or the path of its ``report.json``. One of another length is warned of.

    Raises:
        TypeError: If the control is no CompressionReport and no path.
        ValueError: If it has no report, its run compressed the model, or its metric is not the ``monitor``.

    Example:
        >>> trainer = pl.Trainer(callbacks=[CompressionReport(monitor="val_acc")], logger=False,
        ...                      enable_checkpointing=False)
    """

    leaves = ("report", "_folder")

    def __init__(
        self,
        dirpath: str | Path | None = None,
        monitor: str | None = None,
        show: bool = True,
        mode: Mode | None = None,
        control: Reporting | str | Path | None = None,
    ) -> None:
        if dirpath is not None:
            check_path("CompressionReport.dirpath", dirpath, "the path of a folder, or None")
        if monitor is not None:
            check_text("CompressionReport.monitor", monitor, "a metric's name, or None")
        check_flag("CompressionReport.show", show)
        self.dirpath = dirpath
        self.monitor = monitor
        self.show = show
        self.mode = mode
        check_one_of(f"{type(self).__name__}.mode", mode, MODES, "Take 'max' if higher is better.")
        self.report: Report | None = None
        self.control = read_control(control, monitor)
        self._folder = Path()
        self._known: str | None = None  # the folder that a resumed run had
        self._dense: dict[str, Any] | None = None
        self._history = History()
        self._seconds = {"fit": 0.0, "overhead": 0.0}
        self._began: float | None = None
        self._sparsity = 0.0
        self._bits = 32.0
        self._share = math.nan  # of the run that is over
        self._resumed_at: tuple[float, float] | None = None  # when this process began, and at which share
        self._phase = (0, "dense")
        self._over: tuple[int, int, str, str] | None = None  # an ended phase, not yet spoken of
        self._validated: tuple[int, float] | None = None  # the last step at which it was, and the metric
        self._was_before = False
        self._last_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse sharding strategies and a folder that cannot be written to; say where no metric will be measured."""
        if stage == "fit":
            check_strategy(trainer, self)
            end_with_verdict(trainer)
            self._known = None
            self._folder = output_folder(trainer, "CompressionReport.dirpath", self.dirpath)
            why = why_not_validated(trainer, pl_module)
            if why is not None:
                rank_zero_warn(f"{type(self).__name__} measures no metric: {why}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the watch, and choose the folder."""
        names = ["report.json", "report.html", "packed.safetensors"]
        self._folder = new_folder(self, self._folder, names, self._known)
        self._began = time.perf_counter()
        self._resumed_at = None
        show_in_progress_bar(trainer, self._items)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a metric that is asked for and not logged."""
        if self.monitor is not None and not is_of_training(self.monitor):
            choose_metric(f"{type(self).__name__}.monitor", self.monitor, list(trainer.callback_metrics))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the dense model now if compression begins at once."""
        if trainer.global_step == 0:
            self._was_before = True
            self._watch(trainer, pl_module, read_clock(trainer, 0))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Say what a phase reached whose last step no validation followed."""
        self._say(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Log; measure the dense model when compression is about to begin."""
        clock = read_clock(trainer, batch_idx + 1)
        self._watch(trainer, pl_module, clock)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and clock.step != self._last_step and clock.step % every == 0:
            self._last_step = clock.step
            with self._overhead():
                self._log(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the metric for the picture."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        name = self.monitor or pick_metric(validated(trainer) or list(trainer.callback_metrics))
        if name in trainer.callback_metrics:
            if not self._history.metric:
                self._define(trainer, name)
            self._validated = trainer.global_step, float(trainer.callback_metrics[name])
            self._history.validate(*self._validated)
            self._say(trainer)
        elif name is not None:
            rank_zero_warn(f"{type(self).__name__}.monitor={name!r} is not logged by this validation.")

    def _define(self, trainer: pl.Trainer, name: str) -> None:
        """Let W&B's summary hold the best and the last value."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                mode = settle_mode(type(self).__name__, name, self.mode, decides=False)
                define_metric(logger.experiment, name, mode == "max")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the watch."""
        if self._began is not None:
            self._seconds["fit"] += time.perf_counter() - self._began
            self._began = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write and show the report, after every export is done."""
        if stage == "fit":
            self.conclude(trainer, pl_module)

    def conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write and show the report of a run as it is now."""
        if not trainer.is_global_zero:
            return
        with self._overhead():
            self._phase = current_phase(trainer, read_clock(trainer, 0))
            self._look(pl_module)
            self._end_phase(trainer.global_step)
            self._say(trainer)
            self.report = self._make(trainer, pl_module)
        self.report["seconds"] = {key: round(value, 3) for key, value in self._seconds.items()}
        pictures = figures(self._history, self.report["metric"])
        page = write_report(self.report, pictures, self._folder)
        for logger in trainer.loggers:
            send(logger, self.report, self._history, pictures, trainer.global_step)
        if self.show:
            if trainer.progress_bar_callback is not None:
                trainer.progress_bar_callback.teardown(trainer, pl_module, "fit")  # so that no live bar is in the way
            console = Console()
            for part in terminal_report(self.report):
                console.print(part)
            if page is not None:
                console.print(f"report: {page}", soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        now = 0.0 if self._began is None else time.perf_counter() - self._began
        return {
            "dense": copy.deepcopy(self._dense),
            "was_before": self._was_before,
            "folder": str(self._folder),
            "history": copy.deepcopy(self._history.to_state()),
            "seconds": {"fit": self._seconds["fit"] + now, "overhead": self._seconds["overhead"]},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self._dense = state_dict["dense"]
        self._was_before = state_dict["was_before"]
        # A checkpoint of an earlier version lacks it.
        self._known = state_dict.get("folder")
        self._history = History.from_state(copy.deepcopy(state_dict["history"]))
        self._seconds = dict(state_dict["seconds"])

    @contextmanager
    def _overhead(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds["overhead"] += time.perf_counter() - begin

    def _items(self) -> dict[str, str]:
        """What progress bars show: the phase, what compresses in it, and the time that the run has left."""
        shown = {"phase": self._phase[1], "sparsity": f"{self._sparsity:.3f}"}
        if self._bits < 32:
            shown["bits"] = f"{self._bits:.3g}"
        if self._resumed_at is not None and self._share > self._resumed_at[1]:
            began, share = self._resumed_at
            seconds = (time.perf_counter() - began) * (1 - self._share) / (self._share - share)
            shown["left"] = str(timedelta(seconds=round(max(0.0, seconds))))
        return shown

    def _end_phase(self, step: int) -> None:
        """Remember what the phase reached that ends at a step."""
        begin, name = self._history.phases[-1] if self._history.phases else (step, "")
        if begin != step:
            self._over = begin, step, name, f"sparsity {self._sparsity:.3f}, {self._bits:.3g} bits a weight"

    def _say(self, trainer: pl.Trainer) -> None:
        """A line on the phase that is over, with the last metric that was validated within it."""
        if self._over is None:
            return
        begin, end, name, reached = self._over
        self._over = None
        # of a long run the history keeps not every validation
        known = [*self._history.metric, *([self._validated] if self._validated else [])]
        within = [(step, value) for step, value in known if begin < step <= end]
        metric = f"validated {within[-1][1]:.4f} at step {within[-1][0]:.0f}" if within else "not validated"
        say(trainer, f"{name}: steps {begin} to {end}, {reached}, {metric}")

    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, clock: Clock) -> None:
        """Follow the phase; measure once, when compression is about to begin."""
        self._phase = current_phase(trainer, clock)
        self._share = clock.run
        if self._resumed_at is None:
            self._resumed_at = time.perf_counter(), clock.run
        if not self._history.phases or self._history.phases[-1][1] != self._phase[1]:
            if self._history.phases:
                self._look(pl_module)
                self._end_phase(clock.step)
            self._history.phases.append([clock.step, self._phase[1]])
        begins = compression_progress(trainer, clock) >= 0
        if begins and self._was_before and self._dense is None and trainer.is_global_zero:
            with self._overhead():
                self._dense = measure(trainer, pl_module, formats_of(trainer))
                self._history.bins, self._history.before = histogram(weight_layers(pl_module), self._history.bins)
        self._was_before = not begins

    def follow(self, pl_module: pl.LightningModule, record: Record) -> None:
        """Look at the layers that are left: bars and pictures show the model as it is."""
        self._look(pl_module)

    def _look(self, pl_module: pl.LightningModule) -> None:
        layers = weight_layers(pl_module)
        shares = {x.name: sparsity([x]) for x in layers}
        bits = {x.name: weight_bits(x) for x in layers}
        self._history.look(pl_module.trainer.global_step, shares, bits)
        self._sparsity = sparsity(layers)
        self._bits = mean_bits(layers)

    def _log(self, pl_module: pl.LightningModule) -> None:
        self._look(pl_module)
        values = {
            "compress/sparsity": self._sparsity,
            "compress/phase": float(self._phase[0]),
            "compress/bytes": float(estimate_bytes(pl_module)),
        }
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1, rank_zero_only=True)

    def _make(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Report:
        compressed = measure(trainer, pl_module, formats_of(trainer), timed=True)
        self._history.bins, self._history.after = histogram(weight_layers(pl_module), self._history.bins)
        path = self._folder / "packed.safetensors"
        return make_report(trainer, pl_module, Measured(self._dense, self.control, compressed), self.monitor, path)
