"""By which metric a run is judged, which way it is better, and what it can be."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compress.checks import check_one_of
from lightning_compress.guard_steps import allowed_drop, metric_drop
from lightning_compress.metrics import MODES, Mode, direction, is_of_training, is_share, more_is_better, pick_metric

from .evaluate import copied, evaluate, validated
from .rollback import HeldState

__all__ = ["Judge", "choose_metric", "settle_mode"]

_FAR = 10  # times: what is so far off is of another scale, or of another model


class Judge:
    """The metric by which something is decided: asked for, or found among what is logged, once that is known.

    Args:
        owner: Who decides, as messages name it; ``monitor`` and ``mode`` are its fields.
        monitor: The metric that is asked for.
        mode: Which way is better. Default: told by the metric's name.
    """

    def __init__(self, owner: str, monitor: str | None, mode: Mode | None) -> None:
        self.owner = owner
        self.monitor = monitor
        self._asked = mode
        self._mode: Mode | None = None
        self.name: str | None = None  # once it was seen

    @property
    def mode(self) -> Mode:
        """Which way is better, of a metric that was seen."""
        assert self._mode is not None
        return self._mode

    def see(self, logged: Collection[str]) -> str:
        """The metric's name: looked for among what is logged, unless it was seen before.

        Raises:
            ValueError: If it is not logged, or if its name does not tell which way is better and nobody has said so.
        """
        if self.name is None:
            name = choose_metric(f"{self.owner}.monitor", self.monitor, logged)
            self.check_mode(name)
            self.name = name
        return self.name

    def see_validation(self, trainer: pl.Trainer) -> str | None:
        """The same after a validation of a fit; None of a metric of training, which may be logged later."""
        # What is asked for may be training's; what nobody has asked for is validation's.
        logged = list(trainer.callback_metrics) if self.monitor else validated(trainer)
        return self.see(logged) if not self._may_come(logged) else None

    def _may_come(self, logged: Collection[str]) -> bool:
        return self.monitor is not None and self.monitor not in logged and is_of_training(self.monitor)

    def check_mode(self, name: str | None) -> None:
        """Refuse a name that does not tell which way is better, where nobody has said so."""
        if name is not None and self._mode is None:
            self._mode = settle_mode(self.owner, name, self._asked)

    def check_reference(self, reference: float | None, logged: Mapping[str, Any], when: str) -> None:
        """Refuse a reference that the metric cannot be compared with.

        Args:
            reference: What the user gave, such as 97 where an accuracy is logged as .97; None to measure it.
            logged: What was logged, by name.
            when: Of which model, for the message.
        """
        if self.name is None and reference is None:
            raise ValueError(
                f"{self.owner}.monitor={self.monitor!r}: validation does not log it, so the dense model cannot be "
                f"measured. Give {self.owner}.reference, or a metric that validation logs."
            )
        if self.name is None or reference is None or not is_share(self.name):
            return
        value = float(logged.get(self.name, math.nan))
        low = 0.0
        high = 100.0
        # A value of 0 may be of either scale.
        if 0 < value <= 1:
            high = 1.0
        if 1 < value <= 100:
            low = 1.0
        if low <= reference <= high:
            return
        refused = (
            f"{self.owner}.reference={reference!r}: {self.name} is {value:.4g} {when}, so accepted is a number in "
            f"{low:g}..{high:g}. Give reference and max_drop on the scale in which the metric is logged."
        )
        # A little too much is no other scale: nothing holds it, and a run that nothing may hold is a user's own.
        if high < reference < _FAR * high:
            rank_zero_warn(refused)
            return
        raise ValueError(refused)

    def check_finite(self, value: float, when: str) -> None:
        """Refuse a dense model whose metric is no number: nothing can be compared with it."""
        if not math.isfinite(value):
            raise ValueError(
                f"{self.owner}.monitor={self.name!r}: it is {value} for the dense model{when}; accepted is a metric "
                "that is a finite number. Train the dense model first, or name another metric."
            )

    def refer(self, reference: float | None, dense: float, step: int, max_drop: float) -> float:
        """The reference: as given, if the metric can be that, else the dense model's metric.

        Raises:
            ValueError: If the dense model cannot be compared with it.
        """
        self.check_reference(reference, {self.name or "": dense}, f"for the dense model at step {step}")
        if reference is None:
            self.check_finite(dense, f" at step {step}")
            reference = dense
            rank_zero_info(f"{self.owner}: the dense model has {self.name} {dense:.4f} at step {step}, the reference.")
        if self.name is not None and is_share(self.name) and reference <= max_drop:
            rank_zero_warn(
                f"{self.owner}.max_drop={max_drop:g}: {self.name} is never below 0 and the reference {reference:.4f}, "
                "so nothing can miss. Give the drop in the metric's own unit: 0.01 of an accuracy is one point."
            )
        return reference

    def dense_holds(self, reference: float, dense: float, max_drop: float) -> bool:
        """Whether the dense model itself is within the drop; says so if not."""
        holds = self._mode is not None and self.drop(reference, dense) <= max_drop
        if not holds:
            found = f"is {dense:.4f}, which is not within {max_drop:g} of it"
            if self.name is None:
                found = "is not known, for only training logs it"
            rank_zero_warn(
                f"{self.owner}.reference={reference:g}: {self.name or self.monitor} of the dense model {found}. "
                "Nothing is pruned until it holds."
            )
        return holds

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *watching: pl.Callback) -> float:
        """The metric of a model as it is now, the same in all processes; NaN where validation does not log it."""
        metrics = evaluate(trainer, copied(pl_module), *watching)
        value = math.nan if self._may_come(metrics) else metrics.get(self.see(list(metrics)), math.nan)
        return float(trainer.strategy.broadcast(value))

    def drop(self, reference: float, value: float) -> float:
        """How much worse than its reference it is; infinite for what is no number."""
        return metric_drop(reference, value, self.mode == "max")

    def allowed(self, max_drop: float, margin: float | None, value: float, num: int) -> float:
        """The drop that a judgement allows, after the part that is kept for sampling noise."""
        if margin is not None:
            return max_drop - margin
        if self.mode == "min":
            return max_drop
        return allowed_drop(max_drop, value, num)

    def why_nothing_held(
        self, kind: str | None, good: HeldState | None, reference: float | None, max_drop: float
    ) -> str | None:
        """Why a run ends with nothing that held, or with nothing but the dense model; None where something did.

        Args:
            kind: What was compressed last, ``"sparsity"`` or ``"bits"``; None before any.
            good: The last state that held.
            reference: What it was compared with.
            max_drop: The drop that was allowed.
        """
        if kind is None or reference is None:
            why = "nothing was judged, because the run ended before it could begin. The run ends as it is"
        elif good is None:
            why = f"no state was within {max_drop:g} of {reference:.4f}. The run ends as it is"
        elif kind == "sparsity" and good["level"] == 0:
            why = f"no sparsity was within {max_drop:g} of {reference:.4f}. The run ends with the dense model of step "
            why += str(good["step"])
        else:
            return None
        return f"{why}. Let it train longer, validate more often, or compress less"

    def doubt(self, good: HeldState | None, reference: float | None, max_drop: float) -> None:
        """Warn of a reference that says nothing of what compression cost."""
        if good is None or reference is None:
            return
        if self.drop(reference, good["value"]) < -_FAR * max(max_drop, 0.01):
            rank_zero_warn(
                f"{self.owner}: {self.name} {good['value']:.4f} is far better than the reference {reference:.4f}, so "
                "what compression cost is not known. Compress a trained model, or give its metric as the reference."
            )


def choose_metric(field: str, asked: str | None, logged: Collection[str]) -> str:
    """The metric that is asked for, or the one to show when none is.

    Args:
        field: Where it is asked for, for the message.
        asked: Its name.
        logged: The names of what is logged.

    Raises:
        ValueError: If it is not logged.
    """
    found = asked or pick_metric(logged)
    if found is None or found not in logged:
        raise ValueError(
            f"{field}={asked!r}: validation does not log it. Accepted are: "
            f"{', '.join(logged) or 'none, for nothing is logged'}. Log it in validation_step with self.log, in the "
            "sanity check too, or turn that off with Trainer(num_sanity_val_steps=0)."
        )
    return found


def settle_mode(owner: str, name: str, mode: Mode | None, decides: bool = True) -> Mode:
    """Which way a metric is better: as asked for, or as its name tells, which is said in a line.

    Args:
        owner: Who asks, for messages.
        name: The metric.
        mode: What was asked for.
        decides: Whether anything depends on it. If not, more is taken to be better where the name does not tell.

    Raises:
        ValueError: If something depends on it and the name does not tell.
    """
    check_one_of(f"{owner}.mode", mode, MODES, "Take 'max' if higher is better.")
    if mode is not None:
        return mode
    told = direction(name)
    if told is None and decides:
        raise ValueError(
            f"{owner}.mode=None: the name of {name!r} does not tell which way is better. Accepted are 'max', if higher "
            "is better, and 'min', if lower is. Give one of them."
        )
    found: Mode = "max" if more_is_better(name) else "min"
    words = {"max": ("higher", "min"), "min": ("lower", "max")}
    way, other = words[found]
    why = "by its name" if told else "though its name does not tell"
    rank_zero_info(f"{owner}: {way} is better for {name!r}, {why}; mode={other!r} says otherwise.")
    return found
