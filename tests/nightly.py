"""What ``make test`` leaves to ``make test-full``: more of what others show already, and slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["nightly", "some"]

nightly = pytest.mark.nightly


def some(values: Iterable[Any], *kept: Any) -> list[Any]:
    """All values of a parameter, of which only those that are kept are tried by ``make test``."""
    values = list(values)
    assert all(value in values for value in kept)
    return [value if value in kept else pytest.param(value, marks=nightly) for value in values]
