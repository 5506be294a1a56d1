"""Calls functions of the tests in each of two processes; see ``harness``.

What is read is a JSON list of ``[module, function, arguments]``. Every function is called with its arguments and with a
folder that the processes share, and raises where something is wrong. What is written is a list as long as the calls
that were reached: "ok", or the traceback.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch


def main(calls: list[tuple[str, str, list[str]]], path: Path) -> None:
    """Call one after the other, until one fails: the other process may be elsewhere by then."""
    found: list[str] = []
    for module, function, arguments in calls:
        try:
            getattr(importlib.import_module(module), function)(*arguments, path.parent)
            found.append("ok")
        except Exception:
            found.append(traceback.format_exc()[-4000:].strip())
            break
    failed = found[-1] != "ok"
    if failed or torch.distributed.get_rank() == 0:
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.replace(path)
    if failed:
        sys.stdout.flush()
        os._exit(1)  # no waiting for the other process, which is ended
    # A process that ends with gloo's threads running is at times aborted by them (pytorch#179291).
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
