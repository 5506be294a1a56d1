"""The table of kinds of runs, at the end of a run of the tests."""

from __future__ import annotations

from typing import Any

__all__ = ["print_runs"]


def print_runs(terminalreporter: Any) -> None:
    """Situation x callback, with how a target ended; what is not as expected stands in capitals."""
    cells: dict[tuple[str, str], str] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            found = dict(getattr(report, "user_properties", []))
            if "run" in found and (report.when == "call" or outcome != "passed"):
                name, situation, kind = found["run"]
                cells[situation, name] = kind if outcome == "passed" else kind.upper()
    if not cells:
        return
    names = sorted({name for _, name in cells})
    situations = list(dict.fromkeys(situation for situation, _ in cells))
    width = max(map(len, situations)) + 2
    terminalreporter.section("any run: how the target of each callback ended")
    terminalreporter.line(" " * width + "".join(f"{name[:16]:>18}" for name in names))
    for situation in situations:
        row = "".join(f"{cells.get((situation, name), '-'):>18}" for name in names)
        terminalreporter.line(f"{situation:{width}}{row}")
    counts = {kind: list(cells.values()).count(kind) for kind in ("reached", "refused", "missed")}
    words = ", ".join(f"{num} {kind}" for kind, num in counts.items())
    terminalreporter.line(f"{len(cells)} runs of {len(situations)} kinds: {words}")
