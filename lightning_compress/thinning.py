"""Histories that stay small however long the run is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Thinning"]

LIMIT = 256


@dataclass
class Thinning:
    """Which points of a growing history are kept: all of few; of many every 2nd, 4th, 8th, ..., and the last.

    Args:
        num: How many points there were.
        stride: Every how many of them are kept.
        limit: How many are kept at most.

    Example:
        >>> thinning, points = Thinning(limit=4), []
        >>> for x in range(11):
        ...     thinning.add(points, x)
        >>> points
        [0, 4, 8, 10]
    """

    num: int = 0
    stride: int = 1
    limit: int = LIMIT

    def add(self, points: list[Any], point: Any) -> None:
        """Add a point at the end."""
        kept = self.make_room(points)
        if kept != slice(len(points)):
            points[:] = points[kept]
        points.append(point)

    def make_room(self, points: Sequence[Any]) -> slice:
        """The part of the points that is kept before one is added at their end."""
        # those that an earlier version saved were not counted
        self.num = max(self.num, len(points))
        # the last one may have been kept only for being the last
        end = len(points) - bool((self.num - 1) % self.stride) if points else 0
        self.num += 1
        if end < self.limit:
            return slice(end)
        self.stride *= 2
        return slice(0, end, 2)
