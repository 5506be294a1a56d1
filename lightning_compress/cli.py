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
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_compress import __version__
from lightning_compress.checks import check_one_of
from lightning_compress.environment import without_variable
from lightning_compress.refusals import clear, is_worded, misspelt, own, refuse
from lightning_compress.tasks.compose import check_fields, check_targets
from lightning_compress.usage import TASKS, expand, usage

__all__ = ["TASKS", "CheckCall", "main"]

# The fields that check_fields looks at, and what chooses them.
_CHECKED = {"ckpt_path", "compression", "data", "experiment", "init_from", "init_strict", "model", "task"}


class CheckCall(Callback):
    """Before a run has a folder, and before anything heavy is imported, refuses what can be told to be wrong."""

    def on_run_start(self, config: DictConfig, **kwargs: object) -> None:
        """Check the task, the fields and the classes of one run."""
        try:
            check_one_of("task", config.task, TASKS)
            if config.task != "pareto":
                check_fields(config)
        except Exception as error:  # Hydra would take it for a warning
            refuse(error)

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Check the task and the classes that all runs of a sweep share; the fields too, unless they differ."""
        try:
            check_one_of("task", config.task, TASKS)
            check_targets(config)
            if config.task != "pareto" and not _swept(config) & _CHECKED:
                check_fields(config)
        except Exception as error:
            refuse(error)


def _swept(config: DictConfig) -> set[str]:
    """The groups and fields that differ between the runs of a sweep."""
    words = [*config.hydra.overrides.task, *(f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items())]
    overrides = OverridesParser.create().parse_overrides(words)
    return {override.key_or_group.partition(".")[0] for override in overrides if override.is_sweep_override()}


@hydra.main(version_base="1.3", config_path="pkg://lightning_compress.conf", config_name="config")
def _main(cfg: DictConfig) -> Any:
    check_one_of("task", cfg.task, TASKS)
    try:
        return getattr(import_module(f"lightning_compress.tasks.{cfg.task}"), cfg.task)(cfg)
    except Exception as error:
        # the runs of a sweep tell their sweeper
        alone = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN
        if not alone:
            raise
        if not is_worded(error):
            raise own(error) from own(error).__cause__  # Hydra shows no places of those that it puts around
        clear(Path(HydraConfig.get().runtime.output_dir))
        refuse(error)


def main() -> None:
    """Run the command; modules of the current folder can be named in ``_target_``."""
    words = expand(sys.argv[1:])
    if "--version" in words:
        print(f"lightning-compress {__version__}")
        return
    if "--help" in words or "-h" in words:
        print(usage())
        return
    sys.argv[1:] = words
    sys.path.insert(0, os.getcwd())
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # Lightning's own, of torch 2.13
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "Tip:" not in record.getMessage())
    with without_variable():  # a run of ours has its own recipe
        _run(words)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # left to the interpreter, gloo at times aborts it (pytorch#179291)


def _run(words: list[str]) -> None:
    """Do what was asked; what Hydra refuses, in words that know no near names, is followed by such."""
    try:
        _main()
    except SystemExit as ended:  # Hydra has printed what was raised
        is_hydras = isinstance(ended.__context__, ConfigCompositionException | OverrideParseException)
        question = misspelt(words) if is_hydras else ""
        if question:
            print(question, file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
