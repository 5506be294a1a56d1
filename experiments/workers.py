"""Trials in processes of one thread, each in the environment that its method needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from experiments.methods import METHODS
from experiments.protocol import Trial

__all__ = ["ENVIRONMENTS", "missing_environments", "run_trials"]

ENVIRONMENTS = Path(".venv-peers")
_LONGEST = 1800  # seconds of a trial


def _python(environment: str) -> Path:
    return Path(sys.executable) if not environment else ENVIRONMENTS / environment / "bin" / "python"


def missing_environments(trials: Iterable[Trial]) -> list[str]:
    """Those that trials need and that are not there."""
    needed = {METHODS[trial.method, trial.kind].environment for trial in trials}
    return sorted(name for name in needed if not _python(name).is_file())


class _Worker:
    """A process that answers a trial a line."""

    def __init__(self, environment: str) -> None:
        alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [str(_python(environment)), "-m", "experiments.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **alone},
        )

    def ask(self, trial: Trial, data: Path, folder: Path) -> dict[str, Any]:
        """The outcome; one that says so where the process died or took too long."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        begin = time.perf_counter()
        timer = threading.Timer(_LONGEST, self.process.kill)
        timer.start()
        try:
            asked = {"trial": trial.plain, "data": str(data), "folder": str(folder)}
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if answer:
            found: dict[str, Any] = json.loads(answer)
            return found
        seconds = time.perf_counter() - begin
        ended = f"the process ended: {self.process.wait()}"
        reason = f"took longer than {_LONGEST} s" if seconds >= _LONGEST else ended
        return {"trained": None, "deployed": None, "failure": reason, "seconds": round(seconds, 1)}

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked again."""
        return self.process.poll() is None

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def _workers() -> Iterator[Callable[[str], _Worker]]:
    """Gives a thread its worker of an environment; it keeps one at a time, as data lie in its memory."""
    mine = threading.local()
    started: SimpleQueue[_Worker] = SimpleQueue()

    def worker(environment: str) -> _Worker:
        current: tuple[str, _Worker] | None = getattr(mine, "current", None)
        if current is not None and current[0] == environment and current[1].is_alive:
            return current[1]
        if current is not None:
            current[1].close()
        mine.current = (environment, _Worker(environment))
        started.put(mine.current[1])
        return mine.current[1]

    try:
        yield worker
    finally:
        while not started.empty():
            started.get().close()


def run_trials(  # what a trial needs, and how many at once
    trials: list[Trial],
    data: Path,
    folder: Path,
    workers: int,
    until: float,
    done: Callable[[Trial, dict[str, Any]], None],
) -> None:
    """Run trials, and tell each outcome as it comes; none is begun after ``until``, in seconds of ``time.time()``."""
    lock = threading.Lock()
    with _workers() as worker, ThreadPoolExecutor(workers) as pool:

        def one(trial: Trial) -> None:
            if time.time() > until:
                return
            outcome = worker(METHODS[trial.method, trial.kind].environment).ask(trial, data, folder)
            with lock:
                done(trial, outcome)

        # of one environment in a row: the next needs a new process
        ordered = sorted(trials, key=lambda trial: METHODS[trial.method, trial.kind].environment)
        list(pool.map(one, ordered))
