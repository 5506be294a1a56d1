"""Stop the runs of a sweep that cannot win."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compress.checks import check_one_of, first_line
from lightning_compress.files import write_whole
from lightning_compress.metrics import MODES, Mode
from lightning_compress.thinning import Thinning

from .evaluate import why_not_validated
from .judgement import Judge
from .outputs import written
from .run import is_launched

__all__ = ["RunStopped", "StopUnderperforming"]

_FEW = 4  # runs that must have been where this one is, before it is judged


class RunStopped(Exception):
    """A run that was stopped."""


class StopUnderperforming(pl.Callback):
    """Ends a run of a sweep as soon as it validates far worse than the others did at the same step.

    The median rule of Vizier (Golovin 2017), with a margin, so that a small model which pays a little accuracy is left
    alone. Each run writes what it validates to ``curve.json`` in its folder, where the others find it: runs may be jobs
    of any launcher and sweeper that share a file system. Of how many objectives there are it knows nothing.

    Args:
        dirpath: Folder of the run; those of the others lie beside it.
        margin: How far below the median of the others is hopeless, in the metric's own unit.
        monitor: The validation metric; an accuracy or the like without one, else the validation loss.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is; told by the metric's name without one.

    Raises:
        ValueError: If the margin is no number above 0, the run has no validation data or does not log the metric, or
            its name does not tell which way is better.
        RunStopped: Out of ``Trainer.fit``, when the run is ended.

    Example:
        >>> trainer = pl.Trainer(callbacks=[StopUnderperforming("sweep/3", margin=0.1)], logger=False,
        ...                      enable_checkpointing=False)
    """

    def __init__(
        self, dirpath: str | Path, margin: float = 0.1, monitor: str | None = None, mode: Mode | None = None
    ) -> None:
        self.path = Path(dirpath) / "curve.json"
        self.margin = margin
        self.monitor = monitor
        self.mode = mode
        self.curve: dict[str, float] = {}
        self._thinning = Thinning()  # of the curve
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < math.inf:
            raise ValueError(
                f"{type(self).__name__}.margin={margin!r}: accepted is a number above 0, in the metric's own unit (0.1 "
                "of an accuracy is ten points)."
            )
        check_one_of(f"{type(self).__name__}.mode", mode, MODES, "Take 'max' if higher is better.")
        self._judge = Judge(type(self).__name__, monitor, mode)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a run that is never validated, or whose end would reach its sweep as another error."""
        if is_launched(trainer):
            raise ValueError(
                f"{type(self).__name__} with strategy='ddp_spawn', 'ddp_fork' or 'ddp_notebook': it ends a run by an "
                "exception, which does not leave the processes that the Trainer launches. Accepted are strategies that "
                "launch none, such as Trainer(strategy='ddp')."
            )
        why = why_not_validated(trainer, pl_module) if stage == "fit" else None
        if why is not None:
            raise ValueError(
                f"{type(self).__name__} judges by validation data, but {why} Or leave the callback out (hopeless=null)."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge by what is asked for now."""
        self._judge = Judge(type(self).__name__, self.monitor, self.mode)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a metric that is not logged."""
        self._judge.see_validation(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a metric whose name does not tell which way is better, also where there was no sanity check."""
        self._judge.check_mode(self.monitor)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        name = self._seen(trainer)
        if name is None:
            return
        value = float(trainer.callback_metrics[name])
        step = str(trainer.global_step)
        points = list(self.curve.items())
        self.curve = dict(points[self._thinning.make_room(points)]) | {step: value}
        reason = None
        if trainer.is_global_zero:
            self._write(over=False)
            others = [curve[step] for curve in self._others() if step in curve]
            if len(others) >= _FEW:
                usual = median(others)
                if self._judge.drop(usual, value) > self.margin:  # NaN is hopeless, too
                    reason = f"{name} {value:.4g} at step {step}, where {len(others)} others had {usual:.4g}"
        reason = trainer.strategy.broadcast(reason)
        if reason is not None:
            rank_zero_info(f"{type(self).__name__} ends the run: {reason}")
            raise RunStopped(reason)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on others are compared with this run."""
        if trainer.is_global_zero:
            self._write(over=True)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What was validated so far."""
        return {"curve": dict(self.curve), "thinning": asdict(self._thinning)}

    def load_state_dict(self, state_dict: dict[str, dict[str, Any]]) -> None:
        """Take up where a checkpoint was written."""
        self.curve = dict(state_dict["curve"])
        # A checkpoint of an earlier version has kept all.
        self._thinning = Thinning(**state_dict.get("thinning", {}))

    def _seen(self, trainer: pl.Trainer) -> str | None:
        """The metric; None, with a warning, where this validation has not logged it, for that ends no run."""
        try:
            name = self._judge.see_validation(trainer)
        except ValueError as error:
            rank_zero_warn(f"{type(self).__name__} judges nothing: {error}")
            return None
        if name in trainer.callback_metrics:
            return name
        rank_zero_warn(f"{type(self).__name__} judges nothing where {name or self.monitor!r} is not logged.")
        return None

    def _write(self, over: bool) -> None:
        curve = {step: value for step, value in self.curve.items() if math.isfinite(value)}
        written(self.path, lambda: write_whole(self.path, json.dumps({"over": over, "curve": curve})))

    def _others(self) -> list[dict[str, float]]:
        """The curves of runs that went to their end."""
        paths = [path for path in self.path.parent.parent.glob("*/curve.json") if path != self.path]
        found = [_read(path) for path in sorted(paths)]
        return [run["curve"] for run in found if run.get("over")]


def _read(path: Path) -> dict[str, Any]:
    """What a run wrote; nothing where that is no curve, which costs this comparison and no run."""
    try:
        found = json.loads(path.read_text())
        return {"over": found["over"], "curve": {str(k): float(v) for k, v in found["curve"].items()}}
    except Exception as error:  # a file that is cut or foreign
        rank_zero_warn(f"{path} is left out: it cannot be read ({first_line(error)}).")
        return {}
