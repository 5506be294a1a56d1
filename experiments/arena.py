"""The tasks of the benchmark, from quick and nearly saturated ones to the field's standard pair."""

from __future__ import annotations

from experiments import cifar, emoji, quick
from experiments.tasks import TASKS as QUICK
from experiments.tasks import Task

__all__ = ["MAIN_TASKS", "TASKS"]

TASKS: dict[str, Task] = {**QUICK, **emoji.TASKS, **cifar.TASKS, **quick.TASKS}
MAIN_TASKS = ("fsdd", "mnist1d", "emoji", "resnet20")
