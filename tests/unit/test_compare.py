"""One table for many runs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import wandb
from rich.console import Console

from lightning_compress.analysis.compare import comparison_table, offline_runs

TOTALS = {"compress/final_metric": 0.9712, "compress/final_sparsity": 0.8, "compress/final_bytes": 123_456}


def test_the_runs_of_a_sweep_stand_in_one_table_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", "")
    for name in ("1 sparsity=0.9", "0 sparsity=0.5"):
        settings = wandb.Settings(silent=True, console="off")
        run = wandb.init(
            mode="offline", dir=tmp_path / name[0], project="p", name=name, group="sweep", settings=settings
        )
        run.log(TOTALS)
        run.finish()
    runs = offline_runs(tmp_path)
    assert [run.name for run in runs] == ["0 sparsity=0.5", "1 sparsity=0.9"]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table(runs))
    text = console.export_text()
    assert "2 runs of sweep" in text
    rows = [line.split() for line in text.splitlines() if "sparsity=" in line]
    assert [[cell for cell in row if cell not in "│┃|"] for row in rows] == [
        ["0", "sparsity=0.5", "0.9712", "0.8000", "-", "123,456", "-"],
        ["1", "sparsity=0.9", "0.9712", "0.8000", "-", "123,456", "-"],
    ]


def test_a_folder_without_runs_gives_none(tmp_path: Path) -> None:
    assert offline_runs(tmp_path) == []
