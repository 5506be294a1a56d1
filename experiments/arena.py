"""The tasks of the benchmark, from quick and nearly saturated ones to the field's standard pair.

MiniLM's embeddings of sentences are a benchmark of their own: ``experiments/bench/minilm.py``.
"""

from __future__ import annotations

from experiments import cifar, emoji, forecast, gru, keywords, pitch, quick, shakespeare
from experiments.tasks import TASKS as SMALL
from experiments.tasks import Task

__all__ = ["MAIN_TASKS", "TASKS"]

TASKS: dict[str, Task] = {
    **SMALL,
    **emoji.TASKS,
    **cifar.TASKS,
    **forecast.TASKS,
    **gru.TASKS,
    **keywords.TASKS,
    **pitch.TASKS,
    **shakespeare.TASKS,
    **quick.TASKS,
}
MAIN_TASKS = ("fsdd", "mnist1d", "emoji", "resnet20")
