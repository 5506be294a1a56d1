"""Writes the tables and pictures of the benchmark from its results: README, docs/benchmark.md, docs/benchmark/*.svg.

With --check nothing is written, and what is not current is named; the exit status says so too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.bench.proof import RESULTS
from experiments.frontiers import pictures
from experiments.records import Records
from experiments.standings import Standings
from experiments.tables import page, summary
from lightning_compress.files import write_whole

README, PAGE, PICTURES = Path("README.md"), Path("docs/benchmark.md"), Path("docs/benchmark")
BEGIN, END = "<!-- written by python -m experiments.bench report -->", "<!-- end -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--results, --check."""
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; say what is not current")


def between(text: str, new: str) -> str:
    """A text whose marked part is replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no part between the lines {BEGIN} and {END}: put them where the table goes.")
    return f"{before}{begin}\n{new}\n{end}{after}"


def files(results: Path = RESULTS) -> dict[Path, str]:
    """What each file should hold."""
    standings = Standings(Records(results))
    found = {README: between(README.read_text(), summary(standings)), PAGE: page(standings)}
    return found | {PICTURES / name: text for name, text in pictures(standings).items()}


def _shown(text: str) -> str:
    """What tells pictures apart: the digest of their points, as another matplotlib draws the same in other bytes."""
    return text.partition("<dc:description>")[2].partition("<")[0]


def is_current(path: Path, text: str) -> bool:
    """Whether a file holds what it should."""
    if not path.is_file():
        return False
    return _shown(path.read_text()) == _shown(text) if path.suffix == ".svg" else path.read_text() == text


def run(results: Path = RESULTS, check: bool = False) -> dict[str, Any]:
    """Headline: how many files were not current."""
    made = files(results)
    old = [path for path, text in made.items() if not is_current(path, text)]
    for path in [] if check else old:
        write_whole(path, made[path])
    rows = [{"file": str(path), "was current": path not in old} for path in made]
    return {"headline": {"not_current": len(old)}, "rows": rows, "failed": check and bool(old)}
