"""Many processes, all of it: ``make test-ranks`` prints each callback by the kind of processes, and what else may be.

Everything is imported once, and the processes are forked, but for those that a Trainer spawns.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from . import dying, ranks, synchronized
from .launching import LAUNCHINGS

KINDS: dict[str, tuple[list[str], Callable[[str, Path], str]]] = {
    **{column: (list(ranks.CASES), partial(ranks.outcome, column)) for column in ranks.COLUMNS},
    "dies": (list(dying.DEATHS), dying.died),
    "launchers": (list(dying.LAUNCHERS), dying.ended),
    "others": (["synchronized norms"], lambda _, folder: synchronized.keep_quantizers(folder)),
    "launched": (list(LAUNCHINGS), lambda case, folder: LAUNCHINGS[case](folder) or "ok"),
}


def outcome(kind: str, case: str, folder: Path) -> str:
    """What became of a case, in words; FAILED, with why, if that is no way for a run to end."""
    with remarks_left_out():
        try:
            return KINDS[kind][1](case, folder)
        except (Exception, pytest.fail.Exception):
            return f"FAILED\n{traceback.format_exc()}"


@contextmanager
def remarks_left_out() -> Iterator[None]:
    """Without what libraries write to stderr, in this process and in those that it starts, between two cells."""
    terminal = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def table(kinds: list[str], cases: list[str], folder: Path) -> list[str]:
    """Print a row for each case, with a column for each kind; gives the failures."""
    failed = []
    width = max(map(len, cases)) + 2
    print(f"\n{'':{width}}" + "  ".join(f"{kind:<11}" for kind in kinds), flush=True)
    for case in cases:
        print(f"{case:{width}}", end="", flush=True)
        for kind in kinds:
            found = outcome(kind, case, folder)
            if found.startswith("FAILED"):
                failed.append(f"{kind}, {case}: {found}")
            print(f"{found.splitlines()[0]:<11}", end="  ", flush=True)
        print(flush=True)
    return failed


def main(folder: Path) -> int:
    """Run everything; the number of failures."""
    print("All processes agree bit for bit, or the callback is refused before the first step.")
    print("A number: how far a loss of the run is from that of one process, at most.")
    failed = table(list(ranks.COLUMNS), list(ranks.CASES), folder)
    print("\nOne of two processes dies: how both end, and when.")
    failed += table(["dies"], list(dying.DEATHS), folder)
    failed += table(["launchers"], list(dying.LAUNCHERS), folder)
    failed += table(["launched"], list(LAUNCHINGS), folder)
    failed += table(["others"], KINDS["others"][0], folder)
    print(*failed, f"{len(failed)} failed", sep="\n")
    return len(failed)


if __name__ == "__main__":
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        chosen: dict[str, list[str]] = json.loads(sys.argv[1])
        path = Path(sys.argv[2])
        found = {f"{k}: {c}": outcome(k, c, path.parent) for k, cases in chosen.items() for c in cases}
        path.write_text(json.dumps(found))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            sys.exit(main(Path(temporary)) > 0)
