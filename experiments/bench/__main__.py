"""Run a benchmark: ``python -m experiments.bench peers --json peers.json``."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_compress.files import write_whole

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def parse(arguments: list[str]) -> dict[str, Any]:
    """The benchmark's options by name; the benchmark itself and the file to write are among them."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, help="also write headline and rows to this file")
    name = parser.parse_known_args(arguments)[0].name
    module = import_module(f"experiments.bench.{name}")
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    return vars(parser.parse_args(arguments))


def main() -> None:
    """Parse, run, print, write."""
    options = parse(sys.argv[1:])
    name = options.pop("name")
    path = options.pop("json")
    result = import_module(f"experiments.bench.{name}").run(**options)
    table = Table(title=name, box=box.SIMPLE_HEAD)
    columns = result.get("columns", list(result["rows"][0]))
    for i, column in enumerate(columns):
        words = any(isinstance(row[column], str) and " " in row[column] for row in result["rows"])
        table.add_column(column, justify="left" if words or not i else "right", overflow="fold")
    for row in result["rows"]:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else escape(str(v)) for v in map(row.get, columns)))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print("headline: " + ", ".join(f"{key} {value:.4g}" for key, value in result["headline"].items()))
    if path is not None:
        write_whole(path, json.dumps(result, indent=2) + "\n")
    if result.get("failed"):
        sys.exit(1)


if __name__ == "__main__":
    main()
