"""Checks of arguments: one vocabulary for what was given, what is accepted and how an error is told in a line."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

__all__ = [
    "check_instance",
    "check_number",
    "check_one_of",
    "check_whole_number",
    "first_line",
    "is_number",
    "is_whole",
]


def is_number(value: object) -> bool:
    """Whether a value is a finite number. True and False are not: as an argument they are a slip."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(
    name: str,
    value: Any,
    accepted: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Refuse what is not a finite number within bounds.

    Args:
        name: The argument as a user writes it, such as ``"Export.min_agreement"``.
        value: What was given.
        accepted: What is accepted, in words that follow "accepted is".
        low: Smallest value accepted.
        high: Largest value accepted.
        above: Bound that the value must exceed.
        below: Bound that the value must stay under.

    Raises:
        ValueError: If the value is no number or out of bounds.

    Example:
        >>> check_number("LAMP.power", 2, "a number in 0..1", low=0, high=1)
        Traceback (most recent call last):
        ValueError: LAMP.power=2: accepted is a number in 0..1.
    """
    if not is_number(value) or not low <= value <= high or not above < value < below:
        raise _refused(name, value, accepted)


def check_whole_number(name: str, value: Any, accepted: str, *, low: int, high: float = math.inf) -> None:
    """Refuse what is not a whole number within bounds, both included.

    Raises:
        ValueError: If the value is no whole number or out of bounds.
    """
    if not is_whole(value) or not low <= value <= high:
        raise _refused(name, value, accepted)


def check_one_of(name: str, value: object, accepted: Collection[Any], meaning: str = "") -> None:
    """Refuse what is not among the accepted values.

    Args:
        name: The argument as a user writes it.
        value: What was given.
        accepted: The accepted values, two at least.
        meaning: A sentence that says which to take.

    Raises:
        ValueError: If the value is none of them.

    Example:
        >>> check_one_of("Phase.unit", "day", ("run", "epoch", "step"))
        Traceback (most recent call last):
        ValueError: Phase.unit='day': accepted are 'run', 'epoch' and 'step'.
    """
    if not any(type(value) is type(one) and value == one for one in accepted):
        *others, last = map(repr, accepted)
        listed = f"{', '.join(others)} and {last}"
        raise ValueError(f"{name}={value!r}: accepted are {listed}.{' ' * bool(meaning)}{meaning}")


def check_instance(name: str, value: object, kind: type | tuple[type, ...], accepted: str) -> None:
    """Refuse an object of another class.

    Raises:
        TypeError: If the value is no instance of the kind.

    Example:
        >>> check_instance("FineTuning.phase", (0.6, 0.7), dict, "a Phase, for instance Phase(0.6, 0.7)")
        Traceback (most recent call last):
        TypeError: FineTuning.phase=(0.6, 0.7): accepted is a Phase, for instance Phase(0.6, 0.7).
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: accepted is {accepted}.")


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its message.

    Example:
        >>> first_line(RuntimeError("shapes do not match" + chr(10) + "details"))
        'RuntimeError: shapes do not match'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _refused(name: str, value: object, accepted: str) -> ValueError:
    return ValueError(f"{name}={value!r}: accepted is {accepted}.")
