"""What a tracked run of the command is called: by what was asked, so that a list of runs can be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["names_of_run"]

# stands in the name anyway, or is a path
_SAID = re.compile(r"_target_$|^(task|init_from|ckpt_path|runs)$")
_LONGEST = 120  # W&B's display names have 128 characters at most


def names_of_run() -> dict[str, Any]:
    """Name, group, tags and type of a job, as W&B takes them; nothing outside of the command.

    A run is named by its experiment, or by its model and its recipe, and by what was changed of them; its group is the
    experiment or the recipe. A job of a sweep is named by its number and what differs, and all of a sweep are of one
    group.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized():
        return {}
    config = HydraConfig.get()
    chosen = config.runtime.choices
    recipe = chosen.get("compression@compression") or chosen.get("compression")
    if recipe is None:  # another Hydra application's run
        return {}
    asked = dict(item.partition("=")[::2] for item in config.overrides.task if "=" in item)
    task = asked.get("task", "train")
    words = [x for x in config.job.override_dirname.split(",") if x]
    if config.mode != RunMode.MULTIRUN:  # what differs between the jobs of a sweep is never left out
        words = [word for word in words if not _SAID.search(word.partition("=")[0])]
    changed = " ".join(re.sub(r"^\S*\.(?=\w+=)", "", word) for word in words)
    if config.mode == RunMode.MULTIRUN:
        group = "-".join(Path(config.sweep.dir).parts[-2:])
        name = f"{config.job.num} {changed}"
    else:
        model = asked.get("model._target_", chosen.get("model") or "").rpartition(".")[2]
        group = chosen.get("experiment") or recipe
        name = " ".join(filter(None, [chosen.get("experiment") or f"{model} {recipe}", changed]))
    return {"name": name.strip()[:_LONGEST], "group": group, "job_type": task, "tags": [recipe, task]}
