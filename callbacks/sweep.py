"""Stop the runs of a sweep that cannot win."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from .evaluate import has_validation, more_is_better, pick_metric

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

    Raises:
        ValueError: If the margin is no number above 0, or the run has no validation data.
        RunStopped: Out of ``Trainer.fit``, when the run is ended.

    Example:
        >>> trainer = pl.Trainer(callbacks=[StopUnderperforming("sweep/3", margin=0.1)], logger=False,
        ...                      enable_checkpointing=False)
    """

    def __init__(self, dirpath: str | Path, margin: float = 0.1, monitor: str | None = None) -> None:
        self.path = Path(dirpath) / "curve.json"
        self.margin = margin
        self.monitor = monitor
        self.curve: dict[str, float] = {}
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < math.inf:
            raise ValueError(
                f"{type(self).__name__}.margin={margin!r}: accepted is a number above 0, in the metric's own unit (0.1 "
                "of an accuracy is ten points)."
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a run that is never validated."""
        if stage == "fit" and not has_validation(trainer, pl_module):
            raise ValueError(
                f"{type(self).__name__} judges by validation data, but there is no validation_step, no val_dataloader, "
                "or limit_val_batches=0. Add both to the LightningModule, or leave the callback out (hopeless=null)."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        name = self.monitor or pick_metric(list(trainer.callback_metrics))
        if name not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[name])
        step = str(trainer.global_step)
        self.curve[step] = value
        reason = None
        if trainer.is_global_zero:
            self._write(over=False)
            others = [curve[step] for curve in self._others() if step in curve]
            if len(others) >= _FEW:
                usual = median(others)
                short = usual - value if more_is_better(name) else value - usual
                if not short <= self.margin:  # NaN is hopeless, too
                    reason = f"{name} {value:.4g} at step {step}, where {len(others)} others had {usual:.4g}"
        reason = trainer.strategy.broadcast(reason)
        if reason is not None:
            rank_zero_info(f"{type(self).__name__} ends the run: {reason}")
            raise RunStopped(reason)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on others are compared with this run."""
        if trainer.is_global_zero:
            self._write(over=True)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What was validated so far."""
        return {"curve": dict(self.curve)}

    def load_state_dict(self, state_dict: dict[str, dict[str, float]]) -> None:
        """Take up where a checkpoint was written."""
        self.curve = dict(state_dict["curve"])

    def _write(self, over: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"over": over, "curve": {k: v for k, v in self.curve.items() if math.isfinite(v)}}))
        part.replace(self.path)

    def _others(self) -> list[dict[str, float]]:
        """The curves of runs that went to their end."""
        paths = [path for path in self.path.parent.parent.glob("*/curve.json") if path != self.path]
        found = [json.loads(path.read_text()) for path in sorted(paths)]
        return [run["curve"] for run in found if run["over"]]
