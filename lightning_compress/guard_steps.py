"""How far to go next, when each step is judged: fewer weights, or fewer bits; and what to do after a miss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Pace", "next_bits", "next_sparsity"]


@dataclass
class Pace:
    """How large the next step is, and for how many judgements to wait before it.

    A miss halves the step, on the scale of ratios. At the smallest step it says nothing of the level, only of the
    moment: weights train on, and the learning rate falls. So it is tried again, each time after a wait twice as long.

    Args:
        step: Share of what is left that a step takes, 0..1.
        least: The smallest step.
        num_missed: Misses in a row at the smallest step.
        wait: Judgements still to wait.

    Example:
        >>> pace = Pace(0.5, 0.2)
        >>> pace.missed(), pace.step, pace.ready()
        (None, 0.2928932188134524, True)
    """

    step: float
    least: float
    num_missed: int = 0
    wait: int = 0

    def held(self) -> None:
        """A step that was taken has held."""
        self.num_missed = self.wait = 0

    def missed(self) -> None:
        """A step that was taken has been rolled back."""
        if self.step <= self.least:
            self.num_missed += 1
            self.wait = 2**self.num_missed
        self.step = max(self.least, 1 - math.sqrt(1 - self.step))

    def ready(self) -> bool:
        """Whether a step may be taken now; asked once a judgement."""
        self.wait = max(0, self.wait - 1)
        return self.wait == 0


def next_sparsity(good: float, step: float, most: float) -> float | None:
    """The sparsity to try after one that held.

    Args:
        good: The highest sparsity that held, 0..1.
        step: Share of the weights left that goes.
        most: The highest that may be tried.

    Returns:
        None where nothing is left to try.

    Example:
        >>> next_sparsity(0.5, 0.5, 0.99), next_sparsity(0.98, 0.9, 0.99)
        (0.75, 0.99)
    """
    return min(most, 1 - (1 - good) * (1 - step)) if good < most else None


def next_bits(good: int, bits: Sequence[int]) -> int | None:
    """The bits to try after some that held.

    Args:
        good: The fewest bits that held.
        bits: What may be tried, falling.

    Returns:
        None where nothing is left to try.

    Example:
        >>> next_bits(8, (6, 4)), next_bits(4, (6, 4))
        (6, None)
    """
    return next((b for b in bits if b < good), None)
