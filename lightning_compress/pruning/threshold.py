"""Exactly the lowest scores over any number of tensors, streamed: a few reads of the scores and little memory.

A sorted sample brackets the cut; one pass over the scores counts what lies below the bracket and collects what lies
inside; only that is partitioned. Only counts and candidates cross from chunk to chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHUNK", "Cut", "Ranks", "find_cut", "keep_highest", "num_dropped"]

CHUNK = 2**18  # scores that are looked at together: they stay in the cache
_SIGMAS = 2.7  # a bracket misses the cut 7 times in a thousand; then it is widened
_ALL_OUTSIDE = np.uint64(0x0101010101010101)  # eight times True

Chunks = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Ranks:
    """The processes that hold the scores together; by default there is one.

    Args:
        rank: Which of them this is.
        gather: Gives the arrays that all of them gave, in order of rank; :func:`~.sharding.ranks_of` makes one.
        size: How many they are.
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
class Cut:
    """Where the lowest scores end: all below ``value`` are dropped, and the first ``num_ties`` of those equal to it.

    Args:
        value: The highest score that is dropped; -inf for none.
        num_ties: How many scores equal to it are still to be dropped, in order.
        num_equal: How many scores are equal to it.
    """

    value: float
    num_ties: int
    num_equal: int

    def keep(self, scores: np.ndarray, out: np.ndarray) -> None:
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


def find_cut(chunks: Chunks, num_scores: int, k: int, sample: Callable[[], np.ndarray], ranks: Ranks = Ranks()) -> Cut:
    """The cut below which exactly the k lowest scores lie.

    Args:
        chunks: Gives the scores anew at each call, in order, as contiguous float arrays that may be reused.
        num_scores: How many scores there are.
        k: How many to drop.
        sample: Gives some of the scores, spread over all of them, as an array to keep.
        ranks: Processes that hold the scores together: chunks and sample are of this one, all else is of all.

    Raises:
        ValueError: If a score is NaN.
    """
    widening = 1.0
    while True:
        low, high, share = _bracket(_together(ranks, sample()), k / max(1, num_scores), widening)
        num_below, candidates = _count_and_collect(chunks(), low, high, int(1.2 * share * num_scores))
        (num_below,), candidates = ranks.sum(num_below), _together(ranks, candidates)
        _check_no_nan(candidates)  # not before: all ranks raise, or none
        if num_below < max(1, k) <= num_below + len(candidates) or share == 1:
            break
        widening *= 4
    if not k:
        return Cut(-np.inf, 0, int(np.count_nonzero(candidates == -np.inf)) if num_below == 0 else 0)
    candidates.partition(k - num_below - 1)
    value = candidates[k - num_below - 1]
    num_lower = num_below + int(np.count_nonzero(candidates < value))
    return Cut(float(value), k - num_lower, int(np.count_nonzero(candidates == value)))


def _bracket(sample: np.ndarray, quantile: float, widening: float) -> tuple[float, float, float]:
    """Two scores with a quantile between them, by a sample of all; and the share that lies between."""
    width = widening * (_SIGMAS * math.sqrt(len(sample) * quantile * (1 - quantile)) + 1)
    first, last = math.floor(quantile * len(sample) - width), math.ceil(quantile * len(sample) + width)
    ends = [i for i in (first, last) if 0 <= i < len(sample)]
    if ends:
        sample.partition(ends)
    low = sample[first] if first >= 0 else -np.inf
    high = sample[last] if last < len(sample) else np.inf
    _check_no_nan(np.array([low, high]))
    return low, high, 1.0 if not ends else (last - first) / len(sample)


def _count_and_collect(chunks: Iterator[np.ndarray], low: float, high: float, expected: int) -> tuple[int, np.ndarray]:
    """How many scores are below ``low``, and all from ``low`` to ``high``; ``expected`` is a guess of their number."""
    num_below = num_inside = 0
    inside = np.empty(expected, np.float32)
    outside, above, mixed = np.empty(CHUNK, bool), np.empty(CHUNK, bool), np.empty(CHUNK // 8 + 8, bool)
    for scores in chunks:
        n, num_eights = scores.size, scores.size // 8
        eights = outside.view(np.uint64)[:num_eights]
        np.less(scores, low, out=outside[:n])
        num_below += int(np.count_nonzero(outside[:n]))
        np.greater(scores, high, out=above[:n])  # a NaN is neither, so it will be found inside
        np.bitwise_or(eights, above.view(np.uint64)[:num_eights], out=eights)
        np.not_equal(
            eights, _ALL_OUTSIDE, out=mixed[:num_eights]
        )  # few eights hold a candidate: look at eight scores at once
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


def _together(ranks: Ranks, array: np.ndarray) -> np.ndarray:
    arrays = ranks.gather(array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _true_of_few(flags: np.ndarray) -> np.ndarray:
    """np.flatnonzero of a multiple of eight flags; for few it is slower, since it branches at each that it finds."""
    words = flags.view(np.uint64)
    rows = (words != 0).nonzero()[0]
    places = words.take(rows).view(bool).nonzero()[0]
    return (rows.take(places >> 3) << 3) + (places & 7)


def _check_no_nan(scores: np.ndarray) -> None:
    if np.isnan(scores).any():
        raise ValueError("A pruning score is NaN: the weights have diverged. Lower the learning rate.")


def keep_highest(scores: Sequence[Tensor], sparsity: float, ranks: Ranks = Ranks()) -> list[Tensor]:
    """Bool tensors in the shapes of ``scores``, False for exactly the lowest share of all of them together.

    Equal scores are dropped in order of tensor and index, so that the count is exact.

    Args:
        scores: Any number of float tensors.
        sparsity: Share to drop, 0..1.
        ranks: Processes that each hold a part of every tensor, which may be empty: the first the first rows, and so on.

    Raises:
        ValueError: If a score is NaN, of whichever rank.

    Example:
        >>> keep_highest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 0.25)
        [tensor([ True, False]), tensor([True, True])]
    """
    flat = [s.detach().float().cpu().reshape(-1).numpy() for s in scores]
    (num_scores,) = ranks.sum(sum(len(s) for s in flat))

    def chunks() -> Iterator[np.ndarray]:
        for values in flat:
            for begin in range(0, len(values), CHUNK):
                yield values[begin : begin + CHUNK]

    k = num_dropped(sparsity, num_scores)
    cuts = _cut_by_tensor(find_cut(chunks, num_scores, k, partial(spread_sample, flat, num_scores), ranks), flat, ranks)
    kept = []
    for values, s, cut in zip(flat, scores, cuts, strict=True):
        keep = np.empty(len(values), bool)
        for begin in range(0, len(values), CHUNK):
            cut.keep(values[begin : begin + CHUNK], keep[begin : begin + CHUNK])
        kept.append(torch.from_numpy(keep).view(s.shape).to(s.device))
    return kept


def _cut_by_tensor(cut: Cut, flat: Sequence[np.ndarray], ranks: Ranks) -> list[Cut]:
    """The cut through this rank's part of each tensor: ties are dropped in order of tensor, rank and index."""
    if cut.num_ties == cut.num_equal:
        return [cut] * len(flat)
    equal = np.array([np.count_nonzero(values == cut.value) for values in flat], np.int64)
    by_tensor = np.stack(ranks.gather(equal), 1)
    before = (by_tensor.cumsum() - by_tensor.reshape(-1)).reshape(by_tensor.shape)[:, ranks.rank]
    ties = np.clip(cut.num_ties - before, 0, equal)
    return [Cut(cut.value, int(t), int(n)) for t, n in zip(ties, equal, strict=True)]


def spread_sample(flat: Sequence[np.ndarray], num_scores: int) -> np.ndarray:
    """Every n-th value of all arrays, 128,000 of 25 million: work on the sample and on the bracket are in balance."""
    step = int(num_scores ** (1 / 3) / 1.5) | 1  # odd, lest it meets a matrix always in the same columns
    return np.concatenate([np.empty(0, np.float32), *(values[::step] for values in flat)])
