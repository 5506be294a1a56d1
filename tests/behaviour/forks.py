"""Groups of processes that are forked from one that has imported all: each takes a second, and not ten."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port


def fork_group(num: int, call: Callable[[int], None], folder: Path, timeout: float = 120) -> list[str]:
    """What a call came to in each process of a group, as torchrun would have started it, but watched over by nobody.

    "ok", a traceback, "killed" or, for one that had to be, "hangs".

    Args:
        num: Number of processes.
        call: What each of them calls, with its rank.
        folder: An empty folder, or none yet.
        timeout: Seconds until they are taken to hang.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    port = find_free_network_port()
    processes = [context.Process(target=_enter, args=(rank, num, port, call, folder)) for rank in range(num)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    results = []
    for rank, process in enumerate(processes):
        path = folder / f"rank{rank}"
        if process.is_alive():
            process.kill()
            process.join()
            results.append("hangs")
        else:
            results.append(path.read_text() if path.exists() else "killed")
    return results


def _enter(rank: int, num: int, port: int, call: Callable[[int], None], folder: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "GROUP_RANK": 0}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forked"}
    os.environ |= {name: str(value) for name, value in names.items()}
    result = "ok"
    try:
        call(rank)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        result = traceback.format_exc()
    (folder / f"rank{rank}").write_text(result)
    os._exit(result != "ok")  # no waiting for others, nor for gloo's threads (pytorch#179291)
