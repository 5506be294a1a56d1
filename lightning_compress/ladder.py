"""How far to go next, when each step is judged: a sparsity that approaches what fails, or fewer bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["next_bits", "next_sparsity"]


def next_sparsity(
    good: float, failed: float | None, most: float, step: float = 0.5, resolution: float = 0.1
) -> float | None:
    """The sparsity to try after one that held.

    Until one has failed, a share of the weights left is dropped; then the densities between are halved in ratio.

    Args:
        good: The highest sparsity that held, 0..1.
        failed: The lowest above it that did not; None for none yet.
        most: The highest that may be tried.
        step: Share of the weights left that a step drops.
        resolution: The smallest share of the weights left that is worth a step.

    Returns:
        None where no step is worth it.

    Example:
        >>> next_sparsity(0.5, None, 0.99), next_sparsity(0.0, 0.75, 0.99)
        (0.75, 0.5)
    """
    left = 1 - good
    if failed is None:
        sparsity = min(most, 1 - left * (1 - step))
        return sparsity if sparsity > good else None
    sparsity = min(most, 1 - math.sqrt(left * (1 - failed)) if failed < 1 else (good + failed) / 2)
    return sparsity if sparsity - good >= resolution * left else None


def next_bits(good: int, failed: int | None, bits: Sequence[int]) -> int | None:
    """The bits to try after some that held.

    Args:
        good: The fewest bits that held.
        failed: Those that did not; None for none yet.
        bits: What may be tried, falling.

    Returns:
        None where nothing is left to try.

    Example:
        >>> next_bits(8, None, (6, 4)), next_bits(8, 6, (6, 4))
        (6, None)
    """
    return next((b for b in bits if b < good), None) if failed is None else None
