"""One kill: a run that is killed, started again, compared with one that was not, and with a control without us."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.crash.lives import KILLED, apart, live
from experiments.crash.places import CHECKPOINT, HOOKS, ROOMS, Kill, Places
from experiments.crash.runs import COMBINATIONS

__all__ = ["Outcome", "Reference", "choose", "compare", "refer", "try_kill"]

_MOMENT = "any moment"
_BUSY = 90  # calls from which on a room has something to do in a run
# All that a skipped validation leaves out of a run whose weights are the same: a point of a curve.
_OF_A_VALIDATION = tuple(
    f"{where}/history/{name}" for where in ("", "/callbacks/CompressionReport") for name in ("metric", "validations")
)
_SECTIONS = ("weights", "optimizers", "rates", "callbacks", "checkpoints", "targets", "files")


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run and its control.

    Args:
        ours: What it left behind.
        control: What the same without our callbacks did.
    """

    ours: dict[str, Any]
    control: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a kill.

    Args:
        name: Of the combination.
        kill: Where it was killed.
        end: ``"identical"``, ``"explained"`` by the control, ``"unexplained"``, ``"lost"``, or ``"not killed"``.
        step: The step at which it was taken up.
        words: What differs, or why it is lost.
    """

    name: str
    kill: Kill
    end: str
    step: str = ""
    words: tuple[str, ...] = ()


def refer(name: str, folder: Path) -> Reference:
    """Run a combination to its end, and its control."""
    found = []
    for ours in (True, False):
        below = folder / ("ours" if ours else "control")
        status = apart(
            partial(live, name, below / "run", Places(), below / "trace", below / "result.pt", ours), below / "log"
        )
        if status:
            raise RuntimeError(f"{name} fails without a kill: {_last_line(below / 'log')}")
        found.append(torch.load(below / "result.pt", weights_only=False))
        shutil.rmtree(below / "run")
    return Reference(*found)


def choose(name: str, counts: dict[str, int], per_room: int) -> Iterator[Kill]:
    """Where a combination is killed: at some hooks, in every room that it has, in its checkpoints, at any moment.

    Args:
        name: Of the combination.
        counts: How often something happened at each place in a whole run.
        per_room: Kills in each room.
    """
    number = list(COMBINATIONS).index(name)
    chance = random.Random(number)
    if COMBINATIONS[name].only:
        yield from (Kill(place, chance.random()) for place in COMBINATIONS[name].only)
        return
    for i in range(4):  # so that all combinations together have every hook, before and behind ours
        hook = HOOKS[(4 * number + i) % len(HOOKS)]
        yield Kill(f"{hook}, {('before', 'behind')[(number // len(HOOKS) + i + number) % 2]}", chance.random())
    for place in (*ROOMS, CHECKPOINT, "a checkpoint's renaming"):
        busy = place not in ROOMS or counts.get(place, 0) >= _BUSY or place == "a file's renaming"
        if counts.get(place, 0) and busy:
            for _ in range(per_room if place in ROOMS and place != "verdict" else 1):
                yield Kill(place, chance.random())
    yield Kill(_MOMENT, chance.random())


def try_kill(name: str, kill: Kill, reference: Reference, folder: Path) -> Outcome:
    """Kill a run, start it again, and see."""
    try:
        status = _kill(name, kill, reference, folder)
        if status != KILLED:
            return Outcome(name, kill, "lost" if status else "not killed", words=(_last_line(folder / "killed.log"),))
        trace = folder / "trace"
        events = trace.read_text().splitlines() if trace.exists() else []
        status = _start(name, folder, Places("none"), "again")
        if status:
            return Outcome(name, kill, "lost", words=(_last_line(folder / "again.log"),))
        found = torch.load(folder / "again.pt", weights_only=False)
        step = found["events"][0].removeprefix("from ")
        words = compare(reference.ours, found)
        if not words:
            return Outcome(name, kill, "identical", step)
        why_not = _not_explained(name, reference, found, words, len(events), folder)
        return Outcome(name, kill, "unexplained" if why_not else "explained", step, (*why_not, *words))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kill(name: str, kill: Kill, reference: Reference, folder: Path) -> int:
    """Start a run that is to be killed; earlier, where it was over by then: some calls repeat until time is up."""
    status = 0
    at = kill.at
    for _ in range(4):
        shutil.rmtree(folder, ignore_errors=True)
        if kill.place == _MOMENT:
            status = _start(name, folder, Places("none"), "killed", at * reference.ours["seconds"])
        else:
            num = 1 + int(at * 0.98 * reference.ours["counts"][kill.place])
            status = _start(name, folder, Places(kill.place, num), "killed")
        if status:
            break
        at /= 2
    return status


def _start(name: str, folder: Path, places: Places, what: str, moment: float | None = None, ours: bool = True) -> int:
    call = partial(live, name, folder / "run", places, folder / "trace", folder / f"{what}.pt", ours)
    return apart(call, folder / f"{what}.log", moment)


def _not_explained(
    name: str, reference: Reference, found: dict[str, Any], words: list[str], num_events: int, folder: Path
) -> tuple[str, ...]:
    """Why the control, killed where the run was, does not explain what differs; nothing if it does.

    It explains a difference if it goes through the same as the run, batch by batch and validation by validation, and
    differs itself from its own uninterrupted run where ours does.
    """
    every = COMBINATIONS[name].every
    at = int(found["events"][0].removeprefix("from "))
    second_of_two = Places("a checkpoint's renaming", 2 * (at // every + 1))  # the best's is whole, and the last's not
    places = [Places(f"event {num_events}", 1), Places(f"event {num_events + 1}", 1), second_of_two]
    why_not: tuple[str, ...] = ()
    for i, place in enumerate(places):
        below = folder / f"control{i}"
        _start(name, below, place, "killed", ours=False)
        status = _start(name, below, Places("none"), "again", ours=False)
        if status:
            return (f"the control fails: {_last_line(below / 'again.log')}",)
        control = torch.load(below / "again.pt", weights_only=False)
        why_not = _not_alike(found, words, control, compare(reference.control, control))
        if not why_not:
            return ()
    return why_not


def _not_alike(found: dict[str, Any], words: list[str], control: dict[str, Any], theirs: list[str]) -> tuple[str, ...]:
    """What of the differences the control does not have."""
    if control["events"] != found["events"]:
        return ("the control goes another way",)
    same_weights = not any(text.startswith(("/weights", "/optimizers")) for text in theirs)
    return tuple(f"not in the control: {text}" for text in words if not _is_alike(text, theirs, same_weights))


def _is_alike(text: str, theirs: list[str], same_weights: bool) -> bool:
    if text.startswith("/checkpoints"):
        return text in theirs
    if same_weights:
        return any(part in text for part in _OF_A_VALIDATION)
    return True


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Where what two runs left behind differs, bit for bit."""
    return [text for section in _SECTIONS for text in _differences(a[section], b[section], f"/{section}")]


def _differences(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [x for k in {**a, **b} for x in _differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [x for i, pair in enumerate(zip(a, b, strict=True)) for x in _differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and _bits(a) == _bits(b)
        return [] if same else [f"{path}: other bits"]
    # NaN is NaN
    return [] if repr(a) == repr(b) else [f"{path}: {a!r} != {b!r}"[:200]]


def _bits(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["nothing was said"])[-1][:200] if log.exists() else "no log"
