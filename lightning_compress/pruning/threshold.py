"""Exactly the lowest scores over any number of tensors, streamed: a few reads of the scores and little memory.

A sorted sample brackets the threshold; one pass over the scores counts what lies below the bracket and collects what
lies inside; only that is partitioned. Only counts and candidates cross from chunk to chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHUNK", "Processes", "Threshold", "find_threshold", "keep_highest", "num_dropped", "spread_sample"]

# Scores that are looked at together: half a megabyte of them stays in the cache.
CHUNK = 2**17
# Standard deviations of a sample's quantile on either side of the bracket: it misses the threshold 7 times in a
# thousand, and is then widened. A wider one would collect more candidates at each of the other times.
_SIGMAS = 2.7
_ALL_OUTSIDE = np.uint64(0x0101010101010101)  # eight times True

Chunks = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Processes:
    """The processes that hold the scores together; by default there is one.

    Args:
        rank: Which of them this is.
        gather: Returns the arrays of all of them, in order of rank; :func:`~.sharding.processes_of` makes one.
        size: Number of processes.
    """

    rank: int = 0
    gather: Callable[[np.ndarray], list[np.ndarray]] = lambda array: [array]
    size: int = 1

    def sum(self, *numbers: int) -> list[int]:
        """The sum of all their numbers, each for itself."""
        return np.sum(self.gather(np.array(numbers, np.int64)), axis=0).tolist()

    def part(self, whole: Tensor) -> Tensor:
        """This one's part of a tensor that all of them have, flat: the first gets the first values, and so on."""
        return whole if self.size == 1 else whole.flatten().tensor_split(self.size)[self.rank].clone()

    def join(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of which each has a part."""
        if self.size == 1:
            return part.view(shape)
        return torch.from_numpy(_together(self, part.cpu().numpy())).view(shape).to(part.device)


@dataclass
class Threshold:
    """Where the lowest scores end: all below ``value`` are dropped, and the first ``num_ties`` of those equal to it.

    Args:
        value: The highest score that is dropped; -inf for none.
        num_ties: Number of scores equal to it that are still to be dropped, in order.
        num_equal: Number of scores equal to it that are still to come.
    """

    value: float
    num_ties: int
    num_equal: int

    def mark_kept(self, scores: np.ndarray, out: np.ndarray) -> None:
        """Write into ``out`` (bool) which of the next scores are kept; call it in the order of the scores."""
        np.greater(scores, self.value, out=out)
        if self.num_ties < self.num_equal:  # some ties are kept
            ties = np.flatnonzero(scores == self.value)
            out[ties[self.num_ties :]] = True
            self.num_equal -= len(ties)
            self.num_ties = max(0, self.num_ties - len(ties))


def num_dropped(sparsity: float, num_scores: int) -> int:
    """How many of the scores a sparsity drops: rounded up, so that the sparsity is reached."""
    return min(num_scores, math.ceil(round(sparsity * num_scores, 6)))


def find_threshold(
    chunks: Chunks,
    num_scores: int,
    k: int,
    sample: Callable[[], np.ndarray],
    processes: Processes = Processes(),
) -> Threshold:
    """The threshold at or below which exactly the k lowest scores lie.

    Args:
        chunks: Returns the scores anew at each call, in order, as contiguous float arrays that may be reused.
        num_scores: Number of scores.
        k: Number of scores to drop.
        sample: Returns some of the scores, spread over all of them, as an array to keep.
        processes: Processes that hold the scores together: chunks and sample are of this one, all else is of all.

    Raises:
        ValueError: If a score is NaN.
    """
    widening = 1.0
    while True:
        low, high, share = _bracket(_together(processes, sample()), k / max(1, num_scores), widening)
        num_below, candidates = _count_and_collect(chunks(), low, high, int(1.2 * share * num_scores))
        (num_below,) = processes.sum(num_below)
        candidates = _together(processes, candidates)
        _check_no_nan(candidates)  # not before they are exchanged: all processes raise, or none
        if num_below < max(1, k) <= num_below + len(candidates) or share == 1:
            break
        widening *= 4
    if not k:
        # Nothing is dropped: all of the lowest are ties that stay.
        num_lowest = int(np.count_nonzero(candidates == -np.inf)) if num_below == 0 else 0
        return Threshold(-np.inf, 0, num_lowest)
    candidates.partition(k - num_below - 1)
    value = candidates[k - num_below - 1]
    num_lower = num_below + int(np.count_nonzero(candidates < value))
    return Threshold(float(value), k - num_lower, int(np.count_nonzero(candidates == value)))


def _bracket(sample: np.ndarray, quantile: float, widening: float) -> tuple[float, float, float]:
    """Two scores with a quantile between them, by a sample of all; and the share that lies between."""
    width = widening * (_SIGMAS * math.sqrt(len(sample) * quantile * (1 - quantile)) + 1)
    first = math.floor(quantile * len(sample) - width)
    last = math.ceil(quantile * len(sample) + width)
    ends = [i for i in (first, last) if 0 <= i < len(sample)]
    if ends:
        sample.partition(ends)
    low = sample[first] if first >= 0 else -np.inf
    high = sample[last] if last < len(sample) else np.inf
    _check_no_nan(np.array([low, high]))
    share = (last - first) / len(sample) if ends else 1.0
    return low, high, share


def _count_and_collect(chunks: Iterator[np.ndarray], low: float, high: float, expected: int) -> tuple[int, np.ndarray]:
    """How many scores are below ``low``, and all from ``low`` to ``high``; ``expected`` is a guess of their number."""
    num_below = num_inside = 0
    inside = np.empty(expected, np.float32)
    outside = np.empty(CHUNK, bool)
    above = np.empty(CHUNK, bool)
    mixed = np.empty(CHUNK // 8 + 8, bool)
    for scores in chunks:
        n = scores.size
        num_eights = n // 8
        eights = outside.view(np.uint64)[:num_eights]
        np.less(scores, low, out=outside[:n])
        num_below += int(np.count_nonzero(outside[:n]))
        np.greater(scores, high, out=above[:n])  # a NaN is neither, so it will be found inside
        np.bitwise_or(eights, above.view(np.uint64)[:num_eights], out=eights)
        # Few hold a candidate, so eight scores are looked at as one word.
        np.not_equal(eights, _ALL_OUTSIDE, out=mixed[:num_eights])
        mixed[num_eights : num_eights + 8] = False
        rows = _true_of_few(mixed[: -(-num_eights // 8) * 8])
        near = scores[: 8 * num_eights].reshape(-1, 8).take(rows, 0).reshape(-1)
        near = near.take((~eights.take(rows).view(bool)).nonzero()[0])
        if n % 8:
            rest = scores[8 * num_eights :]
            near = np.append(near, rest[~((rest < low) | (rest > high))])
        if num_inside + len(near) > len(inside):
            inside = np.append(inside[:num_inside], np.empty(max(len(near), len(inside)), np.float32))
        inside[num_inside : num_inside + len(near)] = near
        num_inside += len(near)
    return num_below, inside[:num_inside]


def _together(processes: Processes, array: np.ndarray) -> np.ndarray:
    arrays = processes.gather(array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _true_of_few(flags: np.ndarray) -> np.ndarray:
    """np.flatnonzero of a multiple of eight flags; for few it is slower, since it branches at each that it finds."""
    words = flags.view(np.uint64)
    rows = (words != 0).nonzero()[0]
    positions = words.take(rows).view(bool).nonzero()[0]
    return (rows.take(positions >> 3) << 3) + (positions & 7)


def _check_no_nan(scores: np.ndarray) -> None:
    if np.isnan(scores).any():
        raise ValueError("A pruning score is NaN: the weights have diverged. Lower the learning rate.")


def keep_highest(scores: Sequence[Tensor], sparsity: float, processes: Processes = Processes()) -> list[Tensor]:
    """Bool tensors in the shapes of ``scores``, False for exactly the lowest share of all of them together.

    Equal scores are dropped in order of tensor and index, so that the count is exact.

    Args:
        scores: Any number of float tensors.
        sparsity: Share to drop, 0..1.
        processes: Those that each hold a part of every tensor, which may be empty: the first the first rows, and so on.

    Raises:
        ValueError: If a score is NaN, on whichever process.

    Example:
        >>> keep_highest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 0.25)
        [tensor([ True, False]), tensor([True, True])]
    """
    flat = [s.detach().float().cpu().reshape(-1).numpy() for s in scores]
    (num_scores,) = processes.sum(sum(len(s) for s in flat))

    def chunks() -> Iterator[np.ndarray]:
        for values in flat:
            for begin in range(0, len(values), CHUNK):
                yield values[begin : begin + CHUNK]

    k = num_dropped(sparsity, num_scores)
    threshold = find_threshold(chunks, num_scores, k, partial(spread_sample, flat, num_scores), processes)
    kept = []
    for values, s, own in zip(flat, scores, _by_tensor(threshold, flat, processes), strict=True):
        keep = np.empty(len(values), bool)
        for begin in range(0, len(values), CHUNK):
            own.mark_kept(values[begin : begin + CHUNK], keep[begin : begin + CHUNK])
        kept.append(torch.from_numpy(keep).view(s.shape).to(s.device))
    return kept


def _by_tensor(threshold: Threshold, flat: Sequence[np.ndarray], processes: Processes) -> list[Threshold]:
    """The threshold for this process's part of each tensor: ties go in order of tensor, process and index."""
    if threshold.num_ties == threshold.num_equal:
        return [threshold] * len(flat)
    equal = np.array([np.count_nonzero(values == threshold.value) for values in flat], np.int64)
    by_tensor = np.stack(processes.gather(equal), 1)
    before = (by_tensor.cumsum() - by_tensor.reshape(-1)).reshape(by_tensor.shape)[:, processes.rank]
    ties = np.clip(threshold.num_ties - before, 0, equal)
    return [Threshold(threshold.value, int(t), int(n)) for t, n in zip(ties, equal, strict=True)]


def spread_sample(flat: Sequence[np.ndarray], num_scores: int) -> np.ndarray:
    """Every n-th value of all arrays, 128,000 of 25 million: work on the sample and on the bracket are in balance."""
    step = int(num_scores ** (1 / 3) / 1.5) | 1  # odd: an even one would meet a matrix in the same columns only
    return np.concatenate([np.empty(0, np.float32), *(values[::step] for values in flat)])
