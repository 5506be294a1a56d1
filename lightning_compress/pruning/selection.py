"""Exactly the lowest scores over any number of tensors, streamed: a few reads of the scores and little memory.

A sorted sample brackets the cut; one pass over the scores counts what lies below the bracket and collects what lies
inside; only that is partitioned. Only counts and candidates cross from chunk to chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHUNK", "Cut", "find_cut", "keep_highest", "num_dropped"]

CHUNK = 2**17  # scores that are looked at together: they stay in the cache
_SAMPLE = 2**17
_SIGMAS = 4.0

Chunks = Callable[[], Iterator[np.ndarray]]


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


def find_cut(chunks: Chunks, num_scores: int, k: int, sample: np.ndarray) -> Cut:
    """The cut below which exactly the k lowest scores lie.

    Args:
        chunks: Gives the scores anew at each call, in order, as float arrays that may be reused.
        num_scores: How many scores there are.
        k: How many to drop.
        sample: Some of the scores, spread over all of them.

    Raises:
        ValueError: If a score is NaN.
    """
    sample = np.sort(sample)
    share = k / max(1, num_scores)
    width = _SIGMAS * math.sqrt(len(sample) * share * (1 - share)) + 1
    while True:
        first, last = int(share * len(sample) - width), math.ceil(share * len(sample) + width)
        low = sample[first] if first >= 0 else -np.inf
        high = sample[last] if last < len(sample) else np.inf
        num_below, candidates = _count_and_collect(chunks(), low, high)
        if num_below < k <= num_below + len(candidates) or (first < 0 and last >= len(sample)):
            break
        width *= 4
    if not k:
        return Cut(-np.inf, 0, int(np.count_nonzero(candidates == -np.inf)) if num_below == 0 else 0)
    candidates.partition(k - num_below - 1)
    value = candidates[k - num_below - 1]
    num_lower = num_below + int(np.count_nonzero(candidates < value))
    return Cut(float(value), k - num_lower, int(np.count_nonzero(candidates == value)))


def _count_and_collect(chunks: Iterator[np.ndarray], low: float, high: float) -> tuple[int, np.ndarray]:
    """How many scores are below ``low``, and all from ``low`` to ``high``."""
    num_below, inside = 0, [np.empty(0, np.float32)]
    below, mask = np.empty(CHUNK, bool), np.empty(CHUNK, bool)
    for scores in chunks:
        b, m = below[: scores.size], mask[: scores.size]
        np.less(scores, low, out=b)
        np.less_equal(scores, high, out=m)
        np.logical_xor(m, b, out=m)
        num_below += int(np.count_nonzero(b))
        inside.append(scores[m])
        if math.isnan(scores.max(initial=-np.inf)):
            raise ValueError("A pruning score is NaN: the weights have diverged. Lower the learning rate.")
    return num_below, np.concatenate(inside)


def keep_highest(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Bool tensors in the shapes of ``scores``, False for exactly the lowest share of all of them together.

    Equal scores are dropped in order of tensor and index, so that the count is exact.

    Args:
        scores: Any number of float tensors.
        sparsity: Share to drop, 0..1.

    Raises:
        ValueError: If a score is NaN.

    Example:
        >>> keep_highest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 0.25)
        [tensor([ True, False]), tensor([True, True])]
    """
    flat = [s.detach().float().cpu().reshape(-1).numpy() for s in scores]
    num_scores = sum(len(s) for s in flat)

    def chunks() -> Iterator[np.ndarray]:
        for values in flat:
            for begin in range(0, len(values), CHUNK):
                yield values[begin : begin + CHUNK]

    cut = find_cut(chunks, num_scores, num_dropped(sparsity, num_scores), spread_sample(flat, num_scores))
    kept = []
    for values, s in zip(flat, scores, strict=True):
        keep = np.empty(len(values), bool)
        for begin in range(0, len(values), CHUNK):
            cut.keep(values[begin : begin + CHUNK], keep[begin : begin + CHUNK])
        kept.append(torch.from_numpy(keep).view(s.shape).to(s.device))
    return kept


def spread_sample(flat: Sequence[np.ndarray], num_scores: int) -> np.ndarray:
    """Every n-th value of all arrays, about 131,000 in all."""
    step = max(1, num_scores // _SAMPLE)
    return np.concatenate([np.empty(0, np.float32), *(values[::step] for values in flat)])
