"""Compress as far as the validated metric allows, and go back where it does not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_compress.guard_steps import (
    StepPolicy,
    allowed_drop,
    check_settings,
    metric_drop,
    next_bits,
    next_sparsity,
)

from .evaluate import choose_metric, copied, evaluate, more_is_better
from .protocol import compression_progress
from .rollback import HeldState, go_back, keep
from .run import read_clock
from .steering import check_guarded, progress_of, prune_if_alone, release, steered

__all__ = ["AccuracyGuard"]

_FIELDS = ("reference", "_kind", "_asked", "_good", "_num_missed", "_last_step", "_name")
_RECOVER = 0.25  # fraction of the run, its last, in which no further step is taken


class AccuracyGuard(pl.Callback):
    """Compresses step by step while the validated metric stays within a drop; rolls back if it does not.

    The guard steers the callbacks beside it. While ``GradualPruning`` is active the guard overrides its schedule: each
    step prunes a fraction of the remaining weights. While ``QuantizationAwareTraining`` is active, each step lowers the
    bits of the weights. The metric is checked after every validation. While it holds, the state is kept and the next
    step is taken. If it does not, weights, optimizers, masks and ranges are restored bit for bit to the last state that
    held, and half the step is tried. The smallest step is tried again and again, after longer and longer waits, because
    what fails at a high learning rate may hold at a lower one. No further step is taken in the last quarter of the run,
    which is left for recovery. The run ends with the last state that held. The learning rate is not rolled back.
    Without a callback to steer, the guard prunes by LAMP scores.

    Args:
        max_drop: How far the metric may fall below that of the dense model, in the metric's own unit: 0.01 of an
            accuracy is one percentage point.
        monitor: The validation metric. Default: an accuracy or similar if one is logged, otherwise the loss.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is. Default: judged by the metric's name.
        reference: The dense model's metric. Default: measured just before compression begins.
        step: Fraction of the remaining weights that the first step prunes, 0..1.
        bits: Bits of the weights to try in turn, if a ``QuantizationAwareTraining`` is beside the guard.
        patience: Consecutive validations that may miss before the rollback; the weights recover in this time.
        resolution: The smallest step.
        margin: Safety margin subtracted from ``max_drop`` to allow for sampling noise. Default: one standard error for
            accuracies (at most ``max_drop / 2``), 0 otherwise.

    Raises:
        ValueError: If a value is out of range, or the run has no validation data.

    Example:
        >>> trainer = pl.Trainer(callbacks=[AccuracyGuard(max_drop=0.01, monitor="val_acc")], logger=False,
        ...                      enable_checkpointing=False)
    """

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
        self,
        max_drop: float = 0.01,
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        reference: float | None = None,
        step: float = 0.5,
        bits: Sequence[int] = (6, 4, 3, 2),
        patience: int = 2,
        resolution: float = 0.1,
        margin: float | None = None,
    ) -> None:
        self.max_drop = max_drop
        self.monitor = monitor
        self.mode = mode
        self.reference = reference
        self.step = step
        self.bits = tuple(bits)
        self.patience = patience
        self.resolution = resolution
        self.margin = margin
        self.history: list[dict[str, Any]] = []
        check_settings(type(self).__name__, vars(self))
        self._kind: str | None = None  # the lever of the phase that the run is in
        self._asked = 0.0  # the level that is judged next
        self._good: HeldState | None = None
        self._policy = StepPolicy(step, resolution)
        self._num_missed = 0
        self._num_samples = 0  # of the last validation
        self._last_step = -1
        self._name: str | None = None

    @property
    def level(self) -> dict[str, float]:
        """The level of the last state that held: ``sparsity``, or ``bits``; empty before any."""
        if self._good is None or self._kind is None:
            return {}
        return {self._kind: self._good["level"]}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be guarded; without a callback to steer, add one that prunes."""
        if stage != "fit":
            return
        check_guarded(trainer, pl_module, self, self.bits)
        prune_if_alone(trainer, self)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a metric that validation does not log."""
        self._choose(list(trainer.callback_metrics))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Override the schedule; a resumed callback still knows the level it was steered to."""
        pruner = steered(trainer, "sparsity")
        if pruner is not None and pruner.goal is None:
            pruner.steer(0.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Measure the reference when compression is about to begin; follow the phases as they begin and end."""
        clock = read_clock(trainer, batch_idx)
        if self.reference is None and compression_progress(trainer, clock) >= 0:
            metrics = evaluate(trainer, copied(pl_module))
            self.reference = float(trainer.strategy.broadcast(metrics[self._choose(list(metrics))]))
        pruner = steered(trainer, "sparsity")
        if pruner is not None and self._kind is None and progress_of(pruner, clock) >= 0:
            assert self.reference is not None
            self._kind = "sparsity"
            self._good = self._keep(trainer, pl_module, self.reference, 0.0)  # the dense model holds
            self._ask(trainer, 0.0)
            self._go_on(trainer)
        pruned = pruner is not None and self._kind == "sparsity" and progress_of(pruner, clock) >= 1
        if pruned and self._good is not None and self._asked != self._good["level"]:
            # a level that has not held until the phase of pruning ends is given up
            self._back(trainer, pl_module)
        quantizer = steered(trainer, "bits")
        if quantizer is not None and self._kind != "bits" and progress_of(quantizer, clock) >= 0:
            assert quantizer.goal is not None
            self._kind = "bits"
            self._asked = quantizer.goal
            self._good = None
            self._num_missed = 0
            self._policy = StepPolicy(self.resolution, self.resolution)  # bits have no half steps

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
        step = trainer.global_step
        if trainer.sanity_checking or trainer.state.fn != "fit" or self._kind is None or self._last_step == step:
            return
        self._last_step = step
        metrics = trainer.callback_metrics
        # In several processes the metric of rank zero decides for all.
        value = float(trainer.strategy.broadcast(float(metrics[self._choose(list(metrics))])))
        last = self._run_share(trainer) >= 1
        asked = self._asked
        outcome = self._judge(trainer, pl_module, value, last)
        if last and self._good is not None and self._good["step"] != step:  # so that the last checkpoint has it, too
            self._back(trainer, pl_module)
        self.history.append({"step": step, self._kind: asked, "value": value, "outcome": outcome})
        rank_zero_info(
            f"{type(self).__name__} at step {step}: {self._kind} {asked:.4g} {outcome}, {self._name} "
            f"{value:.4f} (dense {self.reference:.4f})"
        )

    def _judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float, last: bool) -> str:
        """Keep the state or restore the last good one, ask for the next step, and say what became of this one."""
        if self._drop(value) <= self._allowed(value, trainer.world_size):
            self._num_missed = 0
            further = self._good is None or self._good["level"] != self._asked
            if further:
                self._policy.held()
            if further or self._drop(value) <= self._drop(self._good["value"]):  # type: ignore[index]
                self._good = self._keep(trainer, pl_module, value, self._asked)
            if not last:
                self._go_on(trainer)
            return "holds"
        if self._good is None:  # what the user's own scheme gives: there is nothing to go back to
            return "misses"
        self._num_missed += 1
        if self._num_missed <= self.patience and not last:
            return "misses, may recover"
        if self._good["level"] != self._asked:
            self._policy.missed()
        self._back(trainer, pl_module)
        if not last:
            self._go_on(trainer)
        return "misses, is rolled back"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End with a state that was judged and held."""
        if self._good is not None and self._good["step"] != trainer.global_step:
            self._back(trainer, pl_module)
        elif self._good is None:
            reference = "the dense model" if self.reference is None else f"{self.reference:.4f}"
            rank_zero_warn(
                f"{type(self).__name__}: no state was within {self.max_drop:g} of {reference}. The run ends as it is. "
                "Let it train longer, validate more often, or compress less."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of what is steered."""
        release(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The last state that held, and how far the search is."""
        fields = {name.removeprefix("_"): getattr(self, name) for name in _FIELDS}
        return fields | {"pace": asdict(self._policy), "history": copy.deepcopy(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for name in _FIELDS:
            setattr(self, name, state_dict[name.removeprefix("_")])
        self._policy = StepPolicy(**state_dict["pace"])
        self.history = copy.deepcopy(state_dict["history"])

    def _run_share(self, trainer: pl.Trainer) -> float:
        """Fraction of the run that is over once this batch is."""
        return read_clock(trainer, trainer.fit_loop.epoch_loop.batch_idx + 1).run

    def _choose(self, logged: Sequence[str] | None = None) -> str:
        """The name of the metric."""
        if logged is not None and self._name is None:
            self._name = choose_metric(f"{type(self).__name__}.monitor", self.monitor, logged)
        assert self._name is not None
        return self._name

    def _drop(self, value: float) -> float:
        assert self.reference is not None
        better = more_is_better(self._choose()) if self.mode is None else self.mode == "max"
        return metric_drop(self.reference, value, better)

    def _allowed(self, value: float, num_processes: int) -> float:
        """The drop that a judgement allows, after the part that is kept for sampling noise."""
        if self.margin is not None:
            return self.max_drop - self.margin
        if not more_is_better(self._choose()) or self.mode == "min":
            return self.max_drop
        return allowed_drop(self.max_drop, value, self._num_samples * num_processes)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float, level: float) -> HeldState:
        return {"value": value, "level": level, "step": trainer.global_step, "state": keep(trainer, pl_module)}

    def _back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return to the last state that held."""
        assert self._good is not None
        go_back(trainer, pl_module, self._good["state"])
        self._num_missed = 0
        self._ask(trainer, self._good["level"])

    def _go_on(self, trainer: pl.Trainer) -> None:
        """Ask for the next step, if the last one holds and another is worth it."""
        assert self._good is not None
        level = self._good["level"]
        further: float | None = None
        recovering = self._run_share(trainer) > 1 - _RECOVER
        if not recovering and self._policy.ready():
            pruner = steered(trainer, "sparsity")
            if self._kind == "bits":
                further = next_bits(int(level), self.bits)
            elif pruner is not None and not pruner.reached:
                further = next_sparsity(level, self._policy.step, float(pruner.asked()["sparsity"]))
        self._ask(trainer, level if further is None else float(further))

    def _ask(self, trainer: pl.Trainer, level: float) -> None:
        self._asked = level
        callback = None if self._kind is None else steered(trainer, self._kind)
        if callback is not None:
            callback.steer(level)
