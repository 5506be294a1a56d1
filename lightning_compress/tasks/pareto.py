"""The frontier of the runs of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

__all__ = ["pareto", "show"]


def pareto(cfg: DictConfig) -> None:
    """Compare all runs below ``cfg.runs``; writes pareto.json, pareto.html and pareto.png there.

    Args:
        cfg: The composed configuration; conf/config.yaml names its fields.

    Raises:
        ValueError: If no folder is given, or no run below it left a report.
    """
    if cfg.runs is None:
        raise ValueError("runs is null. Give the folder of a sweep: lightning-compress task=pareto runs=multirun/...")
    show(Path(cfg.runs), cfg.pareto)


def show(folder: Path, options: Any) -> None:
    """Print and write the frontier of the runs below a folder; the jobs there that left no report are named."""
    from rich.console import Console

    from lightning_compress.analysis.pareto import frontier
    from lightning_compress.analysis.runs import jobs_without_report, read_runs
    from lightning_compress.callbacks.judgement import settle_mode
    from lightning_compress.callbacks.outputs import written

    left_out = jobs_without_report(folder)
    metric, runs = read_runs(folder, options.monitor, left_out)
    mode = settle_mode("pareto", metric, options.mode)
    found = frontier(metric, runs, options.cost, options.max_drop, mode == "max")
    found.left_out = left_out | found.left_out
    console = Console()
    console.print(found.table())
    for text in found.words_of_left_out():
        console.print(f"left out {text}", soft_wrap=True, markup=False, highlight=False)
    console.print(found.noise_from, markup=False, highlight=False)
    if found.runs[found.chosen].command:
        console.print(f"again: {found.runs[found.chosen].command}", soft_wrap=True, markup=False)
    if written(folder / "pareto.html", lambda: found.write(folder)):
        console.print(f"frontier: {folder / 'pareto.html'}", soft_wrap=True)
