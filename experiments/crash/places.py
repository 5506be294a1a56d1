"""Where a process can be killed: at hooks, at any call inside our files, in the middle of a checkpoint's bytes."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileOpener

import lightning_compress
from lightning_compress import callbacks

__all__ = ["CHECKPOINT", "HOOKS", "ROOMS", "At", "Kill", "Places", "watch_calls", "watch_files", "watch_writes"]

# the files of ours in which a process is, when it is killed at one of the calls that are made there
ROOMS: dict[str, tuple[str, ...]] = {
    "mask update": ("pruning/updates.py", "pruning/masks.py", "pruning/threshold.py", "pruning/scoring.py"),
    "observation": ("pruning/observation.py", "pruning/criteria.py"),
    "calibration": ("quantization/calibration.py", "quantization/observers.py", "quantization/state.py"),
    "shape change": ("callbacks/live_shape.py", "structure/record.py", "structure/optimizers.py"),
    "teaching": ("callbacks/distillation.py", "callbacks/taught_step.py", "distillation/loss.py"),
    "judgement": ("callbacks/guard.py", "callbacks/levels.py", "callbacks/judgement.py", "callbacks/rollback.py"),
    "verdict": ("callbacks/verdict.py", "callbacks/gates.py"),
    "export": ("callbacks/export.py", "deploy/onnx.py", "deploy/files.py", "deploy/verify.py"),
    "packed file": ("deploy/packed/file.py", "deploy/packed/codec.py"),
    "report": ("callbacks/report.py", "callbacks/final_report.py", "callbacks/measure.py", "analysis/report.py"),
    "a file's renaming": ("files.py",),
}
HOOKS = (
    "on_train_batch_start",
    "on_before_optimizer_step",
    "behind the optimizer's step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
)
CHECKPOINT = "half a checkpoint"


@dataclass(frozen=True)
class Kill:
    """When a process is killed.

    Args:
        place: A room, a hook in front of ours or behind, a checkpoint's write, or ``"any moment"``.
        at: The share of all that happens at the place in a whole run, 0..1; of ``"any moment"``, of its seconds.
    """

    place: str
    at: float


class Places:
    """Counts what happens where, and ends the process when it is time.

    Args:
        place: Where.
        num: After how many times.
    """

    def __init__(self, place: str = "", num: int = 0) -> None:
        self.place = place
        self.num = num
        self.counts: Counter[str] = Counter()

    def hit(self, place: str) -> None:
        """It happens."""
        if self.due(place):
            os.kill(os.getpid(), signal.SIGKILL)

    def due(self, place: str) -> bool:
        """Whether this was the time."""
        self.counts[place] += 1
        return place == self.place and self.counts[place] == self.num


class At(pl.Callback):
    """Every hook that a user's own callback could be killed in.

    Args:
        places: What counts.
        where: ``"before"`` or ``"behind"`` ours.
    """

    def __init__(self, places: Places, where: str) -> None:
        self.places = places
        self.where = where
        for name in HOOKS:
            if name.startswith("on_"):
                self.__dict__[name] = self._hook(name)

    def _hook(self, name: str) -> Callable[..., None]:
        def hit(trainer: pl.Trainer, *args: object, **kwargs: object) -> None:
            if not trainer.sanity_checking:
                self.places.hit(f"{name}, {self.where}")

        return hit

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the optimizers."""
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.places.hit(f"{HOOKS[2]}, {self.where}")


def watch_calls(places: Places) -> None:
    """Count what happens in all rooms."""
    roots = {"callbacks/": Path(str(callbacks.__file__)).parent, "": Path(str(lightning_compress.__file__)).parent}

    def path(name: str) -> str:
        prefix = "callbacks/" if name.startswith("callbacks/") else ""
        return str(roots[prefix] / name.removeprefix(prefix))

    watch_files(places, {room: tuple(map(path, names)) for room, names in ROOMS.items()})


def watch_files(places: Places, rooms: Mapping[str, Iterable[str]]) -> None:
    """Count every call that is made inside files, of Python's functions and of others.

    Args:
        places: What counts.
        rooms: The paths of the files, by the name of what happens there.
    """
    room_of = {path: room for room, paths in rooms.items() for path in paths}

    def watch(frame: FrameType, event: str, arg: object) -> None:
        room = room_of.get(frame.f_code.co_filename)
        if room is not None and event in ("call", "c_call"):
            places.hit(room)

    sys.setprofile(watch)


def watch_writes(places: Places) -> None:
    """Kill a process with half of a checkpoint's bytes on the disk, or with all of them and not yet in their place."""
    write = LocalFileOpener.write
    commit = LocalFileOpener.commit

    def half(self: LocalFileOpener, data: bytes) -> Any:
        if places.due(CHECKPOINT):
            write(self, data[: len(data) // 2])
            self.f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    def before_commit(self: LocalFileOpener) -> None:
        places.hit("a checkpoint's renaming")
        commit(self)

    LocalFileOpener.write = half
    LocalFileOpener.commit = before_commit
