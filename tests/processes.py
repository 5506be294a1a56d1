"""Commands in processes of their own that need not import torch again: forked from one that has imported it all."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import time
import warnings
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port

ROOT = Path(__file__).parents[1]
PATIENCE = 600.0  # seconds for a command

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["lightning.pytorch", "torch._dynamo", "lightning_compress.callbacks", "lightning_compress.cli", "tests.imported"]
)


def start(command: list[str], folder: Path, environment: dict[str, str], output: Path) -> BaseProcess:
    """Begin ``python`` with a command, as if in a new interpreter.

    Args:
        command: As behind ``python``: ``-m``, a module and its arguments, or a file and its arguments.
        folder: Where it runs.
        environment: All of its variables.
        output: File for what it prints.
    """
    process = _FORKS.Process(target=_become, args=(command, folder, environment, output))
    process.start()
    return process


def in_a_process(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[str, int]:
    """What a command printed, and its exit status; see ``start``."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "output.txt"
        process = start(command, folder, environment, output)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(output.read_text()[-4000:])
        return output.read_text(), process.exitcode


def in_a_group(num: int, command: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and output of a command in a group of processes, as ``torchrun`` would have started them.

    One that fails ends the others.

    Args:
        num: Number of processes.
        command: See ``start``.
        folder: An empty folder, for what they print.
    """
    group = {"WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "tests"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_network_port()}
    outputs = [folder / f"rank{rank}.txt" for rank in range(num)]
    processes = []
    for rank, output in enumerate(outputs):
        names = {**group, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        processes.append(start(command, ROOT, environment, output))
    left = {process.sentinel: process for process in processes}
    end = time.monotonic() + PATIENCE
    code = 0
    while left and code == 0 and time.monotonic() < end:
        for sentinel in wait(list(left), timeout=1):
            process = left.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            code = code or process.exitcode
    for process in left.values():
        code = code or 1
        process.kill()
        process.join()
    return code, "".join(output.read_text() for output in outputs)


def _become(command: list[str], folder: Path, environment: dict[str, str], output: Path) -> None:
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if environment.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        # the end of an interpreter; a process of multiprocessing waits for its own children first, and does no more
        threading._shutdown()
        atexit._run_exitfuncs()
