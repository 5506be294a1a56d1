"""The command ``lightning-compress``: compose a run with Hydra, and do its task."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lightning_compress.environment import without_variable

__all__ = ["TASKS", "CompareRuns", "main"]

TASKS = ("train", "sensitivity", "search", "pareto")


class CompareRuns(Callback):
    """At the end of a sweep prints one table of its runs, read back from their offline W&B files, and the frontier."""

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Print the table, if any run was logged offline, and the frontier, if any left a report."""
        from rich.console import Console

        from lightning_compress.analysis.compare import comparison_table, offline_runs
        from lightning_compress.tasks.pareto import show

        folder = Path(config.hydra.sweep.dir)
        runs = offline_runs(folder)
        if runs:
            Console().print(comparison_table(runs))
        if next(folder.rglob("report.json"), None) is not None:
            show(folder, config.pareto)


@hydra.main(version_base="1.3", config_path="pkg://lightning_compress.conf", config_name="config")
def _main(cfg: DictConfig) -> Any:
    if cfg.task not in TASKS:
        raise ValueError(f"task={cfg.task!r}: accepted are {', '.join(TASKS)}.")
    return getattr(import_module(f"lightning_compress.tasks.{cfg.task}"), cfg.task)(cfg)


def main() -> None:
    """Run the command; modules of the current folder can be named in ``_target_``."""
    sys.path.insert(0, os.getcwd())
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # Lightning's own, of torch 2.13
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "Tip:" not in record.getMessage())
    with without_variable():  # a run of ours has its own recipe
        _main()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # left to the interpreter, gloo at times aborts it (pytorch#179291)


if __name__ == "__main__":
    main()
