"""How far two runs may lie apart by chance: what is below that is no difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, variance

from lightning_compress.analysis.runs import Run
from lightning_compress.deploy.timing import are_apart
from lightning_compress.metrics import is_share

__all__ = ["Noise", "is_cheaper", "noise_of"]


@dataclass(frozen=True)
class Noise:
    """The noise of a metric.

    Args:
        least: The smallest difference of two runs that counts: twice the standard deviation of a difference. 0 where
            it is not known.
        said: Where it is from, in a sentence.
    """

    least: float
    said: str


def noise_of(metric: str, runs: Sequence[Run]) -> Noise:
    """What is known of it: the deviation of runs that differ in their seed alone, else the sampling error of a share.

    Args:
        metric: The metric's name.
        runs: The runs.

    Example:
        >>> def run(metric, **more):
        ...     return Run("", metric, 1, 1, 1.0, 1, 0.0, "", **more)
        >>> round(noise_of("val_acc", [run(0.9, samples=1000), run(0.9, samples=1000)]).least, 4)
        0.0268
        >>> noise_of("val_loss", [run(0.9), run(0.8)]).least
        0.0
    """
    repeated = [values for values in _by_setting(runs) if len(values) > 1]
    if repeated:
        freedom = sum(len(values) - 1 for values in repeated)
        deviation = math.sqrt(sum((len(values) - 1) * variance(values) for values in repeated) / freedom)
        return _noise(metric, deviation, f"runs of one setting that differ in their seed deviate by {deviation:.2g}")
    samples = [run.samples for run in runs if run.samples]
    scale = 100 if max(run.metric for run in runs) > 1 else 1  # in percent
    share = mean(run.metric for run in runs) / scale
    if is_share(metric) and len(samples) == len(runs) and 0 <= share <= 1:
        deviation = scale * math.sqrt(share * (1 - share) / min(samples))
        source = f"over {min(samples):,} validation samples it has a sampling error of {deviation:.2g}"
        return _noise(metric, deviation, source)
    return Noise(
        0.0,
        f"How much {metric} varies by chance is not known, so that each difference counts. Run several seeds to know: "
        "seed=1,2,3.",
    )


def _by_setting(runs: Sequence[Run]) -> list[list[float]]:
    """The metrics of runs that were asked for the same, whatever their seed; none of runs that do not say."""
    found: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for run in runs:
        if run.overrides:
            words = (item for item in run.overrides.items() if item[0].rpartition(".")[2] not in ("seed", "dir"))
            found.setdefault(tuple(sorted(words)), []).append(run.metric)
    return list(found.values())


def _noise(metric: str, deviation: float, source: str) -> Noise:
    least = 2 * math.sqrt(2) * deviation
    return Noise(least, f"Noise of {metric}: {source}; runs closer than {least:.2g} are not told apart.")


def is_cheaper(one: Run, other: Run, cost: str) -> bool:
    """Whether a run costs less than another, and milliseconds by more than they vary.

    Example:
        >>> a = Run("a", 0.9, 10, 10, 0.25, 1, 0.0, "", latency_ms_quartiles=(0.2, 0.3))
        >>> b = Run("b", 0.9, 20, 20, 0.31, 1, 0.0, "", latency_ms_quartiles=(0.28, 0.4))
        >>> is_cheaper(a, b, "bytes"), is_cheaper(a, b, "latency_ms")
        (True, False)
    """
    less: bool = getattr(one, cost) < getattr(other, cost)
    known = one.latency_ms_quartiles is not None and other.latency_ms_quartiles is not None
    if cost != "latency_ms" or not known:
        return less
    return less and are_apart(one.latency_ms_quartiles, other.latency_ms_quartiles)
