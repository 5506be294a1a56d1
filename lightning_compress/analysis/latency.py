"""Milliseconds as people see them: a column for each runtime, and no claim within noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_compress.analysis.report import Report

__all__ = ["LATENCY_LEGEND", "latency_table", "latency_values", "show_ms", "speed"]

LATENCY_LEGEND = (
    "Milliseconds of one thread: the median (quartiles). The float twin is the same graph in float, timed in turn with "
    "its file; a difference is one that three of four turns show. Columns of two runtimes do not compare."
)
_SAME = "no difference beyond noise"


def show_ms(ms: float | None, quartiles: Sequence[float] | None = None) -> str:
    """Milliseconds in three digits, with their quartiles where these are known.

    Example:
        >>> show_ms(0.25, [0.241, 0.27]), show_ms(1234.5), show_ms(None)
        ('0.25 (0.241-0.27)', '1234', '-')
    """
    if ms is None:
        return "-"
    return _digits(ms) + (f" ({_digits(quartiles[0])}-{_digits(quartiles[1])})" if quartiles else "")


def _digits(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def speed(artifact: Mapping[str, Any], size: str) -> str:
    """How a file compares with its float twin at a batch size, in words.

    Example:
        >>> file = {"times_faster": {"1": [2.0, 1.9, 2.2], "8": [1.1, 0.9, 1.2], "64": [0.5, 0.4, 0.8]}}
        >>> speed(file, "1"), speed(file, "8"), speed(file, "64")
        ('2.00x faster', 'no difference beyond noise', '2.00x slower')
    """
    # a report of an earlier version lacks it
    ratio, low, high = artifact.get("times_faster", {}).get(size, (1.0, 1.0, 1.0))
    if low <= 1 <= high:
        return _SAME
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


def latency_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Column names and rows: a column for each file in its runtime, and one of the compressed model in PyTorch."""
    files = [artifact for artifact in report["artifacts"] if artifact["latency_ms"]]
    in_torch = report.get("latency_ms_pytorch", {})
    names = ["ms", *(f"{Path(a['path']).name} in {a['runtime']}" for a in files)]
    names += ["compressed in PyTorch"] if in_torch else []
    sizes = sorted({size for times in (in_torch, *(a["latency_ms"] for a in files)) for size in times}, key=int)
    rows = []
    for size in sizes:
        own = [_cell(a, "latency_ms", size) for a in files]
        own += [_cell(report, "latency_ms_pytorch", size)] if in_torch else []
        rest = ["-"] * bool(in_torch)
        rows.append([f"batch {size}", *own])
        if files:
            rows.append([f"batch {size}, float twin", *(_cell(a, "latency_ms_float", size) for a in files), *rest])
            compared = [speed(a, size) if size in a["latency_ms"] else "-" for a in files]
            rows.append([f"batch {size}, compared", *compared, *rest])
    return names, rows


def _cell(found: Mapping[str, Any], key: str, size: str) -> str:
    return show_ms(found[key].get(size), found.get(f"{key}_quartiles", {}).get(size))


def latency_values(report: Report) -> tuple[list[str], list[list[Any]]]:
    """The same as numbers, a row for each file and batch size, for loggers that take tables."""
    columns = ["runtime", "file", "batch", "ms", "low", "high", "float ms", "float low", "float high"]
    rows: list[list[Any]] = []
    for artifact in report["artifacts"]:
        for size in artifact["latency_ms"]:
            twin = _numbers(artifact, "latency_ms_float", size)
            values = [*_numbers(artifact, "latency_ms", size), *twin]
            rows.append([artifact["runtime"], Path(artifact["path"]).name, int(size), *values])
    for size in report.get("latency_ms_pytorch", {}):
        values = [*_numbers(report, "latency_ms_pytorch", size), None, None, None]
        rows.append(["PyTorch", "compressed", int(size), *values])
    return columns, rows


def _numbers(found: Mapping[str, Any], key: str, size: str) -> list[float | None]:
    low, high = found.get(f"{key}_quartiles", {}).get(size, (None, None))
    return [found[key].get(size), low, high]
