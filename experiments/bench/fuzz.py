"""Files that are damaged on purpose, and what their readers make of them.

Packed files of models of every kind are damaged in their bytes, and in what they claim with every checksum made right
again; so are the records in checkpoints, reports, sensitivities and offline runs of W&B. Each is read in a process of
bounded address space. A reader has to refuse by a ValueError that names the file, or to give what was written; after
wrong claims with right checksums also other values, of no more bytes than the file may claim.

The exit status is 1 if any does something else. A fault is printed with its number: ``--first NUMBER --mutations 1``
does it again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from experiments.readers import READERS, Attempt, prepare

MIB = 2**20
ADDRESS_SPACE = 1536 * MIB  # beyond what the process has before it reads
_MEMORY = Path("/dev/shm")  # files there cost a tenth; the names are random
_PATIENCE = 60.0  # seconds for a file
_CHUNK = 500
_SHOWN = 40  # faults


@dataclass
class Found:
    """What became of some mutations.

    Args:
        outcomes: How many, by reader, kind of damage and outcome.
        faults: In sentences.
        peak: Most bytes that a reading took, and the number of the mutation, by reader.
        slowest: Most seconds, likewise.
    """

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    peak: dict[str, tuple[float, int]] = field(default_factory=dict)
    slowest: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        """Take in what another process found."""
        self.outcomes += other.outcomes
        self.faults += other.faults
        for ours, theirs in ((self.peak, other.peak), (self.slowest, other.slowest)):
            for name, value in theirs.items():
                ours[name] = max(ours.get(name, value), value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much, from where on, and by how many processes."""
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")


def _status(key: str) -> int:
    """Bytes in a line of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def attempt(number: int, folder: Path) -> tuple[Attempt, str, str, int]:
    """One mutation: what it was, what became of it, what is wrong with that, and the bytes that reading took."""
    rng = random.Random(number)  # no secret
    made = READERS[_reader(number)](rng, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    try:
        outcome, fault = made.judge(made.read())
    except ValueError as error:
        outcome, fault = "refused", made.lacks(error)
    except BaseException as error:  # that is what is looked for, a panic of Rust among it
        outcome, fault = "raised", f"{type(error).__name__}: {str(error)[:300]}"
    grown = max(0, _status("VmHWM") - before)
    if not fault and grown > made.most_bytes:
        fault = f"{grown / MIB:.0f} MiB were taken, where {made.most_bytes / MIB:.0f} may be"
    return made, outcome, fault, grown


def _reader(number: int) -> str:
    """Which reader a mutation is for: packed files nine times of ten."""
    others = [name for name in READERS if name != "packed"]
    return others[number // 10 % len(others)] if number % 10 == 9 else "packed"


def _work(numbers: Iterable[int], current: Any, answer: Connection) -> None:
    """Try mutations in this process, whose end is told apart from an answer."""
    found = Found()
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what readers print
    used = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        for number in numbers:
            current.value = number
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
            begin = time.perf_counter()
            made, outcome, fault, grown = attempt(number, Path(folder))
            taken = time.perf_counter() - begin
            name = _reader(number)
            found.outcomes[name, made.damage, outcome if not fault else "FAULT"] += 1
            if fault:
                found.faults.append(f"{number} ({name}, {made.damage}, {made.what}): {fault}")
            found.peak[name] = max(found.peak.get(name, (0, 0)), (grown, number))
            found.slowest[name] = max(found.slowest.get(name, (0.0, 0)), (taken, number))
        signal.setitimer(signal.ITIMER_REAL, 0)
    answer.send(found)


def _all(first: int, mutations: int, workers: int) -> Found:
    """Chunks of mutations in forked processes; of one that dies the number is known, and the rest is tried again."""
    fork: Any = multiprocessing.get_context("fork")
    found = Found()
    last = first + mutations
    chunks = [range(begin, min(begin + _CHUNK, last)) for begin in range(first, last, _CHUNK)][::-1]
    running: dict[Any, tuple[Any, Any, Connection, range]] = {}
    with Progress() as progress:
        task = progress.add_task("mutations", total=mutations)
        while chunks or running:
            while chunks and len(running) < workers:
                chunk = chunks.pop()
                current, (ours, theirs) = fork.Value("q", chunk.start), fork.Pipe(duplex=False)
                process = fork.Process(target=_work, args=(chunk, current, theirs))
                process.start()
                theirs.close()
                running[process.sentinel] = (process, current, ours, chunk)
            for sentinel in wait([one[2] for one in running.values()] + list(running)):
                key = next(k for k, one in running.items() if sentinel in (k, one[2]))
                process, current, ours, chunk = running.pop(key)
                try:
                    found.add(ours.recv())
                    progress.advance(task, len(chunk))
                except EOFError:
                    process.join()
                    number = current.value
                    name = _reader(number)
                    found.outcomes[name, "-", "FAULT"] += 1
                    found.faults.append(f"{number} ({name}): the process died by signal {-process.exitcode}")
                    chunks += [part for part in (range(chunk.start, number), range(number + 1, chunk.stop)) if part]
                process.join()
                break
    return found


def run(mutations: int = 100_000, first: int = 0, workers: int = 2) -> dict[str, Any]:
    """Headline: mutations, faults, most MiB that a reading took, seconds of the slowest, seconds in all."""
    begin = time.perf_counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        prepare(Path(folder))
    found = _all(first, mutations, workers)
    names = sorted({(reader, damage) for reader, damage, _ in found.outcomes})
    outcomes = sorted({outcome for *_, outcome in found.outcomes})
    rows = [
        {"reader": reader, "damage": damage, **{o: found.outcomes[reader, damage, o] for o in outcomes}}
        for reader, damage in names
    ]
    for text in found.faults[:_SHOWN]:
        print(text)
    peak = max(found.peak.values(), default=(0, 0))
    slowest = max(found.slowest.values(), default=(0.0, 0))
    headline = {
        "mutations": sum(found.outcomes.values()),
        "faults": len(found.faults),
        "peak_mib": peak[0] / MIB,
        "slowest_s": slowest[0],
        "seconds": time.perf_counter() - begin,
    }
    extremes = {
        name: {"peak_mib": found.peak[name][0] / MIB, "of": found.peak[name][1], "slowest_s": found.slowest[name][0]}
        for name in found.peak
    }
    failed = len(found.faults)
    return {"headline": headline, "rows": rows, "failed": failed, "faults": found.faults, "extremes": extremes}
