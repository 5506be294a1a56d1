"""Phases of a run that has too few steps for them: each still gets a step, so that a smoke test tries everything."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_compress.phase import Clock, Phase, check_places, place_phases

__all__ = ["Squeezed", "squeeze"]


@dataclass(frozen=True)
class Squeezed:
    """Where phases lie in a run that is too short for them.

    Args:
        num_steps: Steps of the run.
        knots: Pairs of a step and the share of the run that its phases find there, both rising.
        total_steps: Steps of a run that phases given in steps would fit.
        total_epochs: Epochs of a run that phases given in epochs would fit.
        in_steps: Whether a phase is given in steps.
        words: Where the phases lie now, for a message.
    """

    num_steps: float
    knots: tuple[tuple[float, float], ...]
    total_steps: float
    total_epochs: float
    in_steps: bool
    words: str

    def read(self, clock: Clock) -> Clock:
        """The clock as the phases are to see it.

        Args:
            clock: The run's own.
        """
        run = self._share(clock.run * self.num_steps)
        step = clock.step
        if self.in_steps:
            step = math.floor(run * self.total_steps + 1e-6)
        return replace(
            clock,
            step=step,
            epoch=run * self.total_epochs,
            run=run,
            total_steps=self.total_steps,
            total_epochs=self.total_epochs,
        )

    def _share(self, at: float) -> float:
        """The share of the run at a step: linear between the knots."""
        i = bisect_right(self.knots, (at + 1e-9, math.inf)) - 1
        if i + 1 == len(self.knots):
            return self.knots[-1][1]
        (start, low), (end, high) = self.knots[i : i + 2]
        return low + (high - low) * max(0.0, at - start) / (end - start)


def squeeze(phases: Iterable[tuple[str, Phase]], clock: Clock, num_steps: float, lenient: bool) -> Squeezed | None:
    """Make room for each phase, if the run has too few steps for one; None if it has enough.

    Phases keep their order and move as little as possible. In a run of fewer steps than phases the last ones get them,
    and the first ones are over when it begins.

    Args:
        phases: Pairs of a name and a phase.
        clock: The run's clock at its start, with its totals.
        num_steps: Steps of the run: optimizer steps, or batches where the optimizer is stepped by hand.
        lenient: Whether also phases given in epochs or steps are squeezed, which else have to fit the run.

    Raises:
        ValueError: If a phase does not fit the run, or two phases overlap.

    Example:
        >>> phases = [("prune", Phase(0.2, 0.6)), ("quantize", Phase(0.75, 1.0))]
        >>> found = squeeze(phases, Clock(0, 0.0, 0.0, total_steps=2, total_epochs=1), 2, lenient=True)
        >>> found.words
        'prune step 0, quantize step 1'
        >>> found.read(Clock(step=1, epoch=0.5, run=0.5)).run
        0.75
    """
    phases = list(phases)
    virtual = clock
    if lenient:
        virtual = replace(
            clock,
            total_steps=max([clock.total_steps, *(phase.end for _, phase in phases if phase.unit == "step")]),
            total_epochs=max([clock.total_epochs, *(phase.end for _, phase in phases if phase.unit == "epoch")]),
        )
    placed = place_phases(phases, virtual)
    check_places(placed, virtual)
    endless = any(math.isnan(phase.fractions(virtual)[0]) for _, phase in phases)
    if endless or not math.isfinite(num_steps) or num_steps < 1:
        return None
    stretches = _merge([(begin, end) for begin, end, _, _ in placed if begin < end])
    given = [(math.ceil(begin * num_steps - 1e-9), math.ceil(end * num_steps - 1e-9)) for begin, end in stretches]
    if virtual == clock and all(first < last for first, last in given):
        return None
    made = _make_room(given, int(num_steps))
    knots = _knots(stretches, made, int(num_steps))
    words = []
    for begin, end, name, _ in placed:
        i = next((i for i, (low, high) in enumerate(stretches) if low <= begin and end <= high), None)
        if i is not None:
            words.append(f"{name} {_steps(*made[i])}")
    in_steps = any(phase.unit == "step" for _, phase in phases)
    return Squeezed(num_steps, knots, virtual.total_steps, virtual.total_epochs, in_steps, ", ".join(words))


def _merge(stretches: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that overlap, of phases of one name, as one."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(stretches):
        if merged and begin < merged[-1][1] - 1e-9:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _make_room(given: Sequence[tuple[int, int]], num_steps: int) -> list[tuple[int, int]]:
    """Move what has no step of its own, first to the right, then what lies beyond the end to the left."""
    made: list[tuple[int, int]] = []
    for first, last in given:
        begin = max([first, *(end for _, end in made[-1:])])
        made.append((begin, max(last, begin + 1)))
    limit = num_steps
    for i in reversed(range(len(made))):
        begin, end = made[i]
        end = max(0, min(end, limit))
        begin = max(0, min(begin, end - 1))
        made[i] = (begin, end)
        limit = begin
    return made


def _knots(
    stretches: Sequence[tuple[float, float]], made: Sequence[tuple[int, int]], num_steps: int
) -> tuple[tuple[float, float], ...]:
    """Where the run's shares lie on its steps; of shares that meet on one step the last one counts."""
    found: dict[int, float] = {0: 0.0}
    for (low, high), (first, last) in zip(stretches, made, strict=True):
        found[first] = low
        found[last] = high
    found[num_steps] = 1.0
    return tuple(sorted((float(step), share) for step, share in found.items()))


def _steps(first: int, last: int) -> str:
    if last == first:
        return "before the first step"
    return f"step {first}" if last == first + 1 else f"steps {first} to {last - 1}"
