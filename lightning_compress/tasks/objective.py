"""What a sweep optimizes: a value of report.json by its path, such as ``artifacts.0.metric``, or a logged metric."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from lightning_compress.analysis.report import Report

__all__ = ["check_objective", "logged_value", "value_in", "value_of"]


def check_objective(name: object) -> None:
    """Refuse, before training, a name that no report can have; None is for no objective.

    Raises:
        ValueError: If it is so.
    """
    kind: Any = Report
    for key in () if name is None else str(name).split("."):
        kind = next((part for part in get_args(kind) if part is not type(None)), kind) if _is_union(kind) else kind
        known = _keys(kind)
        if known is not None and key not in known:
            raise _nothing(name, key, known)
        if is_typeddict(kind):
            kind = get_type_hints(kind)[key]
        elif get_origin(kind) is list and key.isdigit():
            (kind,) = get_args(kind)
        elif get_origin(kind) is list:
            raise _nothing(name, key, ["0", "1"])
        else:
            return  # a mapping by what the run has: layers, batch sizes, fields of a format's file


def value_of(report: Report | None, metrics: Mapping[str, Any], name: object) -> Any:
    """What a run came to: a value of its report, or without one of the logged metrics."""
    return value_in(report, name) if report is not None else logged_value(metrics, name)


def value_in(report: Any, name: object) -> Any:
    """The value that a name stands for; None where the run did not measure it.

    Raises:
        ValueError: If the report has no such value.
    """
    found = None if name is None else report
    for key in str(name).split("."):
        if found is None:
            return None
        keys = list(found) if isinstance(found, Mapping) else [str(i) for i in range(len(found))]
        if key not in keys:
            raise _nothing(name, key, keys)
        found = found[key] if isinstance(found, Mapping) else found[int(key)]
    return found


def logged_value(metrics: Mapping[str, Any], name: object) -> float | None:
    """The logged metric of a name; None, of a run without a report, for the name of a value of the report.

    Raises:
        ValueError: If it is neither.
    """
    if name in metrics:
        return float(metrics[str(name)])
    try:
        check_objective(name)
    except ValueError as error:
        raise _nothing(name, name, list(metrics)) from error
    return None


def _is_union(kind: object) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _keys(kind: object) -> list[str] | None:
    """The keys of a part of the report; none of a plain value, None where only the run knows them."""
    if is_typeddict(kind):
        return list(get_type_hints(kind))
    return None if get_origin(kind) in (list, dict) else []


def _nothing(name: object, key: object, known: list[str]) -> ValueError:
    accepted = ", ".join(known) or "nothing"
    return ValueError(
        f"objective={name!r}: there is no {key!r}. Accepted in its place is {accepted}. Name a value of report.json, "
        "such as objective=compressed.metric, or without a CompressionReport a metric that the run logs."
    )
