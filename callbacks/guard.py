"""Compress as far as the validated metric allows, and go back where it does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_compress.guard_steps import Pace, next_bits, next_sparsity
from lightning_compress.phase import Phase
from lightning_compress.pruning import LAMP

from .evaluate import choose_metric, copied, evaluate, has_validation, more_is_better
from .live_shape import check_strategy
from .protocol import all_callbacks, compressing, compression_progress
from .pruning import GradualPruning
from .quantization import QuantizationAwareTraining
from .rollback import go_back, keep
from .run import read_clock

__all__ = ["AccuracyGuard"]

_FIELDS = ("reference", "_kind", "_asked", "_good", "_num_missed", "_last_step", "_name")
_RECOVER = 0.25  # share of the run, its last, in which no further step is taken


class AccuracyGuard(pl.Callback):
    """Goes on pruning, or lowering bits, while the validated metric stays within a drop; else rolls back.

    It steers the callbacks beside it. In the phase of a ``GradualPruning``, whose schedule it takes the place of, each
    step drops a share of the weights that are left; in that of a ``QuantizationAwareTraining``, each step lowers the
    bits of the weights. Every validation judges. While the metric holds, the state is kept and the next step is taken.
    When it does not, weights, optimizers, masks and ranges return bit-exact to the last state that held, and half the
    step is tried; the smallest again and again, after longer and longer waits, for what fails at a high learning rate
    may hold at a lower one. The last quarter of the run takes no further step: it recovers. The run ends with the last
    state that held. What the learning rate does is not rolled back. Alone, it prunes by LAMP scores.

    Args:
        max_drop: How far the metric may fall below that of the dense model, in its own unit: 0.01 of an accuracy is one
            point.
        monitor: The validation metric; an accuracy or the like without one, else the validation loss.
        mode: ``"max"`` if more is better, ``"min"`` if less is; by the metric's name without one.
        reference: What the dense model reaches; measured just before compression begins without one.
        step: Share of the weights left that a step drops at first, 0..1.
        bits: Bits of the weights to try in turn, where a QuantizationAwareTraining is beside it.
        patience: Validations in a row that may miss before the roll-back; weights recover in this time.
        resolution: The smallest such step.
        margin: How much of ``max_drop`` is kept for chance, in its unit. Without one: of an accuracy the standard error
            over the validation examples, half of ``max_drop`` at most; of other metrics nothing.

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
        self.max_drop, self.monitor, self.mode, self.reference = max_drop, monitor, mode, reference
        self.step, self.bits, self.patience, self.resolution = step, tuple(bits), patience, resolution
        self.margin = margin
        self.history: list[dict[str, Any]] = []
        self._check_values()
        self._kind: Literal["sparsity", "bits"] | None = None  # what the phase that the run is in compresses by
        self._asked = 0.0  # how far
        self._good: dict[str, Any] | None = None
        self._pace = Pace(step, resolution)
        self._num_missed = 0
        self._num_samples = 0  # of the last validation
        self._last_step = -1
        self._name: str | None = None

    def _check_values(self) -> None:
        def number(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        name = type(self).__name__
        if not number(self.max_drop) or self.max_drop < 0:
            raise ValueError(
                f"{name}.max_drop={self.max_drop!r}: accepted is a number from 0, in the metric's own unit (0.01 of an "
                "accuracy is one point)."
            )
        if self.margin is not None and not (number(self.margin) and 0 <= self.margin <= self.max_drop):
            raise ValueError(
                f"{name}.margin={self.margin!r}: accepted is a part of max_drop={self.max_drop:g}, or None."
            )
        if self.mode not in ("max", "min", None):
            raise ValueError(f"{name}.mode={self.mode!r}: accepted are 'max' (more is better), 'min', and None.")
        if self.reference is not None and not number(self.reference):
            raise ValueError(f"{name}.reference={self.reference!r}: accepted is a number, or None to measure it.")
        for field in ("step", "resolution"):
            if not number(getattr(self, field)) or not 0 < getattr(self, field) < 1:
                raise ValueError(f"{name}.{field}={getattr(self, field)!r}: accepted is a share between 0 and 1.")
        whole = all(isinstance(b, int) and not isinstance(b, bool) and 2 <= b <= 8 for b in self.bits)
        if not whole or list(self.bits) != sorted(set(self.bits), reverse=True):
            raise ValueError(
                f"{name}.bits={self.bits!r}: accepted are whole numbers in 2..8, falling, as (6, 4, 3, 2)."
            )
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 0:
            raise ValueError(f"{name}.patience={self.patience!r}: accepted is a whole number of validations from 0.")

    @property
    def level(self) -> dict[str, float]:
        """What the last state that held has reached: ``sparsity``, or ``bits``; empty before any."""
        return {} if self._good is None or self._kind is None else {self._kind: self._good["level"]}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be guarded; without a callback to steer, add one that prunes."""
        if stage != "fit":
            return
        name, callbacks = type(self).__name__, all_callbacks(trainer)
        check_strategy(trainer, self)
        if not has_validation(trainer, pl_module):
            raise ValueError(
                f"{name} judges by validation data, but there is no validation_step, no val_dataloader, or "
                "limit_val_batches=0. Add both to the LightningModule (or the dataloader to the DataModule)."
            )
        wrong = next((type(c).__name__ for c in compressing(trainer) if c.keep() is None), None)
        if wrong is not None:
            raise ValueError(
                f"{name} beside {wrong}: it cannot take back what that does. Accepted are GradualPruning and "
                "QuantizationAwareTraining."
            )
        for kind in (GradualPruning, QuantizationAwareTraining):
            num = sum(isinstance(c, kind) for c in callbacks)
            if num > 1:
                raise ValueError(f"{name} beside {num} {kind.__name__}: accepted is one, which it steers.")
        quantizer = self._quantizer(trainer)
        if quantizer is not None:
            self._check_quantizer(quantizer)
        elif self._pruner(trainer) is None:
            added = GradualPruning(0.99, LAMP(power=0.5), phase=Phase(0.0, 1.0))
            callbacks.insert(callbacks.index(self) + 1, added)  # next in turn for setup, and before any checkpoint
            rank_zero_info(f"{name} prunes by LAMP scores all along: no callback beside it compresses.")

    def _check_quantizer(self, quantizer: QuantizationAwareTraining) -> None:
        name, weight = type(self).__name__, quantizer.scheme.weight
        try:
            for bits in self.bits:
                replace(weight, bits=bits)  # type: ignore[type-var]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}.bits={self.bits!r} with the weights of {weight}: {error}. Accepted are bits that this "
                "quantizer takes, or () to lower none."
            ) from error

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a metric that validation does not log."""
        self._choose(list(trainer.callback_metrics))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """When compression is about to begin, measure what it starts from; at the edges of phases, begin and end."""
        clock, pruner, quantizer = read_clock(trainer, batch_idx), self._pruner(trainer), self._quantizer(trainer)
        if self.reference is None and compression_progress(trainer, clock) >= 0:
            metrics = evaluate(trainer, copied(pl_module))
            self.reference = float(trainer.strategy.broadcast(metrics[self._choose(list(metrics))]))
        if pruner is not None and self._kind is None and pruner.phase.progress(clock) >= 0:
            assert self.reference is not None
            self._kind, self._good = "sparsity", self._keep(trainer, pl_module, self.reference, 0.0)
            self._ask(trainer, pl_module, 0.0)
            self._go_on(trainer, pl_module)
        if pruner is not None and self._kind == "sparsity" and pruner.phase.progress(clock) >= 1:
            self._settle(trainer, pl_module)
        if quantizer is not None and self._kind != "bits" and quantizer.phase.progress(clock) >= 0:
            self._kind, self._asked = "bits", float(quantizer.scheme.weight.bits)
            self._good, self._num_missed = None, 0
            self._pace = Pace(self.resolution, self.resolution)  # bits have no half steps

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from 0."""
        self._num_samples = 0

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the examples: the more there are, the less chance there is in the metric."""
        with suppress(MisconfigurationException):  # a batch whose size shows in nothing
            self._num_samples += extract_batch_size(batch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge."""
        step = trainer.global_step
        if trainer.sanity_checking or trainer.state.fn != "fit" or self._kind is None or self._last_step == step:
            return
        self._last_step = step
        metrics = trainer.callback_metrics
        value = float(trainer.strategy.broadcast(float(metrics[self._choose(list(metrics))])))
        last = read_clock(trainer, trainer.fit_loop.epoch_loop.batch_idx + 1).run >= 1
        asked, outcome = self._asked, self._judge(trainer, pl_module, value, last)
        if last and self._good is not None and self._good["step"] != step:  # so that the last checkpoint has it, too
            self._back(trainer, pl_module)
        self.history.append({"step": step, self._kind: asked, "value": value, "outcome": outcome})
        rank_zero_info(
            f"{type(self).__name__} at step {step}: {self._kind} {asked:.4g} {outcome}, {self._name} "
            f"{value:.4f} (dense {self.reference:.4f})"
        )

    def _judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float, last: bool) -> str:
        if self._drop(value) <= self.max_drop - self._margin(value, trainer.world_size):
            self._num_missed = 0
            further = self._good is None or self._good["level"] != self._asked
            if further:
                self._pace.held()
            if further or self._drop(value) <= self._drop(self._good["value"]):  # type: ignore[index]
                self._good = self._keep(trainer, pl_module, value, self._asked)
            if not last:
                self._go_on(trainer, pl_module)
            return "holds"
        if self._good is None:  # what the user's own scheme gives: there is nothing to go back to
            return "misses"
        self._num_missed += 1
        if self._num_missed <= self.patience and not last:
            return "misses, may recover"
        if self._good["level"] != self._asked:
            self._pace.missed()
        self._back(trainer, pl_module)
        if not last:
            self._go_on(trainer, pl_module)
        return "misses, is rolled back"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End with a state that was judged and held."""
        if self._good is not None and self._good["step"] != trainer.global_step:
            self._back(trainer, pl_module)
        elif self._good is None:
            rank_zero_warn(
                f"{type(self).__name__}: no state was within {self.max_drop:g} of "
                f"{'the dense model' if self.reference is None else f'{self.reference:.4f}'}. The run ends as it is. "
                "Let it train longer, validate more often, or compress less."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of what is steered."""
        pruner = self._pruner(trainer)
        if pruner is not None:
            pruner.goal = None

    def state_dict(self) -> dict[str, Any]:
        """The last state that held, and how far the search is."""
        fields = {name.removeprefix("_"): getattr(self, name) for name in _FIELDS}
        return fields | {"pace": asdict(self._pace), "history": copy.deepcopy(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        for name in _FIELDS:
            setattr(self, name, state_dict[name.removeprefix("_")])
        self._pace = Pace(**state_dict["pace"])
        self.history = copy.deepcopy(state_dict["history"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place of the schedule; after a resume the goal is as it was."""
        pruner = self._pruner(trainer)
        if pruner is not None and pruner.goal is None:
            pruner.goal = 0.0

    def _pruner(self, trainer: pl.Trainer) -> GradualPruning | None:
        return next((c for c in all_callbacks(trainer) if isinstance(c, GradualPruning)), None)

    def _quantizer(self, trainer: pl.Trainer) -> QuantizationAwareTraining | None:
        return next((c for c in all_callbacks(trainer) if isinstance(c, QuantizationAwareTraining)), None)

    def _choose(self, logged: Sequence[str] | None = None) -> str:
        """The name of the metric."""
        if logged is not None and self._name is None:
            self._name = choose_metric(f"{type(self).__name__}.monitor", self.monitor, logged)
        assert self._name is not None
        return self._name

    def _drop(self, value: float) -> float:
        """How much worse than dense a value is; infinite for NaN."""
        assert self.reference is not None
        more = more_is_better(self._choose()) if self.mode is None else self.mode == "max"
        drop = self.reference - value if more else value - self.reference
        return math.inf if math.isnan(drop) else drop - 1e-6  # metrics are float32

    def _margin(self, value: float, num_processes: int) -> float:
        """What of the drop is kept for chance: the standard error of a share."""
        if self.margin is not None:
            return self.margin
        num = self._num_samples * num_processes
        if not num or not 0 <= value <= 1 or not more_is_better(self._choose()) or self.mode == "min":
            return 0.0
        return min(math.sqrt(value * (1 - value) / num), self.max_drop / 2)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float, level: float) -> dict[str, Any]:
        state = keep(trainer, pl_module)
        return {"value": value, "level": level, "step": trainer.global_step, "state": state}

    def _back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return to the last state that held."""
        assert self._good is not None
        go_back(trainer, pl_module, self._good["state"])
        self._num_missed = 0
        self._ask(trainer, pl_module, self._good["level"])

    def _go_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask for the next step, if the last one holds and another is worth it."""
        assert self._good is not None
        pruner, level, found = self._pruner(trainer), self._good["level"], None
        recovering = read_clock(trainer, trainer.fit_loop.epoch_loop.batch_idx + 1).run > 1 - _RECOVER
        if recovering or not self._pace.ready():
            pass
        elif self._kind == "sparsity" and pruner is not None and not pruner.reached:
            found = next_sparsity(level, self._pace.step, pruner.schedule.final)
        elif self._kind == "bits":
            found = next_bits(int(level), self.bits)
        self._ask(trainer, pl_module, level if found is None else float(found))

    def _ask(self, trainer: pl.Trainer, pl_module: pl.LightningModule, level: float) -> None:
        pruner, quantizer, self._asked = self._pruner(trainer), self._quantizer(trainer), level
        if self._kind == "sparsity" and pruner is not None:
            pruner.goal = level
        elif self._kind == "bits" and quantizer is not None:
            quantizer.lower(int(level))

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The phase of pruning is over: what has not held until now goes."""
        if self._good is not None and self._asked != self._good["level"]:
            self._back(trainer, pl_module)
