"""Checks of arguments: one vocabulary for what was given, what is accepted and how to fix it.

Every refusal reads ``Name.field=value: accepted is ... . <how to fix it>``. It is a TypeError for objects, names, paths
and True or False, and a ValueError for numbers and words, whether of the wrong kind or out of bounds.

A number is one of Python's own, an ``int`` or a finite ``float``: it may end up in a checkpoint that loads with
``weights_only=True``, or in JSON. True and False are no numbers, and scalars of NumPy and torch are refused, np.float64
among them; ``float(value)`` makes a number of each.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import TypeGuard

__all__ = [
    "check_by_name",
    "check_callable",
    "check_flag",
    "check_instance",
    "check_list",
    "check_names",
    "check_number",
    "check_numbers",
    "check_one_of",
    "check_path",
    "check_text",
    "check_whole_number",
    "first_line",
    "is_number",
    "is_whole",
    "refusal",
    "shown",
]

_LONGEST = 200  # characters of a value that a message shows


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number of Python's own.

    Example:
        >>> is_number(0.5), is_number(True), is_number(float("nan")), is_number("0.5")
        (True, False, False, False)
    """
    # A whole number beyond the largest float would overflow in the first product with one.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of Python's own; True and False are not."""
    return type(value) is int and is_number(value)


def check_number(
    name: str,
    value: object,
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
        ValueError: LAMP.power=2: accepted is a number in 0..1. Give a number within these bounds.
    """
    if not is_number(value) or not low <= value <= high or not above < value < below:
        raise refusal(name, value, accepted, _number_for(value, "a number"))


def check_whole_number(name: str, value: object, accepted: str, *, low: int, high: float = math.inf) -> None:
    """Refuse what is not a whole number within bounds, both included.

    Raises:
        ValueError: If the value is no whole number or out of bounds.
    """
    if not is_whole(value) or not low <= value <= high:
        raise refusal(name, value, accepted, _number_for(value, "a whole number"))


def check_numbers(name: str, values: object, accepted: str, *, low: float, high: float, whole: bool = False) -> None:
    """Refuse what is no list of numbers within bounds, both included, all of them ``whole``; it may be empty.

    Raises:
        TypeError: If it is no list.
        ValueError: If one of them is no such number.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise refusal(name, values, accepted, f"Put it into a list: [{shown(values)}].", TypeError)
    for i, value in enumerate(values):
        if whole:
            check_whole_number(f"{name}[{i}]", value, accepted, low=int(low), high=high)
        else:
            check_number(f"{name}[{i}]", value, accepted, low=low, high=high)


def check_flag(name: str, value: object, meaning: str = "") -> None:
    """Refuse all but True and False: the text "false" would count as true. ``meaning`` says which to take.

    Raises:
        TypeError: If the value is neither.

    Example:
        >>> check_flag("LayerPruning.gate_checkpoints", "false")
        Traceback (most recent call last):
        TypeError: LayerPruning.gate_checkpoints='false': accepted is True or False. Give False, without quotes.
    """
    if isinstance(value, bool):
        return
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    meant = words.get(str(value).lower()) if isinstance(value, str | int | float) else None
    fix = "Give one of the two." if meant is None else f"Give {meant}{', without quotes' * isinstance(value, str)}."
    raise refusal(name, value, f"True or False{meaning}", fix, TypeError)


def check_one_of(name: str, value: object, accepted: Collection[object], meaning: str = "") -> None:
    """Refuse what is not among the accepted values, two at least; ``meaning`` says in a sentence which to take.

    Raises:
        ValueError: If the value is none of them.

    Example:
        >>> check_one_of("Phase.unit", "steps", ("run", "epoch", "step"))
        Traceback (most recent call last):
        ValueError: Phase.unit='steps': accepted are 'run', 'epoch' and 'step'. Did you mean 'step'?
    """
    if any(type(value) is type(one) and value == one for one in accepted):
        return
    *others, last = map(repr, accepted)
    words = [one for one in accepted if isinstance(one, str)]
    near = get_close_matches(value.lower(), words, 1) if isinstance(value, str) else []
    fix = f"Did you mean {near[0]!r}?" if near else "Give one of them."
    listed = f"{', '.join(others)} and {last}"
    raise ValueError(f"{name}={shown(value)}: accepted are {listed}.{' ' * bool(meaning)}{meaning} {fix}")


def check_instance(name: str, value: object, kind: type | tuple[type, ...], accepted: str) -> None:
    """Refuse an object of another class.

    Raises:
        TypeError: If the value is no instance of the kind.

    Example:
        >>> check_instance("FineTuning.phase", (0.6, 0.7), dict, "a Phase, for instance Phase(0.6, 0.7)")
        Traceback (most recent call last):
        TypeError: FineTuning.phase=(0.6, 0.7): accepted is a Phase, for instance Phase(0.6, 0.7). \
Give one, not a tuple.
    """
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        fix = f"Make an object of the class: {value.__name__}()."
    else:
        fix = f"Give one, {_not_this(value)}."
    raise refusal(name, value, accepted, fix, TypeError)


def check_callable(name: str, value: object, accepted: str) -> None:
    """Refuse what cannot be called, by a TypeError."""
    if not callable(value):
        raise refusal(name, value, accepted, "Give a function, not what it returns.", TypeError)


def check_list(name: str, values: object, kind: type, accepted: str, fewest: int = 0) -> None:
    """Refuse what is no list of objects of a class, by a TypeError; ``accepted`` is what one of them is."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise refusal(name, values, f"a list, each {accepted}", f"Give a list, {_not_this(values)}.", TypeError)
    if len(values) < fewest:
        raise refusal(name, values, f"a list of {fewest} at least, each {accepted}", "Give one.")
    for i, value in enumerate(values):
        check_instance(f"{name}[{i}]", value, kind, accepted)


def check_names(name: str, value: object, accepted: str = "a list of name patterns, such as ['head', '*.fc1']") -> None:
    """Refuse what is no list of names: a single string would be read letter by letter.

    Raises:
        TypeError: If it is no list, or one of them is no text, or empty.

    Example:
        >>> check_names("GradualPruning.include", "head")
        Traceback (most recent call last):
        TypeError: GradualPruning.include='head': accepted is a list of name patterns, such as ['head', '*.fc1']. \
Put it into a list: ['head'].
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        fix = f"Put it into a list: [{shown(value)}]." if isinstance(value, str) else "Give a list of texts."
        raise refusal(name, value, accepted, fix, TypeError)
    for i, entry in enumerate(value):
        check_text(f"{name}[{i}]", entry, "a name, as text that is not empty")


def check_by_name(name: str, value: object, accepted: str) -> None:
    """Refuse what is no dict whose keys are names, by a TypeError."""
    check_instance(name, value, Mapping, accepted)
    assert isinstance(value, Mapping)
    for key in value:
        check_text(f"key of {name}", key, "a name, as text that is not empty")


def check_text(name: str, value: object, accepted: str) -> None:
    """Refuse what is no text, or empty, by a TypeError."""
    if not isinstance(value, str) or not value.strip():
        raise refusal(name, value, accepted, "Give its name in quotes.", TypeError)


def check_path(name: str, value: object, accepted: str) -> None:
    """Refuse what is no path, by a TypeError; an empty one would be the current folder by mistake."""
    # No file system takes a null character, and Python says so only where it opens the file.
    path = isinstance(value, str | os.PathLike) and str(value).strip() and "\0" not in str(value)
    if not path:
        raise refusal(name, value, accepted, "Give it as text or as a Path; '.' is the current folder.", TypeError)


def refusal(
    name: str, value: object, accepted: str, fix: str, kind: type[ValueError] | type[TypeError] = ValueError
) -> ValueError | TypeError:
    """The error of an argument: what was given, what is accepted and, in a sentence, how to fix it."""
    return kind(f"{name}={shown(value)}: accepted is {accepted}. {fix}")


def shown(value: object) -> str:
    """A value as a user would write it, in one line of a bearable length.

    Example:
        >>> shown("a"), len(shown([0] * 1000))
        ("'a'", 203)
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a class of the user's own; a whole number of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its message.

    Example:
        >>> first_line(RuntimeError("shapes do not match" + chr(10) + "details"))
        'RuntimeError: shapes do not match'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _number_for(value: object, wanted: str) -> str:
    """What to give in place of a value that is no such number."""
    if isinstance(value, str):
        with suppress(ValueError):
            if is_number(float(value)):
                return "Give the number itself, without quotes."
    if hasattr(value, "item"):
        return f"Give {'int' if 'whole' in wanted else 'float'}(...) of it, a number of Python's own."
    if "whole" in wanted and type(value) is float and value.is_integer():
        return f"Give {int(value)}."
    if is_number(value):
        return f"Give {wanted} within these bounds."
    if type(value) in (int, float):
        return f"Give {wanted} that is finite."
    return f"Give {wanted}, {_not_this(value)}."


def _not_this(value: object) -> str:
    """The kind of a value that is not wanted."""
    if value is None or isinstance(value, bool):
        return f"not {value}"
    if isinstance(value, type):
        return "not a class"
    kind = type(value).__name__
    return f"not {'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
