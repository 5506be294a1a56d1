"""The report in a terminal of 80 columns: what was asked, what compression bought, and the milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lightning_compress.analysis.latency import LATENCY_LEGEND, latency_table
from lightning_compress.analysis.legend import legend_of_bytes
from lightning_compress.analysis.report import (
    TARGET_HEADERS,
    Report,
    describe_missed,
    headers,
    summary_rows,
    target_rows,
)

__all__ = ["terminal_report"]

_TIMED = 3  # columns of milliseconds that stand side by side in 80 columns


def terminal_report(report: Report) -> list[RenderableType]:
    """What to print, from top to bottom."""
    parts: list[RenderableType] = []
    if report["targets"]:
        styles = ["bold red" if row["missed"] else "" for row in report["targets"]]
        parts.append(_table("asked and reached", TARGET_HEADERS, target_rows(report), styles))
        parts += [Text(describe_missed(row), style="bold red") for row in report["targets"] if row["missed"]]
        parts.append("")
    names = [name.replace(" minus ", "\nminus\n") for name in headers(report)]
    parts.append(_table("what compression bought", names, summary_rows(report)))
    parts.append(Text("; ".join(f"{name}: {words}" for name, words in legend_of_bytes(report)), style="dim"))
    names, rows = latency_table(report)
    for first in range(1, len(names) if rows else 1, _TIMED):
        part = slice(first, first + _TIMED)
        cells = [[row[0], *row[part]] for row in rows]
        parts += ["", _table("milliseconds" if first == 1 else None, [names[0], *names[part]], cells)]
    if rows:
        parts.append(Text(LATENCY_LEGEND, style="dim"))
    return parts


def _table(title: str | None, names: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, header_style="bold", show_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for i, row in enumerate(rows):
        cells = (Text(f" {cell}" if j else cell) for j, cell in enumerate(row))
        table.add_row(*cells, style=styles[i] if styles else None)
    return table
