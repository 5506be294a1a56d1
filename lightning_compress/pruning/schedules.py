"""How much: sparsity as a stateless function of a phase's progress, cumulative and absolute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import expm1, floor

from lightning_compress.checks import check_number, check_whole_number

__all__ = ["Constant", "Cubic", "Exponential", "Linear", "Rounds", "Schedule"]


@dataclass(frozen=True)
class Schedule(ABC):
    """Sparsity over a phase.

    Args:
        final: Sparsity at the end, the share of weights dropped, 0..1.
        initial: Sparsity at the beginning, 0..1.

    Raises:
        ValueError: If a sparsity lies outside 0..1.
    """

    final: float = 0.9
    initial: float = 0.0

    def __post_init__(self) -> None:
        """Refuse percentages and negative shares."""
        accepted = "a share in 0..1, for instance 0.9 to drop nine weights in ten"
        check_number(f"{type(self).__name__}.final", self.final, accepted, low=0, high=1)
        check_number(f"{type(self).__name__}.initial", self.initial, accepted, low=0, high=1)

    def __call__(self, progress: float) -> float:
        """Sparsity at a progress; progress beyond 0..1 is clipped."""
        share = self.shape(min(max(progress, 0.0), 1.0))
        return self.initial + (self.final - self.initial) * share

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Share of the way from initial to final, 0 at progress 0 and 1 at progress 1."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The final sparsity at once: one-shot pruning.

    Example:
        >>> Constant(0.5)(0.0)
        0.5
    """

    def shape(self, progress: float) -> float:
        """1 everywhere."""
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """Equal steps.

    Example:
        >>> Linear(0.5)(0.5)
        0.25
    """

    def shape(self, progress: float) -> float:
        """The progress itself."""
        return progress


@dataclass(frozen=True)
class Cubic(Schedule):
    """Fast at first, slow at the end: s_f + (s_i - s_f) (1 - p)^3 (Zhu & Gupta 2017, arXiv:1710.01878).

    Example:
        >>> Cubic(0.8)(0.5)
        0.7000000000000001
    """

    def shape(self, progress: float) -> float:
        """1 - (1 - p)^3."""
        return 1 - (1 - progress) ** 3


@dataclass(frozen=True)
class Exponential(Schedule):
    """The rest decays exponentially: (1 - exp(-rate p)) / (1 - exp(-rate)).

    Args:
        final: Sparsity at the end.
        initial: Sparsity at the beginning.
        rate: Decay over the phase, above 0; larger is earlier.

    Example:
        >>> round(Exponential(0.9, rate=3.0)(0.5), 3)
        0.736
    """

    rate: float = 3.0

    def __post_init__(self) -> None:
        """Refuse a rate that is no decay."""
        super().__post_init__()
        check_number("Exponential.rate", self.rate, "a number above 0, such as 3.0", above=0)

    def shape(self, progress: float) -> float:
        """(1 - exp(-rate p)) / (1 - exp(-rate))."""
        return expm1(-self.rate * progress) / expm1(-self.rate)


@dataclass(frozen=True)
class Rounds(Schedule):
    """Train, prune, train again: every round drops the same share of what is left (Frankle 2019, arXiv:1803.03635).

    With ``GradualPruning(rewind=...)`` every round starts from the weights of an early step.

    Args:
        final: Sparsity at the end.
        initial: Sparsity at the beginning.
        num: Rounds in the phase; each ends with a step of the sparsity.

    Raises:
        ValueError: If there is no round.

    Example:
        >>> [round(Rounds(0.75, num=2)(p), 3) for p in (0.0, 0.49, 0.5, 0.99, 1.0)]
        [0.0, 0.0, 0.5, 0.5, 0.75]
    """

    num: int = 5

    def __post_init__(self) -> None:
        """Refuse no rounds."""
        super().__post_init__()
        check_whole_number("Rounds.num", self.num, "a whole number of rounds from 1", low=1)

    def shape(self, progress: float) -> float:
        """1 at the last round; before, what equal shares of the rest leave."""
        done = floor(progress * self.num + 1e-9)
        whole = self.final - self.initial
        if done == self.num or not whole or self.final == 1:
            return float(done == self.num)
        left = (1 - self.initial) * ((1 - self.final) / (1 - self.initial)) ** (done / self.num)
        return (1 - left - self.initial) / whole
