"""The benchmark in little: its whole way from a dense model to the page, on one small task, in less than two minutes.

The numbers mean nothing; that there are some does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.bench import proof
from experiments.frontiers import pictures
from experiments.protocol import Point
from experiments.records import Records
from experiments.standings import Standings
from experiments.tables import page
from lightning_compress.files import write_whole

_POINTS = [Point("zeros", 0.9), Point("macs", 4), Point("bits", 8)]
_METHODS = [
    "ours",
    "global magnitude by hand",
    "Torch-Pruning GroupNorm",
    "onnxruntime static",
    "small dense",
    "random",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--folder."""
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench-quick"), help="of its models and its page")


def run(folder: Path = Path("outputs/bench-quick")) -> dict[str, Any]:
    """Headline: trials that ran, and those that failed."""
    results = folder / "quick.json"
    methods = [*_METHODS]
    made = proof.run(["quick"], _POINTS, methods, seeds=2, again=True, folder=folder / "models", results=results)
    records = Records(results)
    standings = Standings(records)
    write_whole(folder / "page.md", page(standings))
    for name, text in pictures(standings).items():
        write_whole(folder / name, text)
    failed = [outcome["failure"] for outcome in records.outcomes.values() if outcome["failure"]]
    headline = {"trials": float(len(records.outcomes)), "failed": float(len(failed))}
    return {"headline": headline, "rows": made["rows"], "failed": bool(failed)}
