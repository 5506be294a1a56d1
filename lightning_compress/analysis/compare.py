"""One table for many runs, read back from what they logged to W&B offline."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_compress.tracking import OfflineRun, read_offline_run

__all__ = ["comparison_table", "offline_runs"]

_COLUMNS = ("metric", "sparsity", "num_nonzero", "bytes", "bytes_zstd")


def offline_runs(folder: str | Path) -> list[OfflineRun]:
    """The offline W&B runs anywhere below a folder, by name."""
    paths = sorted(Path(folder).rglob("offline-run-*/run-*.wandb"))
    return sorted((read_offline_run(path) for path in paths), key=lambda run: run.name)


def comparison_table(runs: list[OfflineRun]) -> Table:
    """One row a run: its name and the totals of its compressed model."""
    table = Table(title=f"{len(runs)} runs of {', '.join(sorted({run.group for run in runs}))}", header_style="bold")
    table.add_column("run", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(run.name, *(_show(run.summary.get(f"compress/final_{name}")) for name in _COLUMNS))
    return table


def _show(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    Console().print(comparison_table(offline_runs(sys.argv[1])))
