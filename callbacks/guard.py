"""Compress as far as the validated metric allows, and go back where it does not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_compress.guard_steps import StepPolicy, check_settings
from lightning_compress.metrics import Mode
from lightning_compress.thinning import Thinning

from .evaluate import validation_follows
from .judgement import Judge
from .levels import Levels
from .protocol import all_callbacks, compression_progress
from .run import read_clock, share_after_batch
from .steering import check_guarded, progress_of, prune_if_alone, release, steered
from .verdict import end_with_verdict

__all__ = ["AccuracyGuard"]


class AccuracyGuard(pl.Callback):
    """Compresses step by step while the validated metric stays within a drop; rolls back if it does not.

    The guard steers the callbacks beside it. While ``GradualPruning`` is active the guard overrides its schedule: each
    step prunes a fraction of the remaining weights. While ``QuantizationAwareTraining`` is active, each step lowers the
    bits of the weights. The metric is checked after every validation. While it holds, the state is kept and the next
    step is taken. If it does not, weights, optimizers, masks and ranges are restored bit for bit to the last state that
    held, and half the step is tried. The smallest step is tried again and again, after longer and longer waits, because
    what fails at a high learning rate may hold at a lower one. No further step is taken in the last quarter of the run,
    which is left for recovery. The run ends with the last state that held. The learning rate is not rolled back.
    Without a callback to steer, the guard prunes by LAMP scores. Where a run is resumed from a checkpoint at which a
    validation was due, which Lightning then leaves out, the guard judges by a validation of a copy.

    Args:
        max_drop: How far the metric may fall below that of the dense model, in the metric's own unit: 0.01 of an
            accuracy is one percentage point.
        monitor: The validation metric. Default: an accuracy or similar if one is logged, otherwise the loss.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is. Default: told by whole words of the metric's name,
            which is said in a line; needed where they do not tell.
        reference: The dense model's metric. Default: measured just before compression begins. Nothing is pruned before
            a given one holds.
        step: Fraction of the remaining weights that the first step prunes, 0..1.
        bits: Bits of the weights to try in turn, if a ``QuantizationAwareTraining`` is beside the guard.
        patience: Consecutive validations that may miss before the rollback; the weights recover in this time.
        resolution: The smallest step.
        margin: Safety margin subtracted from ``max_drop`` to allow for sampling noise. Default: one standard error for
            accuracies (at most ``max_drop / 2``), 0 otherwise.
        strict: Whether it is an error, when ``fit`` ends, if no compressed state has held, after checkpoints and files
            are written; else it is a warning.

    Raises:
        ValueError: If a value is out of range, or the run has no validation data.

    Example:
        >>> trainer = pl.Trainer(callbacks=[AccuracyGuard(max_drop=0.01, monitor="val_acc")], logger=False,
        ...                      enable_checkpointing=False)
    """

    leaves = ("_judge",)

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
        self,
        max_drop: float = 0.01,
        monitor: str | None = None,
        mode: Mode | None = None,
        reference: float | None = None,
        step: float = 0.5,
        bits: Sequence[int] = (6, 4, 3, 2),
        patience: int = 2,
        resolution: float = 0.1,
        margin: float | None = None,
        strict: bool = False,
    ) -> None:
        self.max_drop = max_drop
        self.monitor = monitor
        self.mode = mode
        self.reference = reference
        self.step = step
        self.bits = bits
        self.patience = patience
        self.resolution = resolution
        self.margin = margin
        self.strict = strict
        self.history: list[dict[str, Any]] = []
        check_settings(type(self).__name__, vars(self))
        self.bits = tuple(bits)
        self._levels = Levels(StepPolicy(step, resolution), self.bits, patience)
        self._num_samples = 0  # of the last validation
        self._last_step = -1
        self._due: float | None = None  # share of the run after which a validation follows, which is not over yet
        self._waits = False  # for the next batch, at which what was asked for last is done
        self._thinning = Thinning()  # of the history
        self._name: str | None = None  # of the metric, once it was seen
        self._judge = Judge(type(self).__name__, monitor, mode)

    @property
    def level(self) -> dict[str, float]:
        """The level of the last state that held: ``sparsity``, or ``bits``; empty before any."""
        if self._levels.good is None or self._levels.lever is None:
            return {}
        return {self._levels.lever: self._levels.good["level"]}

    def asked(self) -> dict[str, float | str]:
        """How far the metric may fall."""
        return {"drop": self.max_drop}

    def stands(self) -> dict[str, float | str]:
        """How far it is down in the state that held, else in the last one that was judged."""
        value = self.history[-1]["value"] if self.history else None
        if self._levels.good is not None:
            value = self._levels.good["value"]
        if value is None or self.reference is None:
            return {"drop": "none that was judged"}
        return {"drop": self._judge.drop(self.reference, value)}

    @property
    def reached(self) -> bool:
        """Whether a compressed state has held."""
        return not self.shortfalls()

    def shortfalls(self) -> dict[str, str]:
        """Why none has."""
        levels = self._levels
        why = self._judge.why_nothing_held(levels.lever, levels.good, self.reference, self.max_drop)
        return {} if why is None else {"drop": why}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be guarded; without a callback to steer, add one that prunes."""
        if stage != "fit":
            return
        self._due, self._waits = None, False
        check_guarded(trainer, pl_module, self, self.bits)
        end_with_verdict(trainer)
        prune_if_alone(trainer, self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge by what was asked for, or by what was judged before."""
        self._judge = Judge(type(self).__name__, self._name or self.monitor, self.mode)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a metric that is not logged, and a reference that it cannot reach."""
        self._num_samples = 0
        self._judge.see_validation(trainer)
        self._judge.check_reference(self.reference, trainer.callback_metrics, "in the sanity check")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Override the schedule; a resumed callback still knows the level it was steered to."""
        self._judge.check_mode(self._judge.monitor)
        pruner = steered(trainer, "sparsity")
        if pruner is not None and pruner.goal is None:
            pruner.steer(0.0)
        if self._due is not None and self._levels.lever is not None and self._last_step != trainer.global_step:
            self._judge_now(trainer, pl_module, self._due)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Measure the reference when compression is about to begin; follow the phases as they begin and end."""
        self._waits = False
        clock = read_clock(trainer, batch_idx)
        levels = self._levels
        pruner = steered(trainer, "sparsity")
        prunes = pruner is not None and levels.lever is None and progress_of(pruner, clock) >= 0
        if prunes or (self.reference is None and compression_progress(trainer, clock) >= 0):
            dense = self._judge.measure(trainer, pl_module)
            self.reference = self._judge.refer(self.reference, dense, clock.step, self.max_drop)
            if prunes:
                self._begin_to_prune(trainer, pl_module, dense)
        pruned = pruner is not None and levels.lever == "sparsity" and progress_of(pruner, clock) >= 1
        if pruned and levels.good is not None and levels.asked != levels.good["level"]:
            # a level that has not held until the phase of pruning ends is given up
            if levels.judged:
                levels.back(trainer, pl_module)
            else:
                self._judge_now(trainer, pl_module)
        quantizer = steered(trainer, "bits")
        if quantizer is not None and levels.lever != "bits" and progress_of(quantizer, clock) >= 0:
            assert quantizer.goal is not None
            levels.begin_bits(quantizer.goal, self.resolution)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Remember that a validation follows: Lightning leaves it out of a run that is resumed from here."""
        self._due = share_after_batch(trainer) if validation_follows(trainer) and not self._waits else None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from 0."""
        self._num_samples = 0

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the examples: the more there are, the less noise there is in the metric."""
        with suppress(MisconfigurationException):  # a batch of no recognizable size
            self._num_samples += extract_batch_size(batch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._due = None
        name = self._judge.see_validation(trainer)
        if self._levels.lever is None or self._waits or self._last_step == trainer.global_step:
            return
        logged = trainer.callback_metrics
        if name is None or name not in logged:
            rank_zero_warn(f"{type(self).__name__} judges nothing where {name or self.monitor!r} is not logged.")
            return
        # In several processes the metric of rank zero decides for all.
        value = float(trainer.strategy.broadcast(float(logged[name])))
        self._judge_value(trainer, pl_module, value, share_after_batch(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End with a state that was judged and held."""
        if self._levels.lever is not None and self._last_step != trainer.global_step and not self._waits:
            self._judge_now(trainer, pl_module)
        if not self._levels.is_held(trainer):
            self._levels.back(trainer, pl_module)
        self._judge.doubt(self._levels.good, self.reference, self.max_drop)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Return to the last state that held, of a run that Ctrl-C has ended in the middle of anything."""
        if isinstance(exception, KeyboardInterrupt) and not self._levels.is_held(trainer):
            self._levels.back(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of what is steered."""
        release(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The last state that held, and how far the search is."""
        return {
            **self._levels.state_dict(),
            "reference": self.reference,
            "name": self._judge.name or self._name,
            "last_step": self._last_step,
            "due": self._due,
            "history": copy.deepcopy(self.history),
            "thinning": asdict(self._thinning),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._levels.load_state_dict(state_dict)
        self.reference = state_dict["reference"]
        self._name = state_dict["name"]
        self._last_step = state_dict["last_step"]
        # A checkpoint of an earlier version lacks it.
        self._due = state_dict.get("due")
        self.history = copy.deepcopy(state_dict["history"])
        # A checkpoint of an earlier version has kept all.
        self._thinning = Thinning(**state_dict.get("thinning", {}))

    def settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the callback beside it that was added in processes of their own."""
        prune_if_alone(trainer, self)

    def _begin_to_prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, dense: float) -> None:
        """Take the first step from the dense model, or let that train on where it does not hold itself."""
        assert self.reference is not None
        self._levels.begin_sparsity(trainer)
        if self._judge.dense_holds(self.reference, dense, self.max_drop):
            self._levels.hold(trainer, pl_module, dense)
            self._levels.go_on(trainer, share=0.0)  # the first step is always worth it
            acts_first = (c for c in all_callbacks(trainer) if c is self or c is steered(trainer, "sparsity"))
            self._waits = next(acts_first) is not self

    def _judge_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule, share: float = 1.0) -> None:
        """Judge what no validation has judged, and will not any more."""
        counting = pl.Callback()
        counting.__dict__["on_validation_start"] = self.on_validation_start
        counting.__dict__["on_validation_batch_end"] = self.on_validation_batch_end
        value = self._judge.measure(trainer, pl_module, counting)
        self._num_samples //= trainer.world_size  # each process has seen all of them
        self._judge_value(trainer, pl_module, value, share)

    def _judge_value(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float, share: float) -> None:
        """Judge the level that is asked for, and write it down."""
        assert self.reference is not None
        levels = self._levels
        step = trainer.global_step
        self._last_step = step
        self._due = None
        asked = levels.asked
        allowed = self._judge.allowed(self.max_drop, self.margin, value, self._num_samples * trainer.world_size)
        drop = partial(self._judge.drop, self.reference)
        outcome = levels.judge(trainer, pl_module, value, drop, allowed, share)
        if share >= 1 and not levels.is_held(trainer):  # so that the last checkpoint has it, too
            levels.back(trainer, pl_module)
        entry = {"step": step, levels.lever or "": asked, "value": value, "outcome": outcome}
        self._thinning.add(self.history, entry)
        rank_zero_info(
            f"{type(self).__name__} at step {step}: {levels.lever} {asked:.4g} {outcome}, {self._judge.name} "
            f"{value:.4f} (dense {self.reference:.4f})"
        )
