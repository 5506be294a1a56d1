"""How far to go next when each step is judged, and how far a metric may fall for a step to hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_compress.checks import (
    check_flag,
    check_number,
    check_numbers,
    check_one_of,
    check_text,
    check_whole_number,
    refusal,
)
from lightning_compress.metrics import MODES

__all__ = ["StepPolicy", "allowed_drop", "check_settings", "metric_drop", "next_bits", "next_sparsity"]

_BITS = "a list of whole numbers in 2..8, in falling order, such as (6, 4, 3, 2)"


@dataclass
class StepPolicy:
    """How large the next step is, and for how many judgements to wait before it.

    A miss halves the step, on the scale of ratios. A miss of the smallest step says that the level cannot be reached
    now, not that it never can: the weights train on and the learning rate falls. So the smallest step is tried again,
    each time after a wait twice as long.

    Args:
        step: Fraction of what is left that a step removes, 0..1.
        least: The smallest step.
        num_missed: Consecutive misses of the smallest step.
        wait: Judgements still to wait.

    Example:
        >>> policy = StepPolicy(0.5, 0.2)
        >>> policy.missed(), policy.step, policy.ready()
        (None, 0.2928932188134524, True)
    """

    step: float
    least: float
    num_missed: int = 0
    wait: int = 0

    def held(self) -> None:
        """The last step has held."""
        self.num_missed = 0
        self.wait = 0

    def missed(self) -> None:
        """The last step has been rolled back."""
        if self.step <= self.least:
            self.num_missed += 1
            self.wait = 2**self.num_missed
        # Two steps of the new size leave as much as one of the old: (1 - new)^2 = 1 - old.
        self.step = max(self.least, 1 - math.sqrt(1 - self.step))

    def ready(self) -> bool:
        """Whether a step may be taken now; to be asked once per judgement."""
        self.wait = max(0, self.wait - 1)
        return self.wait == 0


def next_sparsity(good: float, step: float, most: float) -> float | None:
    """The sparsity to try after one that held.

    Args:
        good: The highest sparsity that held, 0..1.
        step: Fraction of the remaining weights that the step removes.
        most: The highest sparsity that may be tried.

    Returns:
        None where nothing is left to try.

    Example:
        >>> next_sparsity(0.5, 0.5, 0.99), next_sparsity(0.98, 0.9, 0.99)
        (0.75, 0.99)
    """
    if good >= most:
        return None
    return min(most, 1 - (1 - good) * (1 - step))


def next_bits(good: int, bits: Sequence[int]) -> int | None:
    """The bits to try after those that held.

    Args:
        good: The fewest bits that held.
        bits: The bits that may be tried, in falling order.

    Returns:
        None where nothing is left to try.

    Example:
        >>> next_bits(8, (6, 4)), next_bits(4, (6, 4))
        (6, None)
    """
    return next((b for b in bits if b < good), None)


def metric_drop(reference: float, value: float, more_is_better: bool) -> float:
    """How much worse a metric is than its reference; negative if it is better, infinite if it is no finite number.

    Example:
        >>> round(metric_drop(0.98, 0.97, more_is_better=True), 3), metric_drop(0.1, math.nan, more_is_better=False)
        (0.01, inf)
    """
    drop = reference - value if more_is_better else value - reference
    if not math.isfinite(drop):
        return math.inf
    # Metrics are float32: a drop of just what is allowed must not miss by rounding.
    return drop - 1e-6


def allowed_drop(max_drop: float, value: float, num: int) -> float:
    """The drop to judge a metric by: smaller than what may be lost, by what may be chance.

    Args:
        max_drop: What may be lost.
        value: The metric. The standard error of a share, such as an accuracy, is subtracted, up to half of
            ``max_drop``; nothing of a metric outside 0..1.
        num: Examples that it was measured on.

    Example:
        >>> round(allowed_drop(0.01, 0.9, 90_000), 6), round(allowed_drop(0.01, 0.9, 100), 6)
        (0.009, 0.005)
    """
    if not num or not 0 <= value <= 1:
        return max_drop
    standard_error = math.sqrt(value * (1 - value) / num)
    return max_drop - min(standard_error, max_drop / 2)


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings of a guard that are out of range.

    Args:
        name: The guard's name, for the message.
        settings: The arguments of AccuracyGuard, by name.

    Raises:
        ValueError: If one is out of range.
    """
    check_flag(f"{name}.strict", settings["strict"])
    max_drop = settings["max_drop"]
    unit = "a number from 0, in the metric's own unit (0.01 of an accuracy is one percentage point)"
    check_number(f"{name}.max_drop", max_drop, unit, low=0)
    if settings["margin"] is not None:
        part = f"a part of max_drop={max_drop:g}, or None"
        check_number(f"{name}.margin", settings["margin"], part, low=0, high=max_drop)
    if settings["monitor"] is not None:
        check_text(f"{name}.monitor", settings["monitor"], "a metric's name, or None")
    check_one_of(f"{name}.mode", settings["mode"], MODES, "Take 'max' if higher is better.")
    if settings["reference"] is not None:
        check_number(f"{name}.reference", settings["reference"], "a number, or None to measure it")
    for field in ("step", "resolution"):
        check_number(f"{name}.{field}", settings[field], "a share between 0 and 1", above=0, below=1)
    bits = settings["bits"]
    check_numbers(f"{name}.bits", bits, _BITS, low=2, high=8, whole=True)
    if list(bits) != sorted(set(bits), reverse=True):
        raise refusal(f"{name}.bits", bits, _BITS, "Sort them, the highest first, each once.")
    check_whole_number(f"{name}.patience", settings["patience"], "a whole number of validations from 0", low=0)
