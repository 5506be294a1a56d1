"""Kill runs by SIGKILL at every kind of place, start them again, and say what became of each.

A row per combination of callbacks or task, a column per place; a cell has the kills after which the run ended bit for
bit as the uninterrupted one, and behind a ~ those whose difference a control without our callbacks shows, too. The exit
status is 1 if a run is lost, or differs and the control does not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.crash.places import HOOKS, Kill
from experiments.crash.runs import COMBINATIONS
from experiments.crash.sweeps import SWEEPS, choose_sweeps, try_sweep
from experiments.crash.trials import Outcome, Reference, choose, refer, try_kill

__all__ = ["main"]

_BAD = ("unexplained", "lost", "not killed")


def main() -> int:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.crash", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of combinations; all without any")
    parser.add_argument("--per-room", type=int, default=1, help="kills in each room of each combination")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    names, sweeps = (
        [name for name in known if not options.only or any(part in name for part in options.only)]
        for known in (COMBINATIONS, SWEEPS)
    )
    begin = time.perf_counter()
    warm()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            options.jobs, get_context("fork"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        references = dict(zip(names, pool.map(partial(_refer, Path(folder)), names), strict=True))
        kills = [
            (name, kill) for name in names for kill in choose(name, references[name].ours["counts"], options.per_room)
        ]
        calls = [
            pool.submit(try_kill, name, kill, references[name], Path(folder, f"kill{i}"))
            for i, (name, kill) in enumerate(kills)
        ]
        calls += list(_submit_sweeps(pool, Path(folder), sweeps, 5 * options.per_room))
        found = []
        for i, call in enumerate(calls):
            found.append(call.result())
            outcome = found[-1]
            print(f"{i + 1} of {len(calls)}: {outcome.name}, {outcome.kill.place}: {outcome.end}", file=sys.stderr)
    console = Console(width=200)
    for part in (names, sweeps):
        console.print(table([outcome for outcome in found if outcome.name in part], part))
    for outcome in found:
        if outcome.end in _BAD:
            print(
                f"{outcome.end}: {outcome.name}, {outcome.kill}, from step {outcome.step}",
                *outcome.words[:12],
                sep="\n  ",
            )
    print(*explanations(found), sep="\n")
    num_bad = sum(outcome.end in _BAD for outcome in found)
    print(f"{len(found)} kills in {time.perf_counter() - begin:.0f} s: {dict(Counter(o.end for o in found))}")
    return 1 if num_bad else 0


def _submit_sweeps(pool: Executor, folder: Path, names: list[str], num: int) -> Iterator[Future[Outcome]]:
    for name in names:
        whole = folder / name.replace(" ", "_")  # as Hydra's command line likes it
        kills = pool.submit(_chosen, name, whole, num).result()
        for i, (kill, number) in enumerate(kills):
            yield pool.submit(try_sweep, name, kill, number, whole, whole.with_name(f"{whole.name}{i}"))


def _chosen(name: str, whole: Path, num: int) -> list[tuple[Kill, int]]:
    return list(choose_sweeps(name, whole, num))


def warm() -> None:
    """Do here what every child would do for itself: imports, and the exporter's table of operators."""
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure", "omegaconf", "onnxruntime"):
        importlib.import_module(name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(1, 1).eval(), (torch.ones(1, 1),), dynamo=True, verbose=False)


def _refer(folder: Path, name: str) -> Reference:
    return refer(name, folder / f"reference{list(COMBINATIONS).index(name)}")


def table(found: list[Outcome], names: list[str]) -> Table:
    """A row per combination, a column per place."""
    places = list(dict.fromkeys(_column(outcome) for outcome in found))
    shown = Table(box=box.SIMPLE_HEAD, padding=0, header_style="bold")
    shown.add_column("killed in", min_width=24, overflow="fold")
    for place in (*places, "kills", "resumed", "identical", "explained", "unexplained", "lost"):
        shown.add_column(place, justify="right", max_width=11)
    for name in (*names, "in all"):
        mine = [outcome for outcome in found if name in (outcome.name, "in all")]
        ends = Counter(outcome.end for outcome in mine)
        resumed = len(mine) - ends["lost"] - ends["not killed"]
        cells = [_cell([outcome for outcome in mine if _column(outcome) == place]) for place in places]
        numbers = (len(mine), resumed, ends["identical"], ends["explained"], ends["unexplained"], ends["lost"])
        shown.add_row(name, *cells, *map(str, numbers))
    return shown


def _column(outcome: Outcome) -> str:
    return "a hook" if outcome.kill.place.startswith(HOOKS) else outcome.kill.place


def _cell(outcomes: list[Outcome]) -> str:
    ends = Counter(outcome.end for outcome in outcomes)
    bad = sum(ends[end] for end in _BAD)
    parts = [str(ends["identical"]) if ends["identical"] else "", f"~{ends['explained']}" if ends["explained"] else ""]
    return "".join([*parts, f"!{bad}" if bad else ""]) or "-"


def explanations(found: list[Outcome]) -> list[str]:
    """What the differences are that the control has, too."""
    kinds = Counter(
        " and ".join(sorted({text.split(":")[0].split("/")[1] for text in outcome.words}))
        for outcome in found
        if outcome.end == "explained"
    )
    return [f"differs alike without us, {num} times: {kind}" for kind, num in kinds.most_common()]


if __name__ == "__main__":
    sys.exit(main())
