"""Tries a model in a process of its own, with limits of time and memory: what hangs or dies is one more result."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["HANG", "try_model"]

HANG = "hang"
_MEMORY = 12 * 2**30


def try_model(name: str, trials: Sequence[str], limit: float, folder: Path) -> dict[str, Any]:
    """The facts of all trials of a model.

    After a trial that hangs or takes its process along, the next ones run in a new process.

    Args:
        name: The model.
        trials: Names of the trials.
        limit: Seconds that a trial may take.
        folder: For the files of the trials; removed at the end.
    """
    facts: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    todo = list(trials)
    # what is imported here once is there in every process
    context = multiprocessing.get_context("fork")
    while todo:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, name, todo, folder))
        process.start()
        theirs.close()
        todo = _follow(ours, process, todo, limit, facts, seconds)
        process.kill()
        process.join()
    shutil.rmtree(folder, ignore_errors=True)
    return facts | {"seconds": {trial: round(value, 1) for trial, value in seconds.items()}}


def _follow(
    pipe: Connection, process: Any, todo: list[str], limit: float, facts: dict[str, Any], seconds: dict[str, float]
) -> list[str]:
    """Take results as they come; gives the trials that are left for another process."""
    for i, trial in enumerate(todo):
        began = time.perf_counter()
        try:
            # the first one imports the package
            came = pipe.poll(limit if i else limit + 120)
            found = pipe.recv() if came else {trial: f"{HANG}: more than {limit:.0f} seconds"}
        except EOFError:
            process.join()
            came = False
            found = {trial: f"crash: the process ended with {process.exitcode}"}
        seconds[trial] = time.perf_counter() - began
        facts.update(found)
        if not came:
            return todo[i + 1 :]
    return []


def _work(pipe: Connection, name: str, trials: Sequence[str], folder: Path) -> None:
    from experiments.foreign.trials import attempt

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    for trial in trials:
        pipe.send(attempt(trial, name, folder))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)
