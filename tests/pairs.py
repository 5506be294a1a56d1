"""The table of ordered pairs of callbacks, at the end of a run of the tests."""

from __future__ import annotations

from typing import Any

__all__ = ["print_pairs"]


def print_pairs(terminalreporter: Any) -> None:
    """First callback x second callback, with what became of each pair; then what was refused, in which words."""
    cells: dict[tuple[str, str], str] = {}
    refused: dict[str, list[str]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            found = dict(getattr(report, "user_properties", []))
            if "pair" in found and (report.when == "call" or outcome != "passed"):
                first, second = found["pair"]
                cells[first, second] = {"passed": "ok"}.get(outcome, outcome)
                if outcome == "passed" and "refused" in found:
                    cells[first, second] = "refused"
                    refused.setdefault(found["refused"], []).append(f"{first} {second}")
    if not cells:
        return
    firsts, seconds = (list(dict.fromkeys(pair[i] for pair in cells)) for i in (0, 1))
    width = max(map(len, firsts)) + 2
    terminalreporter.section("pairs of callbacks: the first acts, then the second")
    terminalreporter.line(" " * width + "".join(f"{name[:12]:>14}" for name in seconds))
    for first in firsts:
        row = "".join(f"{cells.get((first, second), '-'):>14}" for second in seconds)
        terminalreporter.line(f"{first:{width}}{row}")
    for words, pairs in refused.items():
        terminalreporter.line(f"refused ({words}): {', '.join(pairs)}")
